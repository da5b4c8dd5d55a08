"""Tests on a real SLURM, which ``tests/tools/private_slurm/cluster.py`` starts on this machine."""
