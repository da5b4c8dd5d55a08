"""Run folders from outside: status, metrics, logs, cancelling. Never imports torch."""
