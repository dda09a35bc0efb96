"""A block with its objective and its optimizer.

Knows no neighbour and no communication, but that of its own replicas.
Start at `stage.py`: `run_microbatch` is the whole of local learning. `end_to_end_stage.py` is what it is compared with.
"""
