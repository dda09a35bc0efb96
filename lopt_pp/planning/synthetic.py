"""Microbatches with random content, to measure with."""

import torch

from lopt_pp.data import Microbatch


def random_microbatch(
    shape: tuple[int, int], vocabulary: int, device: torch.device, longest_row: int | None = None
) -> Microbatch:
    """Random tokens, all of which count.

    Args:
        shape: (sequences, tokens).
        vocabulary: number of token ids.
        device: of the tensors.
        longest_row: in tokens; longer sequences have several rows, as packed ones do. None for one row each.
    """
    tokens = torch.randint(vocabulary, shape, device=device)
    positions = torch.arange(shape[1] - 1, device=device)
    mask = torch.ones(shape, dtype=torch.bool, device=device)
    restarts = None
    if longest_row is not None and shape[1] > longest_row:
        restarts = (torch.arange(shape[1], device=device) % longest_row).expand(shape)
    places = torch.arange(tokens.numel(), device=device)
    targets = places.view(shape)[:, :-1].flatten()
    return Microbatch(0, 0, tokens, tokens, mask, positions, tokens.numel(), targets.numel(), restarts, places, targets)
