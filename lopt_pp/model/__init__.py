"""The split: blocks of a `transformers` model, the proof that they are the model, and their weights.

Knows `transformers`; no loss, no rows, no processes.
Start at `block.py`; `partition.py` says where the cuts are, `verify.py` proves them, `weights.py` reads and writes.
"""
