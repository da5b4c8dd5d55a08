"""Runs of the real program in surroundings that should not matter: variables, modules, devices and output."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TINY, environment
from runs import the_run

from largebatch.config.schema import ClusterConfig
from largebatch.errors import UserError
from largebatch.launch.devices import chosen_gpus
from largebatch.runs.folder import RunFolder

pytestmark = pytest.mark.slow

SHORT = (*TINY, "steps=2")


def launched(folder: Path, *overrides: str, **popen: object) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, str(ROOT / "launch.py"), *SHORT, *overrides]
    options = {"cwd": folder, "env": environment(), "capture_output": True, "timeout": 120, **popen}
    return subprocess.run(command, check=False, **options)  # type: ignore[call-overload,no-any-return]


def state(folder: Path) -> str | None:
    return RunFolder(the_run(folder)).state()


OUTER = {
    "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1", "MASTER_PORT": "1",
    "MASTER_ADDR": "no-such-host", "PET_NNODES": "2", "PET_NODE_RANK": "1", "PET_MASTER_ADDR": "no-such-host",
    "TORCHELASTIC_RUN_ID": "outer", "TORCHELASTIC_RESTART_COUNT": "3",
}  # fmt: skip


@pytest.mark.parametrize("processes", [1, 2])
def test_an_outer_launcher_s_variables_change_nothing(tmp_path: Path, processes: int) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    variables = {**environment(), **OUTER, "TMPDIR": str(temporary)}
    run = launched(tmp_path, f"cluster.processes={processes}", env=variables)
    assert run.returncode == 0, run.stderr
    assert state(tmp_path) == "finished"
    assert not list(temporary.glob("torchelastic*"))


def test_modules_in_the_working_directory_replace_none(tmp_path: Path) -> None:
    for name in ("random", "queue", "argparse", "yaml", "torch", "hydra", "wandb"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('shadowed')\n")
    run = launched(tmp_path, "tracker=wandb", "tracker.mode=offline", "cluster.processes=2")
    assert run.returncode == 0, run.stderr
    assert b"W&B offline" in run.stdout


def test_a_module_in_the_working_directory_is_found(tmp_path: Path) -> None:
    """A codec is imported by its name: here the one that Python needs for the output."""
    (tmp_path / "of_the_user.py").write_text("print('of the user')\n")
    program = "import runpy, sys; sys.argv = ['launch.py', '--help']; runpy.run_path(r'%s'); import of_the_user"
    run = subprocess.run(
        [sys.executable, "-P", "-c", program % (ROOT / "launch.py")], cwd=tmp_path, env=environment(), text=True,
        capture_output=True, check=True,
    )  # fmt: skip
    assert "of the user" in run.stdout


@pytest.mark.usefixtures("four_gpus")
@pytest.mark.parametrize(
    ("visible", "gpus"),
    [
        ("NoDevFiles", []), ("", []), ("-1", []), ("1, 3", ["1", "3"]), ("2,4,0", ["2"]), ("7", []),
        ("GPU-00000002", ["GPU-00000002"]), ("GPU-1,0", []),
    ],
)  # fmt: skip
def test_cuda_visible_devices_counts_up_to_the_first_gpu_that_is_missing(
    monkeypatch: pytest.MonkeyPatch, visible: str, gpus: list[str]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert chosen_gpus(ClusterConfig(name="local")) == gpus


@pytest.mark.usefixtures("four_gpus")
def test_a_device_among_missing_gpus_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "NoDevFiles")
    with pytest.raises(UserError, match=r"cluster.devices=\[0\]: 0 GPU"):
        chosen_gpus(ClusterConfig(name="local", devices=[0]))


@pytest.mark.parametrize("output", ["reader ends", "closed", "full"])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_finishes_without_its_output(tmp_path: Path, output: str, processes: int) -> None:
    program = f"{sys.executable} {ROOT / 'launch.py'} {' '.join(SHORT)} cluster.processes={processes}"
    command = {
        "reader ends": f"({program}; echo $? >code) | head -1",
        "closed": f"{program} >&- 2>&-; echo $? >code",
        "full": f"{program} >/dev/full 2>/dev/full; echo $? >code",
    }[output]
    subprocess.run(command, shell=True, cwd=tmp_path, env=environment(), capture_output=True, timeout=120, check=True)
    assert (tmp_path / "code").read_text() == "0\n"
    assert state(tmp_path) == "finished"
    assert "finished after step 2 of 2" in (the_run(tmp_path) / "log.txt").read_text()


def test_an_output_without_umlauts_shows_a_path_with_them(tmp_path: Path) -> None:
    variables = {**environment(), "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    run = launched(tmp_path, "runs_dir='B\u00fccher/runs'", "tracker.notes='\u2264'", env=variables)
    assert run.returncode == 0, run.stderr
    assert "B\u00fccher".encode() in run.stdout
    (folder,) = (tmp_path / "B\u00fccher" / "runs").iterdir()
    assert "\u00fccher" in (folder / "config.yaml").read_text(encoding="utf-8")
    report = subprocess.run(
        [sys.executable, "-m", "largebatch.cli", "report", os.fsencode(folder.parent), "--out", "-", "--format", "md"],
        cwd=tmp_path, env=variables, capture_output=True, check=False,
    )  # fmt: skip
    assert report.returncode == 0, report.stderr
    assert b"left out" not in report.stderr


def test_an_output_in_ascii_escapes_other_characters(tmp_path: Path) -> None:
    run = launched(tmp_path, "runs_dir='B\u00fccher/runs'", env={**environment(), "PYTHONIOENCODING": "ascii"})
    assert run.returncode == 0, run.stderr
    assert b"B\\xfccher" in run.stdout


def test_without_a_folder_for_temporary_files_one_message_names_the_variable(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import tempfile\ntempfile._candidate_tempdir_list = lambda: ['/nonexistent']\n"
    )
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    run = launched(tmp_path, env={**environment(), "PYTHONPATH": path})
    assert run.returncode == 2
    assert run.stderr.startswith(b"error: TMPDIR: No usable temporary directory")
    assert run.stderr.count(b"\n") == 1


def test_names_that_are_too_long_are_cut_or_refused(tmp_path: Path) -> None:
    from PIL import Image

    root = tmp_path / ("photos" * 40)
    for part in ("train", "test"):
        for label in ("cat", "dog"):
            (root / part / label).mkdir(parents=True)
            for number in range(4):
                Image.new("RGB", (8, 8), (number, 0, 0)).save(root / part / label / f"{number}.png")
    data = ("dataset=imagefolder", f"dataset.root={root}", "dataset.image_size=8", "batch_size=4", "tracker=none")
    command = [sys.executable, str(ROOT / "launch.py"), *data, "steps=1"]
    options = {"cwd": tmp_path, "env": environment(), "capture_output": True, "text": True, "timeout": 120}
    run = subprocess.run(command, check=False, **options)  # type: ignore[call-overload]
    assert run.returncode == 0, run.stderr
    assert the_run(tmp_path).name.startswith("photos" * 6)
    assert len(the_run(tmp_path).name) < 143
    refused = subprocess.run([*command, f"runs_dir={'x' * 300}"], check=False, **options)  # type: ignore[call-overload]
    assert refused.returncode == 2
    assert "File name too long" in refused.stderr
    assert "Traceback" not in refused.stderr
