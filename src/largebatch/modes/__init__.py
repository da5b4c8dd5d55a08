"""Models, losses and evaluations of the modes; no loops."""
