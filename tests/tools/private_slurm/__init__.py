"""A real SLURM for tests, which ``cluster.py`` starts on this machine."""
