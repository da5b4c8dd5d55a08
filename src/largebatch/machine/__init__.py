"""What a run finds out about processes, memory and arithmetic of the machine that it is on."""
