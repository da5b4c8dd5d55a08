"""Processes, memory and arithmetic of the machine on which a run trains."""
