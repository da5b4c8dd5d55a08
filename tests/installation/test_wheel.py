"""The installed wheel in an empty folder, without a checkout."""

from __future__ import annotations

import filecmp
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TINY, environment
from runs import the_run
from wheel import with_packages

import largebatch
from largebatch.runs.folder import RunFolder
from largebatch.runs.provenance import code_hash

Completed = subprocess.CompletedProcess[str]


def called(*command: str, cwd: Path, env: dict[str, str]) -> Completed:
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=240, check=False)


def largebatch_(installed: Path, *arguments: str, cwd: Path, **variables: str) -> Completed:
    """Call the installed ``largebatch``."""
    env = with_packages(installed, base=environment()) | variables
    return called(str(installed / "bin" / "largebatch"), *arguments, cwd=cwd, env=env)


def test_the_wheel_holds_the_presets_and_sweeps_of_the_repository(installed: Path) -> None:
    def files(folder: Path) -> list[str]:
        return sorted(str(path.relative_to(folder)) for path in folder.resolve().rglob("*.yaml"))

    conf = installed / "largebatch" / "conf"
    names = [str(path.relative_to(conf)) for path in conf.rglob("*") if path.is_file()]
    of_the_repository = {*files(ROOT / "conf"), *(f"sweeps/{name}" for name in files(ROOT / "sweeps"))}
    assert set(names) == of_the_repository
    assert "sweeps/wandb/digits_tvlars.yaml" in names
    assert filecmp.cmpfiles(ROOT / "conf", conf, names, shallow=False)[1:] == ([], [])


def test_the_installed_program_trains_reports_and_repeats_a_run(installed: Path, tmp_path: Path) -> None:
    run = largebatch_(installed, "run", *TINY, "steps=4", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    folder = the_run(tmp_path)
    assert RunFolder(folder).state() == "finished"
    assert (folder / "metrics.parquet").exists()

    again = largebatch_(installed, "run", *TINY, "steps=4", cwd=tmp_path)
    assert re.search("finished before, test accuracy .*; not repeated", again.stdout), again.stderr
    status = largebatch_(installed, "status", cwd=tmp_path)
    assert folder.name in status.stdout, status.stderr
    report = largebatch_(installed, "report", "runs", cwd=tmp_path)
    assert report.returncode == 0, report.stderr
    assert "plotly" in (tmp_path / "report.html").read_text()
    confirm = largebatch_(installed, "confirm", "runs", "--seeds", "2", "--dry-run", cwd=tmp_path)
    assert "2 run(s)" in confirm.stdout, confirm.stderr
    replay = largebatch_(installed, "replay", folder.name, cwd=tmp_path)
    assert "are equal, bit for bit" in replay.stdout, replay.stderr


def test_python_m_largebatch_is_the_command(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "random.py").write_text("raise SystemExit('shadowed')\n")
    env = with_packages(installed, base=environment())
    command = [sys.executable, "-m", "largebatch"]
    assert called(*command, "--version", cwd=tmp_path, env=env).stdout == f"largebatch {largebatch.__version__}\n"
    plan = called(*command, "run", "-m", "sweeps=demo", "dry_run=true", cwd=tmp_path, env=env)
    assert plan.stdout.startswith("6 run(s): 6 new"), plan.stderr
    mistake = called(*command, "run", "sweeps=demo", cwd=tmp_path, env=env)
    assert "Fix: largebatch run -m sweeps=demo" in mistake.stderr
    assert mistake.returncode == 2


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the repository with an edited preset: LARS has the learning rate 7.25."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("conf", "sweeps", "src"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "launch.py", folder)
    preset = folder / "conf" / "optimizer" / "lars.yaml"
    edited = [line if not line.startswith("lr:") else "lr: 7.25" for line in preset.read_text().splitlines()]
    preset.write_text("\n".join(edited) + "\n")
    return folder


SHOW = ("--cfg", "job", "-p", "optimizer")


@pytest.mark.parametrize("command", ["launch.py", "largebatch run"])
def test_a_checkout_uses_its_own_presets_beside_an_installed_copy(
    installed: Path, checkout: Path, command: str
) -> None:
    if command == "launch.py":
        env = with_packages(installed, base=environment())
        shown = called(sys.executable, "launch.py", *SHOW, cwd=checkout, env=env)
    else:
        shown = largebatch_(installed, "run", *SHOW, cwd=checkout)
    assert "lr: 7.25" in shown.stdout, shown.stderr


def test_a_checkout_s_launcher_runs_the_code_of_the_checkout(installed: Path, checkout: Path, tmp_path: Path) -> None:
    """The processes that it starts do so too, from another folder and beside an installed package."""
    env = with_packages(installed, base=environment())
    worker = checkout / "src" / "largebatch" / "training" / "worker.py"
    original = worker.read_text()
    worker.write_text(original + "\n# edited\n")
    (checkout / "src" / "largebatch" / "__init__.py").open("a").write("print('code of the checkout')\n")
    try:
        run = called(sys.executable, str(checkout / "launch.py"), *TINY, "steps=1", cwd=tmp_path, env=env)
    finally:
        worker.write_text(original)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("code of the checkout") == 2  # launcher and worker


def test_slurm_s_copy_of_an_installed_package_is_that_of_a_checkout(installed: Path, tmp_path: Path) -> None:
    """The copy has no presets, which a job doesn't read, so its hash is the checkout's."""
    program = "from largebatch.runs.provenance import copy_code; print(copy_code('code'))"
    program = program.replace("'code'", "__import__('pathlib').Path('code')")
    env = with_packages(installed, base=environment())
    made = called(sys.executable, "-P", "-c", program, cwd=tmp_path, env=env)
    assert made.stdout == f"code/{code_hash()}\n", made.stderr
    assert not (tmp_path / "code" / code_hash() / "largebatch" / "conf").exists()
    job = called(
        sys.executable, "-P", "-c", "import largebatch.launch.slurm_task as task; print(task.__file__)", cwd=tmp_path,
        env=with_packages(tmp_path / "code" / code_hash(), base=environment()),
    )  # fmt: skip
    assert job.stdout.startswith(str(tmp_path / "code")), job.stderr


def test_uvx_runs_the_wheel(wheel: Path, tmp_path: Path) -> None:
    """The environment that uvx makes has the wheel alone; its dependencies come from the tests' environment."""
    uvx = shutil.which("uvx", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if uvx is None:
        pytest.skip("no uvx here")
    none = tmp_path / "overrides.txt"
    none.write_text('torch; python_version < "3"\n')
    packages = next(entry for entry in sys.path if (Path(entry) / "torch").is_dir())
    env = with_packages(base=environment())
    env |= {
        "PYTHONPATH": os.pathsep.join(filter(None, [env["PYTHONPATH"], packages])),
        "UV_CACHE_DIR": str(tmp_path / "uv"),
    }
    command = [
        uvx,
        "--offline",
        "--no-config",
        "--python",
        sys.executable,
        "--overrides",
        str(none),
        "--from",
        str(wheel),
    ]
    empty = tmp_path / "empty"
    empty.mkdir()
    run = called(*command, "largebatch", "run", *TINY, "steps=1", cwd=empty, env=env)
    assert run.returncode == 0, run.stderr
    assert RunFolder(the_run(empty)).state() == "finished"
