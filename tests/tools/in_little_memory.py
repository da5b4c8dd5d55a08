"""``micro_batch=auto``: the search for a size that fits, and steps that run out of memory (by ``ulimit -v``).

test_memory.py starts these tests.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet  # noqa: F401  (runs import it at their end, and torch.optim.SGD torch._dynamo: memory_left has no room)
import pytest
import torch
import torch._dynamo
from conftest import ROOT, TINY, configuration, environment

from largebatch.errors import UserError
from largebatch.machine.memory import free_memory, host_memory, is_out_of_memory
from largebatch.runs.folder import RunFolder
from largebatch.tracking.console import Console
from largebatch.training.loop import Session, loop
from largebatch.training.micro_batch import smaller_micro_batch
from largebatch.training.phase import MainPhase
from largebatch.training.probe import ProbePhase
from largebatch.training.profile import StepClock
from largebatch.training.set_up import set_up
from largebatch.training.state import Training
from largebatch.training.stop import StepBoundary

MIB = 1 << 20
CPU = torch.device("cpu")
# A pass of the whole batch needs about 400 MiB; one map of 512 x 32 x 32 x 32 takes 64 MiB.
WIDE = (
    "dataset=synthetic", "dataset.train_size=512", "dataset.test_size=512", "dataset.image_size=32",
    "dataset.num_classes=4", "batch_size=512", "tracker=none", "steps=1",
)  # fmt: skip


@contextmanager
def memory_left(size: int) -> Iterator[None]:
    """Let this process allocate only ``size`` more bytes."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def a_run(folder: Path, *overrides: str) -> MainPhase:
    folder.mkdir(exist_ok=True)
    with Console(folder / "log.txt", speaking=False) as console:
        return set_up(configuration(*WIDE, *overrides), RunFolder(folder), 0, 1, CPU, console, None)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Use one thread: with other work on the cores, threads of a small network mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def one_gradient(phase: MainPhase) -> torch.Tensor | None:
    return phase.gradient(phase.batches())


def test_a_failed_allocation_is_distinguished_from_other_errors() -> None:
    with memory_left(64 * MIB), pytest.raises(RuntimeError) as failed:
        torch.empty(1 << 30)
    assert is_out_of_memory(failed.value)
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_free_memory_respects_the_process_s_own_limit() -> None:
    assert 0 < free_memory(CPU) == pytest.approx(host_memory(), rel=0.2)
    with memory_left(300 * MIB):
        assert host_memory() == pytest.approx(300 * MIB, abs=20 * MIB)


def test_the_whole_share_is_used_if_it_fits(tmp_path: Path) -> None:
    run = a_run(tmp_path, "micro_batch=auto").run
    assert (run.batch.micro_batch, run.batch.accumulation) == (512, 1)


def test_the_size_found_in_little_memory_fits(tmp_path: Path) -> None:
    with memory_left(300 * MIB):
        phase = a_run(tmp_path, "micro_batch=auto")
        run = phase.run
        assert 8 <= run.batch.micro_batch < 512
        finite = one_gradient(phase)
    assert finite is not None
    assert phase.run == run


def test_a_step_that_runs_out_of_memory_is_repeated_exactly(tmp_path: Path) -> None:
    """Gradients, running statistics and totals equal those of a run with the smaller micro-batches."""
    phase = a_run(tmp_path / "short", "micro_batch=auto")
    assert phase.run.batch.micro_batch == 512
    tried = []
    with memory_left(150 * MIB):
        finite = None
        while finite is None:
            tried.append(phase.run.batch.micro_batch)
            finite = one_gradient(phase)
    assert len(tried) > 1
    assert tried == [512 >> n for n in range(len(tried))]

    plain = a_run(tmp_path / "plain", f"micro_batch={tried[-1]}")
    one_gradient(plain)
    assert bool(finite)
    assert torch.equal(phase.training.unlogged.totals, plain.training.unlogged.totals)
    assert_same_gradients_and_statistics(phase.training, plain.training)


