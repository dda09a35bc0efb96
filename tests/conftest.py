"""What all tests share: helper modules on the path, and one thread, so that equal runs are equal bit for bit."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)
