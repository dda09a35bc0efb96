"""Microbatches with random content, to measure with."""

import torch

from lopt_pp.data import Microbatch


def random_microbatch(shape: tuple[int, int], vocabulary: int, device: torch.device) -> Microbatch:
    """Random tokens, all of which count."""
    tokens = torch.randint(vocabulary, shape, device=device)
    positions = torch.arange(shape[1] - 1, device=device)
    mask = torch.ones(shape, dtype=torch.bool, device=device)
    return Microbatch(0, 0, tokens, tokens, mask, positions, tokens.numel(), shape[0] * (shape[1] - 1))
