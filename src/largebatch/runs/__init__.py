"""Run folders seen from outside: status, metrics, logs, cancelling. Never torch."""
