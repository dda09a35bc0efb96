"""The processes of a run: how they meet, agree, hear of a failure, and stop.

Knows processes and the key-value store that they share; no model and no rows.
Start at `world.py`; then `devices.py` (what each computes on), `groups.py` (whom it talks to in collectives),
`watchdog.py` (failures and signals) and `shutdown.py` (which steps are made).
"""
