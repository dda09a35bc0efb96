"""What a run measures while it trains, and the files, bars and trackers that get it.

Knows stages and the run's key-value store. Nothing in it makes training wait.
Start at `records.py` for the names, then `collector.py`, which brings the records of all stages together.
"""
