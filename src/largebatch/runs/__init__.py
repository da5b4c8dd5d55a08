"""Run folders: status, metrics, logs, cancelling. Never imports torch."""
