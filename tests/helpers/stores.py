"""Stores of `torch.distributed`."""

from torch.distributed import Store


def clone(store: Store) -> Store:
    """Another connection to the same store."""
    return store.clone()  # type: ignore[attr-defined]  # The stubs lack it.
