"""A run as a job of a cluster.

Knows the flags, and the cluster's commands; no training.
Start at `slurm.py`; `job.sbatch` is the script that it fills in.
"""
