"""The runs of a plan on this machine, as many at a time as there are devices for."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence

from largebatch.launch.devices import chosen_gpus, worker_environment
from largebatch.launch.local import Outcome, Started, conclude, start, stop
from largebatch.launch.plan import PlannedRun
from largebatch.launch.view import PlanView

_POLL_SECONDS = 0.05


class StoppedByUser(Exception):
    """The user pressed Ctrl-C; the runs that it names were at work, are stopped and can be resumed."""


def runs_at_a_time(plan: Sequence[PlannedRun]) -> int:
    """``cluster.parallel`` where it is given; else as many as there are GPUs for, or one on CPU. At most all."""
    cluster = plan[0].config.cluster
    gpus = len(chosen_gpus(cluster))
    most = gpus // min(run.config.cluster.processes or 1 for run in plan) if gpus else 1
    return max(1, min(cluster.parallel or most, len(plan)))


def carry_out(plan: Sequence[PlannedRun], view: PlanView) -> list[Outcome]:
    """Start the runs in their order, each as soon as there are devices for it; one that fails leaves the others alone.

    Raises:
        StoppedByUser: after Ctrl-C, once no process of any run is left.
    """
    parallel = runs_at_a_time(plan)
    waiting, outcomes = deque(plan), []
    free = chosen_gpus(plan[0].config.cluster)
    working: list[tuple[Started, list[str]]] = []  # with their GPUs
    try:
        while waiting or working:
            while waiting and len(working) < parallel and _gpus(waiting[0]) <= len(free):
                run = waiting.popleft()
                view.begins(run)
                gpus, free = free[: _gpus(run)], free[_gpus(run) :]
                started = start(run, worker_environment(run.config.cluster, gpus, parallel), speaking=parallel == 1)
                if isinstance(started, Started):
                    working.append((started, gpus))
                else:
                    free += gpus
                    outcomes.append(started)
                    view.ended(started)
            view.look([started for started, _ in working])
            time.sleep(_POLL_SECONDS)
            for one in [one for one in working if one[0].child.poll() is not None]:
                working.remove(one)
                free += one[1]
                outcomes.append(conclude(one[0]))
                view.ended(outcomes[-1])
    except KeyboardInterrupt:
        view.stopping(len(working))
        stop([started for started, _ in working])
        raise StoppedByUser(" and ".join(started.run.folder.name for started, _ in working)) from None
    return outcomes


def _gpus(run: PlannedRun) -> int:
    cluster = run.config.cluster
    return (cluster.processes or 1) if cluster.device == "cuda" else 0
