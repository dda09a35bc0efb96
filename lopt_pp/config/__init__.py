"""Every flag, one group in each file, and what each of them affects.

Knows nothing but errors, and never imports torch: `--help` must not wait for it.
Start at `train_config.py`; `parser.py` reads command lines and YAML files.
"""
