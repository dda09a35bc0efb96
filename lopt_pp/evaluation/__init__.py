"""What finished models are worth: losses on rows, benchmarks, and the layers they can do without.

Knows models and rows; no run.
Start at `losses.py`; `scores.py` has the numbers and their errors.
"""
