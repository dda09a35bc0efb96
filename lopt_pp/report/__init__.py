"""Pages on finished and running runs: curves, the timeline, advice, comparisons.

Reads the files that a run leaves, and never imports torch.
Start at `run_report.py`; `run_data.py` reads the files, and `advice.py` says what may help.
"""
