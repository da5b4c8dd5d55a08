"""The runs of a plan on this machine, as many at a time as there are devices for."""

from __future__ import annotations

import signal
import time
from collections import deque
from collections.abc import Sequence

from largebatch.launch.devices import chosen_gpus, worker_environment
from largebatch.launch.local import Outcome, Started, conclude, start, stop
from largebatch.launch.plan import PlannedRun
from largebatch.launch.view import PlanView

_POLL_SECONDS = 0.05


class StoppedByUser(Exception):
    """A signal asked to stop; the runs that it names were at work, are stopped and can be resumed.

    Attributes:
        number: of the signal.
    """

    def __init__(self, runs: str, number: int) -> None:
        super().__init__(runs)
        self.number = number


def runs_at_a_time(plan: Sequence[PlannedRun]) -> int:
    """``cluster.parallel`` where it is given; else as many as there are GPUs for, or one on CPU. At most all."""
    gpus = len({gpu for chosen in _gpus_by_choice(plan).values() for gpu in chosen})
    needed = [_gpus(run) for run in plan if _gpus(run)]
    most = gpus // min(needed) if needed else 1
    return max(1, min(plan[0].config.cluster.parallel or most, len(plan)))


def carry_out(plan: Sequence[PlannedRun], view: PlanView, asked: list[int]) -> list[Outcome]:
    """Start the runs in their order, each as soon as there are devices for it; one that fails leaves the others alone.

    Args:
        asked: the signals that ask to stop, as they come; another Ctrl-C then doesn't wait for a step's end.

    Raises:
        StoppedByUser: after such a signal, once no process of any run is left.
    """
    parallel = runs_at_a_time(plan)
    waiting, outcomes = deque(plan), []
    by_choice = _gpus_by_choice(plan)
    free = list(dict.fromkeys(gpu for chosen in by_choice.values() for gpu in chosen))
    working: list[tuple[Started, list[str]]] = []  # with their GPUs
    while (waiting or working) and not asked:
        while waiting and len(working) < parallel:
            gpus = _gpus_for(waiting[0], by_choice, free)
            if gpus is None:
                break
            run = waiting.popleft()
            view.begins(run)
            free = [gpu for gpu in free if gpu not in gpus]
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
    if not waiting and not working:
        return outcomes
    at_work = [started for started, _ in working]
    if at_work:
        view.stopping(len(at_work))
        stop(at_work, at_once=lambda: signal.SIGINT in asked[1:])
    raise StoppedByUser(" and ".join(one.run.folder.name for one in at_work) or "where it was", asked[0])


def _gpus_for(run: PlannedRun, by_choice: dict[str, list[str]], free: list[str]) -> list[str] | None:
    """Free GPUs for ``run``: none of them on CPU; None where it has to wait."""
    own = [gpu for gpu in by_choice.get(_choice(run), []) if gpu in free]
    return own[: _gpus(run)] if len(own) >= _gpus(run) else None


def _gpus(run: PlannedRun) -> int:
    """How many GPUs a run needs."""
    cluster = run.config.cluster
    return (cluster.processes or 1) if cluster.device == "cuda" else 0


def _choice(run: PlannedRun) -> str:
    return str(run.config.cluster.devices)


def _gpus_by_choice(plan: Sequence[PlannedRun]) -> dict[str, list[str]]:
    """The GPUs that runs may have, by their ``cluster.devices``; the machine is asked once for each of these."""
    clusters = {_choice(run): run.config.cluster for run in plan if _gpus(run)}
    return {choice: chosen_gpus(cluster) for choice, cluster in clusters.items()}
