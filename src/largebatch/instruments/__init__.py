"""Measurements of a run that change nothing of the training."""
