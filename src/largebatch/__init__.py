"""Compare large-batch optimizers fairly. The optimizers alone: ``from largebatch.optim import LARS, LAMB, TVLARS``."""

__version__ = "0.1.0"
