"""``profile=true`` and ``compile=true``, compiled by the real program."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest
import torch
from conftest import TINY, Launch
from programs import Programs

from largebatch.runs.metrics import read_rows


@pytest.mark.parametrize(("steps", "profiled"), [(20, 10), (5, 2)])
def test_a_profile_has_a_trace_and_a_table(tmp_path: Path, process: Programs, steps: int, profiled: int) -> None:
    run = process.train(tmp_path, *TINY, f"steps={steps}", "profile=true")
    with gzip.open(run / "profile" / "trace.json.gz") as handle:
        events = json.load(handle)["traceEvents"]
    forwards = [event for event in events if event.get("name") == "forward" and event.get("cat") == "user_annotation"]
    assert len(forwards) == profiled
    assert all(event["dur"] > 0 for event in forwards)
    assert any(event.get("name") == "aten::convolution" for event in events)

    table = (run / "profile" / "shares.txt").read_text()
    assert "profiled" in (run / "log.txt").read_text()
    shares = {name: float(share) for name, share in re.findall(r"^(\w+) +[\d.]+ +([\d.]+)%", table, re.MULTILINE)}
    assert set(shares) >= {"data", "forward", "backward", "optimizer", "logging", "evaluation", "other", "all"}
    whole = shares.pop("all")
    assert whole == 100
    assert sum(shares.values()) == pytest.approx(100, abs=0.5)
    assert shares["backward"] > 0


def test_profile_does_not_change_the_run_s_folder(tmp_path: Path, process: Programs) -> None:
    runs = [process.train(tmp_path / choice, *TINY, "steps=4", f"profile={choice}") for choice in ("true", "false")]
    assert runs[0].name == runs[1].name


@pytest.mark.slow
def test_a_compiled_run_trains_the_same_up_to_rounding(launch: Launch, tmp_path: Path, process: Programs) -> None:
    command = (*TINY, "steps=6", "optimizer.lr=0.1")
    result = launch(*command, "compile=true", timeout=250)
    assert result.returncode == 0, result.stdout + result.stderr
    process.train(tmp_path, *command, "compile=false")
    runs = {"compiled" in (run / "log.txt").read_text(): run for run in (tmp_path / "runs").iterdir()}
    assert set(runs) == {True, False}
    models = {
        compiled: torch.load(run / "checkpoints" / "step-00000006.pt", weights_only=True)["model"]
        for compiled, run in runs.items()
    }
    assert models[True].keys() == models[False].keys()
    for name, tensor in models[True].items():
        torch.testing.assert_close(tensor, models[False][name], rtol=1e-4, atol=1e-5)
    rows = {compiled: read_rows(run / "metrics.jsonl")[-1] for compiled, run in runs.items()}
    assert rows[True]["test/loss"] == pytest.approx(rows[False]["test/loss"], rel=1e-4)


def test_compile_true_is_an_error_for_a_run_that_cannot_be_compiled(tmp_path: Path, process: Programs) -> None:
    """Hooks measure the norms of samples, and compiled passes wouldn't call hooks."""
    result = process.call("launch", *TINY, "steps=2", "optimizer=clars", "compile=true", cwd=tmp_path)
    assert result.code == 2
    assert "compile=true" in result.output
    assert "clars" in result.output
