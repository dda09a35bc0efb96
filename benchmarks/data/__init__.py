"""How long a run waits for its data."""
