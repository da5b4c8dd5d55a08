"""Installations that lack an extra, and systems that lack Unix modules: one sentence, or the program goes on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TINY, environment
from runs import the_run
from wheel import PROGRAM, lacking, modules_beyond, own_requirements, with_packages

from largebatch.errors import EXTRAS
from largebatch.runs.folder import RunFolder

RUN = [word for word in TINY if word != "tracker=none"]
SBATCH = "#!/bin/sh\necho submitted >&2\nexit 1\n"


def called(*arguments: str, cwd: Path, path: str = "", python: tuple[str, ...] = ("-m", "largebatch")) -> str:
    """Call the program without what ``lacking`` hides. Return the exit code and the output."""
    env = with_packages(path, ROOT / "src", base=environment())
    env["PATH"] = f"{cwd}:{env['PATH']}"
    command = [sys.executable, *python, *arguments]
    ended = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert "Traceback" not in ended.stdout + ended.stderr, ended.stderr
    return f"{ended.returncode}: {ended.stdout}{ended.stderr}"


def test_the_extras_in_errors_are_those_of_the_project() -> None:
    needed = {extra: own_requirements(extra) - {"argcomplete"} for extra in PROGRAM}
    assert {extra: set(modules) for extra, modules in EXTRAS.items()} == needed


def test_torch_alone_gives_help_and_names_the_extra_of_a_command(tmp_path: Path) -> None:
    path = lacking(tmp_path / "torch_alone", modules_beyond())
    assert called("--help", cwd=tmp_path, path=path).startswith("0: usage: largebatch")
    for command in (["run"], ["run", "--help"], ["run", "-m", "sweeps=demo"], ["report"]):
        said = called(*command, cwd=tmp_path, path=path)
        assert said.startswith("2: error: "), said
        assert said.endswith(" isn't installed. Fix: pip install 'largebatch[train]'\n"), said
        assert said.count("\n") == 1


def test_without_the_wandb_extra_a_run_goes_on_and_says_so_once(tmp_path: Path) -> None:
    path = lacking(tmp_path / "no_wandb", modules_beyond("train"))
    said = called("run", *RUN, "steps=2", cwd=tmp_path, path=path)
    assert said.startswith("0: "), said
    assert said.count("tracker=wandb is off: wandb isn't installed. Fix: pip install 'largebatch[wandb]'\n") == 1
    assert "W&B" not in said
    folder = RunFolder(the_run(tmp_path))
    assert folder.state() == "finished"
    assert folder.metrics_table.exists()

    said = called("run", *RUN, "steps=3", "tracker=tensorboard", "runs_dir=more", cwd=tmp_path, path=path)
    assert said.startswith("0: "), said
    fix = "tensorboard isn't installed. Fix: pip install 'largebatch[tensorboard]'"
    assert said.count(f"tracker=tensorboard is off: {fix}\n") == 1

    def refused(*command: str) -> str:
        said = called(*command, cwd=tmp_path, path=path)
        assert said.startswith("2: "), said
        return said.splitlines()[-1]

    assert refused("sync", "runs").endswith("wandb isn't installed. Fix: pip install 'largebatch[wandb]'")
    assert refused("report", "runs").endswith("plotly isn't installed. Fix: pip install 'largebatch[report]'")
    refusal = refused("run", *TINY, "optimizer=soap")
    assert refusal.endswith("pytorch_optimizer isn't installed. Fix: pip install 'largebatch[optimizers]'")
    assert refused("dashboard", "--entity", "team", "--print").endswith("Fix: pip install 'largebatch[wandb]'")
    (tmp_path / "sbatch").write_text(SBATCH)
    (tmp_path / "sbatch").chmod(0o755)
    slurm = "submitit isn't installed. Fix: pip install 'largebatch[slurm]'"
    assert refused("run", *TINY, "steps=3", "cluster=slurm").endswith(slurm)
    assert refused("run", *TINY, "steps=3", "cluster=slurm", "dry_run=true").endswith(slurm)
    assert the_run(tmp_path)  # no folder was left of the run that wasn't submitted


# Windows, where the optimizers work and the rest is refused in a sentence.

UNIX_MODULES = {"fcntl", "resource", "termios", "pwd", "grp", "pty", "tty", "syslog"}
UNIX_ATTRIBUTES = (
    *("signal.SIGHUP", "signal.SIGUSR1", "signal.SIGUSR2", "signal.SIGKILL"),
    *("os.fork", "os.geteuid", "os.sched_getaffinity", "os.sysconf", "os.killpg", "os.setsid"),
)
OPTIMIZE = """
import torch
from largebatch.optim import CLARS, LAMB, LARS, TVLARS

for build in (LARS, TVLARS, LAMB):
    layer = torch.nn.Linear(3, 2)
    optimizer = build(layer.named_parameters(), lr=0.1)
    layer(torch.randn(4, 3)).sum().backward()
    before = layer.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(before, layer.weight)
LARS(layer.named_parameters(), lr=0.1, fused=True).step()
print("trained")
"""


@pytest.fixture(scope="module")
def windows(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a folder for PYTHONPATH that hides what Windows' Python lacks."""
    return lacking(tmp_path_factory.mktemp("windows") / "hidden", UNIX_MODULES, UNIX_ATTRIBUTES)


def test_the_optimizers_need_no_unix_modules(windows: str, tmp_path: Path) -> None:
    said = called(cwd=tmp_path, path=windows, python=("-c", OPTIMIZE))
    assert said.startswith("0: "), said
    assert "compiling needs Linux or macOS" in said
    assert "\ntrained\n" in said.replace(": ", "\n", 1)


def test_the_program_is_refused_without_unix_modules(windows: str, tmp_path: Path) -> None:
    for command in (["run"], ["status"], ["--help"]):
        said = called(*command, cwd=tmp_path, path=windows)
        assert said.startswith("2: error: largebatch: runs need Linux or macOS"), said
        assert said.count("\n") == 1


@pytest.mark.slow
def test_a_run_needs_no_function_that_macos_lacks(tmp_path: Path) -> None:
    path = lacking(tmp_path / "macos", set(), ("os.sched_getaffinity", "os.memfd_create"))
    said = called("run", *TINY, "steps=2", cwd=tmp_path, path=path)
    assert said.startswith("0: "), said
    assert RunFolder(the_run(tmp_path)).state() == "finished"