def assert_same_gradients_and_statistics(one: Training, other: Training) -> None:
    for (name, ours), theirs in zip(one.model.named_parameters(), other.model.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert torch.equal(ours.grad, theirs.grad), name
    for ours, theirs in zip(one.model.buffers(), other.model.buffers(), strict=True):
        assert torch.equal(ours, theirs)


# Two views of an image take twice the memory of one view.
FEWER = ("mode=bt", "dataset.train_size=256", "batch_size=256")


def test_a_barlow_twins_step_that_runs_out_of_memory_is_repeated_exactly(tmp_path: Path) -> None:
    phase = a_run(tmp_path / "short", *FEWER, "micro_batch=auto")
    assert phase.run.batch.micro_batch == 256
    tried, finite = [], None
    with memory_left(150 * MIB):
        while finite is None:
            tried.append(phase.run.batch.micro_batch)
            finite = one_gradient(phase)
    assert len(tried) > 1
    assert tried == [256 >> n for n in range(len(tried))]

    plain = a_run(tmp_path / "plain", *FEWER, f"micro_batch={tried[-1]}")
    one_gradient(plain)
    assert bool(finite)
    assert torch.equal(phase.training.unlogged.totals, plain.training.unlogged.totals)
    assert_same_gradients_and_statistics(phase.training, plain.training)


def test_the_probe_uses_the_micro_batches_of_pretraining(tmp_path: Path) -> None:
    probe = ("mode.eval_batch_size=256", "mode.eval_epochs=1", "mode.lr_backbone=0.01", "mode.knn_every=0")
    phase = a_run(tmp_path, *FEWER, *probe, "micro_batch=auto")
    with Console(tmp_path / "log.txt", speaking=False) as console, memory_left(150 * MIB):
        session = Session(None, None, StepClock(0.0, CPU), console, StepBoundary(3600.0, None, rank=0))
        assert loop(phase, session)[0] == "finished"
        assert phase.run.batch.micro_batch < 256
        following = phase.following()
        assert isinstance(following, ProbePhase)
        assert following.batch.micro_batch == phase.run.batch.micro_batch
        assert loop(following, session) == ("finished", "")


def test_without_auto_the_error_is_raised(tmp_path: Path) -> None:
    phase = a_run(tmp_path)
    with memory_left(100 * MIB), pytest.raises(RuntimeError, match="can't allocate memory"):
        one_gradient(phase)


def test_evaluation_uses_smaller_batches_if_memory_is_short(tmp_path: Path) -> None:
    phase = a_run(tmp_path, "micro_batch=auto")
    expected = phase.evaluate()
    with memory_left(100 * MIB):  # enough for oneDNN's code, without which it fails for good
        assert phase.evaluate() == pytest.approx(expected, rel=1e-5)


def test_smaller_micro_batches_divide_the_share_and_hold_whole_groups(tmp_path: Path) -> None:
    run = a_run(tmp_path, "batch_size=360", "micro_batch=90").run
    assert smaller_micro_batch(run.batch) == 45
    assert smaller_micro_batch(replace(run.batch, together=4)) == 40
    with pytest.raises(UserError, match="the smallest size"):
        smaller_micro_batch(replace(run.batch, together=90))


def test_with_batch_norm_auto_keeps_the_size_or_is_an_error(tmp_path: Path) -> None:
    """Another size would be another training."""
    phase = a_run(tmp_path, "model.norm=batch", "micro_batch=auto", "batch_norm_size=256")
    assert (phase.run.batch.micro_batch, phase.run.batch.accumulation) == (256, 2)
    with memory_left(100 * MIB), pytest.raises(RuntimeError, match="can't allocate memory"):
        one_gradient(phase)
    with memory_left(100 * MIB), pytest.raises(UserError, match=r"^batch_norm_size=512: .* sync_bn=true on more"):
        a_run(tmp_path, "model.norm=batch", "micro_batch=auto")


def test_host_memory_does_not_grow_over_2000_steps(tmp_path: Path, one_thread: None) -> None:
    config = configuration(*TINY, "steps=2400", "tracker.log_every=50", "tracker.layers_every=0", "eval_every=1000")
    with Console(tmp_path / "log.txt", speaking=False) as console:
        phase = set_up(config, RunFolder(tmp_path), 0, 1, CPU, console, None)
        boundary, resident = StepBoundary(3600.0, None, rank=0), []
        for steps in (400, 2400):
            phase.end = steps
            loop(phase, Session(None, None, StepClock(0.0, CPU), console, boundary))
            resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize())
    assert resident[1] - resident[0] < 4 * MIB


def test_all_processes_follow_one_that_runs_out_of_memory(tmp_path: Path) -> None:
    """Rank 1 of two runs out of memory at step 2; both continue with half the micro-batch, and the run finishes."""
    script = ROOT / "tests" / "tools" / "short_of_memory.py"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    path = os.pathsep.join(str(ROOT / folder) for folder in ("src", "tests"))
    variables = environment() | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    result = subprocess.run(
        [*torchrun, str(tmp_path)], env=variables, capture_output=True, text=True, timeout=200, check=False
    )
    assert result.returncode == 0, result.stderr
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "out of memory at step 2: continuing with micro-batches of 128" in log
    assert "finished after step 4 of 4" in log
