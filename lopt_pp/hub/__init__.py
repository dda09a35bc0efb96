"""Publishes a trained model on the Hugging Face Hub, while a run goes on, at its end or later.

Knows directories of models and of checkpoints, and no training; `huggingface_hub` does the talking.
Start at `repository.py`; `published.py` names the files, and `pusher.py` is a run's part.
"""
