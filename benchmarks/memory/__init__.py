"""What a process holds in memory, measured, and against what `lopt-pp plan` says."""
