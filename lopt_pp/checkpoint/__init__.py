"""What is written while a run trains and at its end, and how it is read again.

Knows stages as something with a state; not what they learn from, and no loop.
Start at `writer.py`; then `manifest.py`, `resume.py` and `final_model.py`.
"""
