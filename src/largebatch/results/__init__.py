"""A run's result in use: its weights in Python, exports, evaluations and predictions."""
