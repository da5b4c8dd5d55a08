"""The one description of every key: types, defaults, checks and a run's identity. Never torch."""
