"""What a run writes down: metric files, per-layer statistics, the console, Weights & Biases."""
