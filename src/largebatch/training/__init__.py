"""What happens in a worker process."""
