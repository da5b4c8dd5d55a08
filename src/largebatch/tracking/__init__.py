"""Records of a run: metrics files, layer statistics, the console and Weights & Biases."""
