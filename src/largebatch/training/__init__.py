"""Training of one run in a worker process."""
