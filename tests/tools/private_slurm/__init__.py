"""A real SLURM for tests: ``cluster.py`` brings it up on this machine, and the tests here run on it."""
