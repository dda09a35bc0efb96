"""What all tests share: helper modules on the path, and one thread, so that equal runs are equal bit for bit."""

import sys
from pathlib import Path

import torch

TESTS = Path(__file__).parent
# The root for `benchmarks`, where pytest is not run as a module from there.
sys.path[:0] = [str(TESTS / "helpers"), str(TESTS / "runs"), str(TESTS.parent)]
torch.set_num_threads(1)
