"""Compare run folders: the report, its exports and the W&B dashboard. Imports no torch."""
