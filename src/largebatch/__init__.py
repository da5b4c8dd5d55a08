"""Compare large-batch optimizers fairly. The optimizers alone: ``from largebatch.optim import LARS, LAMB, TVLARS``.

The result of a run: ``from largebatch import load_run``.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from largebatch.results.run import load_run

__all__ = ["load_run"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import ``load_run`` at its first use, because it needs torch and the packages of training."""
    if name == "load_run":
        from largebatch.results.run import load_run

        return load_run
    raise AttributeError(f"module 'largebatch' has no attribute {name!r}")
