"""Checkpoints: exact during training, complete when the process is killed, and no silent failure."""

from __future__ import annotations

import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from torch import nn
from torch.profiler import ProfilerActivity, profile

from largebatch.training.checkpoint import CheckpointWriter, load_newest, save_checkpoint

CPU = torch.device("cpu")
NAMES = "step-{:08d}.pt"
SLOW = 24_000_000  # fp32 numbers that take at least 0.1 s to write


def writer(folder: Path) -> CheckpointWriter:
    return CheckpointWriter(folder, CPU)


def load(folder: Path) -> dict[str, Any]:
    state = load_newest(folder, CPU, lambda message: pytest.fail(message))
    assert state is not None
    return state


def test_the_newest_two_checkpoints_are_kept_and_a_damaged_one_is_skipped(tmp_path: Path) -> None:
    messages: list[str] = []
    with writer(tmp_path) as checkpoints:
        for step in (9, 10, 100):
            checkpoints.save(step, {"weights": torch.full((3,), float(step))})
    assert sorted(path.name for path in tmp_path.iterdir()) == [NAMES.format(10), NAMES.format(100)]
    newest = tmp_path / NAMES.format(100)
    newest.write_bytes(newest.read_bytes()[:200])
    state = load_newest(tmp_path, CPU, messages.append)
    assert state is not None
    assert state["step"] == 10
    assert torch.equal(state["weights"], torch.full((3,), 10.0))
    assert len(messages) == 1
    assert str(newest) in messages[0]


def test_load_newest_without_checkpoints_returns_none(tmp_path: Path) -> None:
    assert load_newest(tmp_path / "none", CPU, print) is None


def test_changes_after_a_save_do_not_reach_the_checkpoint(tmp_path: Path) -> None:
    """Tensors, lists and dicts change while the thread writes."""
    weights, losses, during = torch.full((SLOW,), 1.0), [0.5], []
    with writer(tmp_path) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, {"weights": weights, "schedule": {"losses": losses}})
            weights += 1
            losses.append(0.25)
            during.append(not (tmp_path / NAMES.format(step)).exists())
    assert any(during), "every write ended before the change"
    for step in (2, 3):
        saved = torch.load(tmp_path / NAMES.format(step), weights_only=True)
        assert saved["step"] == step
        assert torch.equal(saved["weights"], torch.full((SLOW,), float(step)))
        assert saved["schedule"]["losses"] == [0.5, 0.25, 0.25][:step]


def test_save_waits_for_the_previous_write_and_wait_for_the_last(tmp_path: Path) -> None:
    with writer(tmp_path) as checkpoints:
        checkpoints.wait()  # nothing to wait for
        checkpoints.save(1, {"weights": torch.zeros(SLOW)})
        checkpoints.save(2, {"weights": torch.ones(SLOW)})
        assert (tmp_path / NAMES.format(1)).exists()
        checkpoints.wait()
        assert (tmp_path / NAMES.format(2)).exists()


