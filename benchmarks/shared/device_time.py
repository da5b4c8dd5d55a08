"""Device time of a step by CUDA graphs, and its calls of the CUDA runtime."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

_STEPS = 4  # in a graph, so that the replay's own start hardly counts
_CLEARED = 1 << 26  # fp32 numbers, 256 MiB: more than any GPU's cache


def event_seconds(action: Callable[[], object]) -> float:
    """Return the seconds from the first kernel's start to the last kernel's end."""
    started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    started.record()
    action()
    ended.record()
    torch.cuda.synchronize()
    return started.elapsed_time(ended) / 1000


def device_seconds(step: Callable[[], object], repeats: int) -> list[float]:
    """Return the seconds of a step in a replayed graph; empty if the step can't be captured.

    The cache is cleared before each step, as a training step's activations do.
    """
    numbers = torch.zeros(_CLEARED, device="cuda")

    def clear() -> None:
        numbers.add_(1.0)

    def clear_and_step() -> None:
        clear()
        step()

    try:
        both = _graph(clear_and_step)
    except (RuntimeError, UserWarning) as error:  # a warning that it is no fused step
        print(f"a step can't be captured: {str(error).splitlines()[0]}")
        torch.cuda.synchronize()
        return []
    alone = _graph(clear)
    times = [(event_seconds(both.replay), event_seconds(alone.replay)) for _ in range(repeats + 1)]
    return [(with_step - without) / _STEPS for with_step, without in times[1:]]


def _graph(action: Callable[[], object]) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            action()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_STEPS):
            action()
    return graph


def cuda_calls(action: Callable[[], object]) -> dict[str, int]:
    """Count kernel launches and waits for the device, without the profiler's own, by its calls of the CUDA runtime."""
    of_nothing, of_action = _profiled_nothing(), _profiled(action)
    return {key: of_action[key] - of_nothing[key] for key in of_action}


@functools.cache
def _profiled_nothing() -> dict[str, int]:
    return _profiled(lambda: None)


def _profiled(action: Callable[[], object]) -> dict[str, int]:
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        action()
    counts = {"launches": 0, "synchronisations": 0}
    for event in profile.key_averages():
        if event.key.startswith(("cudaLaunchKernel", "cuLaunchKernel")):
            counts["launches"] += event.count
        elif event.key.startswith(("cuda", "cu")) and event.key.endswith("Synchronize"):
            counts["synchronisations"] += event.count
    return counts
