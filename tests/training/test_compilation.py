"""Which runs are compiled, and which passes are CUDA graphs: rules on the configuration, the device and the status."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY, configuration

from largebatch.errors import UserError
from largebatch.machine.precision import Arithmetic
from largebatch.runs.folder import RunFolder
from largebatch.tracking.console import Console
from largebatch.training.compilation import multiplications, pays, why_no_graphs
from largebatch.training.facts import gather_facts
from largebatch.training.phase import MainPhase
from largebatch.training.set_up import set_up
from largebatch.training.state import Run

CPU, GPU = torch.device("cpu"), torch.device("cuda")
BT = ("mode=bt", "mode.projector=[12,8]")


def at_start(folder: Path, *overrides: str) -> MainPhase:
    with Console(folder / "log.txt", speaking=True) as console:
        return set_up(configuration(*TINY, "steps=9", *overrides), RunFolder(folder), 0, 1, CPU, console, None)


def on_a_gpu(folder: Path, *overrides: str) -> Run:
    """Return a run as it would be on a GPU; no GPU is used."""
    return replace(at_start(folder, *overrides).run, device=GPU)


def test_only_runs_with_much_to_compute_on_gpus_are_compiled(tmp_path: Path) -> None:
    phase = at_start(tmp_path)
    model, run = phase.training.model, replace(phase.run, device=GPU)  # batches of 16
    steps = math.ceil(2.4e15 / 16 / multiplications(model, run))
    assert pays(replace(run, steps=steps), model, norms=False)
    assert not pays(replace(run, steps=steps - 1), model, norms=False)
    assert not pays(replace(run, steps=steps), model, norms=True)
    assert not pays(replace(run, steps=steps, device=CPU), model, norms=False)


@pytest.mark.parametrize(("mode", "expected"), [((), 1), (BT, 2)])
def test_multiplications_are_those_of_an_image_with_its_views(
    tmp_path: Path, mode: tuple[str, ...], expected: int
) -> None:
    """A grey image of 8x8: two 3x3 convolutions of 8x8 pixels, two of 4x4, and the last layers of the mode."""
    phase = at_start(tmp_path, *mode)
    convolutions = 64 * 9 * (32 + 32 * 32) + 16 * 9 * (32 * 64 + 64 * 64)
    last = 64 * 4 if not mode else 64 * 12 + 12 * 8
    state = {name: tensor.clone() for name, tensor in phase.training.model.state_dict().items()}
    assert multiplications(phase.training.model, phase.run) == expected * (convolutions + last)
    assert all(torch.equal(tensor, state[name]) for name, tensor in phase.training.model.state_dict().items())


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ((), ""),
        (("micro_batch=4",), ""),
        ((*BT, "micro_batch=4"), ""),
        ((*BT, "mode.exact=false"), ""),
        (("deterministic=true",), ""),
        (("micro_batch=auto", "model=smallcnn", "model.norm=batch"), ""),
        (("micro_batch=auto",), "micro_batch=auto"),
        (("cuda_graphs=false",), "cuda_graphs=false"),
        (("profile=true",), "profile=true"),
    ],
    ids=str,
)
def test_passes_that_repeat_are_cuda_graphs(tmp_path: Path, overrides: tuple[str, ...], reason: str) -> None:
    why = why_no_graphs(on_a_gpu(tmp_path, *overrides), norms=False)
    assert why.startswith(reason) if reason else why == ""


def test_the_reasons_of_the_run_s_surroundings(tmp_path: Path) -> None:
    run = on_a_gpu(tmp_path, *BT)
    assert "clars" in why_no_graphs(run, norms=True)
    assert "processes" in why_no_graphs(replace(run, processes=2), norms=False)
    assert "GPU" in why_no_graphs(replace(run, device=CPU), norms=False)
    assert "fp16" in why_no_graphs(replace(run, arithmetic=Arithmetic("fp16", True)), norms=False)


def test_a_run_that_starts_again_is_compiled_as_at_its_first_start(tmp_path: Path) -> None:
    """The status decides, not the rule: here a run that began compiled on a GPU, and one that couldn't be compiled."""
    compiled, uncompiled = tmp_path / "compiled", tmp_path / "uncompiled"
    for folder in (compiled, uncompiled):
        folder.mkdir()
        RunFolder(folder).update_status(compiled=folder == compiled)
    with torch.compiler.set_stance("force_eager"):  # makes a compiled network, but compiles nothing
        began, did_not = at_start(compiled), at_start(uncompiled, "compile=true")
    assert gather_facts(began.run, began.training, 9)["compiled"]
    assert not gather_facts(did_not.run, did_not.training, 9)["compiled"]
    assert "compiled\n" in (compiled / "log.txt").read_text()


def test_the_first_start_is_kept(tmp_path: Path) -> None:
    at_start(tmp_path)
    assert RunFolder(tmp_path).read_status()["compiled"] is False


def test_without_a_compiler_only_compile_true_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("no compiler\nand many more lines")

    monkeypatch.setattr(torch, "compile", no_compiler)
    RunFolder(tmp_path).update_status(compiled=True)
    phase = at_start(tmp_path)
    assert phase.training.network is phase.training.replica
    assert "trains uncompiled (RuntimeError: no compiler)" in (tmp_path / "log.txt").read_text()
    with pytest.raises(UserError, match=r"compile=true: can't compile smallcnn .*Fix: compile=false"):
        at_start(tmp_path, "compile=true")
