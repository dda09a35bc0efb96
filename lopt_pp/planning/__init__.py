"""What a run will need (memory, operations, bytes), and where its cuts should be.

Runs real stages on tensors without memory, or for a moment to time them; knows no run and no other process.
Start at `plan.py`; `estimate.py` finds what one process needs, and `balance.py` the cuts.
"""
