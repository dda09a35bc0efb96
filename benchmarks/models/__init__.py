"""Which model families can be split."""
