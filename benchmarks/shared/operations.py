"""Number of torch's operations in an action."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Dispatched(TorchDispatchMode):
    """Counts the operations that reach the dispatcher, except views."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not operation.is_view and operation.namespace != "profiler":  # torch.optim marks each step for the profiler
            self.counts[operation.overloadpacket.__name__] += 1
        return operation(*args, **(kwargs or {}))


def operations(action: Callable[[], object]) -> dict[str, int]:
    """Count the operations of an action. Our fused kernels bypass torch's dispatcher and aren't counted.

    Some scalars are on the host even when training on a device: the step counters of AdamW's unfused forms.
    """
    with Dispatched() as mode:
        action()
    reads = mode.counts.pop("_local_scalar_dense", 0)
    return {"operations": mode.counts.total(), "scalar_reads": reads}