def trained(steps: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Return a small network in channels_last with tied weights, after ``steps`` steps of SGD with momentum."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 4), nn.Linear(8, 4))
    model[4].weight = model[3].weight
    model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(steps):
        features = model[:3](torch.randn(5, 3, 3, 3))
        (model[3](features) + model[4](features)).square().mean().backward()
        optimizer.step()
    return model, optimizer


def assert_same(one: Any, other: Any) -> None:
    """Compare kinds, names, values, types and strides."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
        assert (one.dtype, one.stride(), one.storage_offset()) == (other.dtype, other.stride(), other.storage_offset())
    elif isinstance(one, dict):
        assert list(one) == list(other)
        assert getattr(one, "_metadata", None) == getattr(other, "_metadata", None)
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert one == other


@pytest.mark.filterwarnings("ignore:Validating sparse")
def test_a_model_and_an_optimizer_load_as_from_torch_save(tmp_path: Path) -> None:
    model, optimizer = trained(steps=3)
    base = torch.arange(1000.0)
    state = {
        "model": model.state_dict(), "optimizer": optimizer.state_dict(), "seconds": 1.5, "none": None,
        "views": [base[10:20], base.view(10, 100).t(), (base,)], "whole numbers": torch.tensor(3),
        "empty": (torch.empty(0), torch.empty(0, dtype=torch.int64)), "half": torch.ones(3, dtype=torch.bfloat16),
        "expanded": torch.ones(1).expand(1000), "sparse": torch.eye(3).to_sparse(),
        "conjugate": torch.tensor([1 + 2j]).conj(),
    }  # fmt: skip
    torch.save({"step": 3, **state}, tmp_path / "reference")
    with writer(tmp_path) as checkpoints:
        checkpoints.save(3, state)
    saved, reference = load(tmp_path), torch.load(tmp_path / "reference", weights_only=True)
    sparse, expected = saved.pop("sparse"), reference.pop("sparse")
    assert torch.equal(sparse.to_dense(), expected.to_dense())
    assert_same(saved, reference)
    assert saved["model"]["0.weight"].is_contiguous(memory_format=torch.channels_last)
    views = saved["views"]
    assert {view.untyped_storage().data_ptr() for view in (*views[:2], *views[2])} == {views[2][0].data_ptr()}
    tied = [saved["model"][f"{number}.weight"].data_ptr() for number in (3, 4)]
    assert tied[0] == tied[1]
    size = (tmp_path / NAMES.format(3)).stat().st_size
    assert size == pytest.approx((tmp_path / "reference").stat().st_size, rel=0.02)

    other, its_optimizer = trained(steps=0)
    other.load_state_dict(saved["model"])
    its_optimizer.load_state_dict(saved["optimizer"])
    assert_same(other.state_dict(), model.state_dict())
    assert_same(its_optimizer.state_dict(), optimizer.state_dict())


def test_the_state_may_change_its_sizes_and_types(tmp_path: Path) -> None:
    """An optimizer's state does so at its first step."""
    states: list[dict[str, Any]] = [
        {"weights": torch.ones(5)},
        {"weights": torch.ones(7), "momentum": {0: torch.full((5,), 2.0)}},
        {"momentum": {0: torch.full((5,), 3, dtype=torch.int64)}},
        {},
        {"weights": torch.full((2, 20), 4.0), "momentum": {0: torch.full((5,), 5.0)}},
    ]
    with writer(tmp_path) as checkpoints:
        for step, state in enumerate(states):
            checkpoints.save(step, state)
            checkpoints.wait()
            assert_same(load(tmp_path), {"step": step, **state})


def test_a_save_of_the_same_shapes_allocates_no_memory(tmp_path: Path) -> None:
    state = {"weights": torch.ones(1_000_000), "more": [torch.ones(500_000)]}
    with writer(tmp_path) as checkpoints:
        allocated = []
        for step in (1, 2):
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
                checkpoints.save(step, state)
            allocated.append(sum(max(0, event.self_cpu_memory_usage) for event in record.key_averages()))
    assert allocated[0] >= 6_000_000
    assert allocated[1] < 10_000


def test_only_the_partial_file_of_a_killed_writer_is_removed(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, {"weights": torch.ones(2)})
    (tmp_path / "step-00000002.tmp").write_bytes(b"half")
    (tmp_path / "notes.tmp").write_text("mine")
    with writer(tmp_path):
        assert {path.name for path in tmp_path.iterdir()} == {NAMES.format(1), "notes.tmp"}


# Each line on standard input starts a child, whose process id is printed. The child loads the newest checkpoint and
# saves in a loop. It changes its tensors as soon as a save returns.
SAVING = """
import os, sys
from pathlib import Path
import torch
from largebatch.training.checkpoint import CheckpointWriter, load_newest
device = torch.device("cpu")
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        folder = Path(sys.argv[1])
        saved = load_newest(folder, device, print)
        step = saved["step"] if saved else 0
        tensors = [torch.full((300_000,), float(step)) for _ in range(10)]
        with CheckpointWriter(folder, device) as checkpoints:
            while True:
                step += 1
                for tensor in tensors:
                    tensor.fill_(step)
                checkpoints.save(step, {"tensors": tensors})
    print(child, flush=True)
    os.waitpid(child, 0)
"""


def test_a_process_killed_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    draw = random.Random(0)
    command = [sys.executable, "-c", SAVING, str(tmp_path)]
    kills, half_written, newest = 12, 0, 0
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # a forked child lacks torch's threads
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as parent:
        assert parent.stdin is not None
        assert parent.stdout is not None
        for _ in range(kills):
            print("start", file=parent.stdin, flush=True)
            child = int(parent.stdout.readline())
            last = tmp_path / NAMES.format(newest)
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline and max(tmp_path.glob("*.pt"), default=tmp_path) <= last:
                time.sleep(0.001)
            time.sleep(draw.uniform(0, 0.1))
            os.kill(child, 9)
            while Path(f"/proc/{child}").exists():
                time.sleep(0.001)
            half_written += bool(list(tmp_path.glob("*.tmp")))
            state = load(tmp_path)
            assert state["step"] > newest
            newest = state["step"]
            assert all(bool((tensor == newest).all()) for tensor in state["tensors"])
        parent.stdin.close()
    assert half_written, "no kill happened during a write"


def test_a_normal_exit_during_a_write_waits_for_the_write(tmp_path: Path) -> None:
    """The program doesn't use the writer as a context manager, so only the interpreter waits."""
    program = f"""
import sys, torch
from pathlib import Path
from largebatch.training.checkpoint import CheckpointWriter
folder = Path(sys.argv[1])
CheckpointWriter(folder, torch.device("cpu")).save(7, {{"weights": torch.full(({SLOW},), 7.0)}})
print(list(folder.glob("*.pt")))
"""
    command = [sys.executable, "-c", program, str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stdout) == (0, "[]\n"), result.stderr
    assert bool((load(tmp_path)["weights"] == 7).all())


@pytest.fixture
def full_disk() -> Any:
    """Function that limits all files to 1000 bytes until the test ends."""
    _, hard = before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


STATE = {"weights": torch.ones(1000)}


@pytest.mark.parametrize("where", ["save", "wait", "exit"])
def test_an_error_in_the_thread_is_raised_at_the_next_call(
    tmp_path: Path, full_disk: Callable[[], None], where: str
) -> None:
    checkpoints = writer(tmp_path)
    calls: dict[str, Callable[[], None]] = {
        "save": lambda: checkpoints.save(3, STATE),
        "wait": checkpoints.wait,
        "exit": lambda: checkpoints.__exit__(None, None, None),
    }
    checkpoints.save(1, STATE)
    checkpoints.wait()
    full_disk()
    checkpoints.save(2, STATE)
    with pytest.raises(OSError, match=r"step-00000002\.pt can't be written .*MB are free"):
        calls[where]()
    assert [path.name for path in tmp_path.iterdir()] == [NAMES.format(1)]  # no partial file
    checkpoints.wait()  # the error is raised only once


def train_and_fail(folder: Path, state: dict[str, torch.Tensor]) -> None:
    with writer(folder) as checkpoints:
        checkpoints.save(1, state)
        raise ZeroDivisionError


def test_an_error_in_training_is_raised_with_a_note_on_the_missing_checkpoint(
    tmp_path: Path, full_disk: Callable[[], None]
) -> None:
    full_disk()
    with pytest.raises(ZeroDivisionError) as caught:
        train_and_fail(tmp_path, STATE)
    (note,) = caught.value.__notes__
    assert note.startswith("The last checkpoint is missing too: OSError: ")
    assert "step-00000001.pt" in note


def test_an_error_in_training_waits_for_the_current_write(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        train_and_fail(tmp_path, {"weights": torch.ones(SLOW)})
    assert not hasattr(caught.value, "__notes__")
    assert load(tmp_path)["step"] == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_save_on_a_gpu_only_queues_its_copy_and_is_exact(tmp_path: Path) -> None:
    device = torch.device("cuda")
    weights = torch.full((SLOW,), 1.0, device=device)
    on_host = torch.zeros(3)
    with CheckpointWriter(tmp_path, device) as checkpoints:
        for step in (1, 2):
            torch.cuda._sleep(1_000_000_000)  # clock cycles: half a second of work before the copy
            checkpoints.save(step, {"weights": weights, "on host": on_host})
            weights += 1
            on_host += 1
            if step == 2:  # the first save allocates memory
                assert not torch.cuda.current_stream().query(), "save waited for the device"
            checkpoints.wait()
    for step in (1, 2):
        saved = torch.load(tmp_path / NAMES.format(step), weights_only=True)
        assert saved["weights"].device == CPU
        assert bool((saved["weights"] == step).all())
        assert bool((saved["on host"] == step - 1).all())
    newest = load_newest(tmp_path, device, print)
    assert newest is not None
    assert newest["weights"].is_cuda
