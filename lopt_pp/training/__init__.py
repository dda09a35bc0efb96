"""A training run, from the flags to the saved model.

Brings all rooms below together; knows nothing of commands and report pages.
Start at `run.py`: one function that reads from top to bottom. Then `step_plan.py`, `phases.py` and `loop.py`.
"""
