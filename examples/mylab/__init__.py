"""Own classes for largebatch: an optimizer, a model, a data set and a schedule."""
