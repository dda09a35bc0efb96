"""Seeds that are functions of what they are for, so that no process need tell another."""

import hashlib


def derive_seed(*parts: int) -> int:
    """A seed of its own for each tuple of numbers, such as (seed, stage, step, microbatch)."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little")
