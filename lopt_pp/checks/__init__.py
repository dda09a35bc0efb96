"""What `lopt-pp check` tries on the user's machine or Slurm allocation: whether a run will be right, and how fast.

Knows all rooms of a run, and starts runs by the launcher; no user's model and no user's rows.
Start at `suite.py`, which has the list of checks; `session.py` starts what they run.
"""
