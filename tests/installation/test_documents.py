"""Files beside the package: the notebook runs, the Dockerfile copies what exists, the changes name the version."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, environment
from wheel import EXTRAS, PROJECT, with_packages

import largebatch

NOTEBOOK = ROOT / "examples" / "compare_optimizers.ipynb"


@pytest.mark.slow
def test_the_cells_of_the_notebook_run_in_order_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    notebook = json.loads(NOTEBOOK.read_text())
    assert notebook["nbformat"] == 4
    code = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell.get("outputs", []) == [] for cell in notebook["cells"])  # a diff shows the source alone
    ended = subprocess.run(
        [sys.executable, "-"], input="\n".join(code), cwd=tmp_path, env=with_packages(installed, base=environment()),
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("test accuracy") >= 2
    assert "train/loss" in ended.stdout
    assert re.search(r"loss \d.\d+ before, 0.\d+ after 200 steps", ended.stdout), ended.stdout


def instructions() -> list[tuple[str, str]]:
    """Return the Dockerfile's instructions and their arguments."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


def test_the_dockerfile_copies_all_that_the_package_is_built_from() -> None:
    found = instructions()
    assert found[0][0] == "FROM"
    assert re.fullmatch(r"python:3\.\d+-slim", found[0][1])
    assert {name for name, _ in found} <= {"FROM", "RUN", "WORKDIR", "COPY", "ENTRYPOINT", "CMD"}
    copied = {source for name, rest in found if name == "COPY" for source in rest.split()[:-1]}
    assert all((ROOT / source).exists() for source in copied)
    wheel = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {*(Path(path).parts[0] for path in wheel["packages"]), *wheel["force-include"]}
    project = PROJECT["project"]
    links = {path.resolve().relative_to(ROOT).parts[0] for path in (ROOT / "conf").iterdir()}
    assert needed | links | {project["readme"], *project["license-files"], "pyproject.toml"} <= copied


def test_the_dockerfile_s_commands_are_valid() -> None:
    found = instructions()
    for name, rest in found:
        if name == "RUN":
            assert subprocess.run(["sh", "-n", "-c", rest], check=False).returncode == 0, rest
        if name in ("ENTRYPOINT", "CMD"):
            assert all(isinstance(word, str) for word in json.loads(rest))
    (install,) = [shlex.split(rest) for name, rest in found if name == "RUN" and rest.startswith("pip ")]
    extra = re.fullmatch(r"\.\[(\w+)\]", install[-1])
    assert extra
    assert extra[1] in EXTRAS
    (entry,) = [json.loads(rest) for name, rest in found if name == "ENTRYPOINT"]
    assert entry[0] in PROJECT["project"]["scripts"]


def test_the_changes_begin_with_the_version() -> None:
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert headings[0] == largebatch.__version__
