"""Hidden states across a boundary: one way, non-blocking, bounded.

Knows processes and tensors; no model, no loss, no rows.
Start at `stream.py`; `messages.py` has the headers that announce each message, `boundary.py` the two processes.
"""
