"""The project's wheel, installed without its dependencies, and environments that lack modules."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS: dict[str, list[str]] = PROJECT["project"]["optional-dependencies"]
# Extras of the program; the others are for its development.
PROGRAM = ("train", "wandb", "tensorboard", "trackio", "report", "slurm", "export", "optimizers")

# Hide modules, whoever would find them, and attributes of modules.
_HIDE = """
import sys


class Hiding:
    def __init__(self, finder):
        self._finder = finder

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {modules}:
            return None
        return self._finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self._finder, name)


sys.meta_path[:] = [Hiding(finder) for finder in sys.meta_path]
for name in {attributes}:
    module, _, attribute = name.partition(".")
    delattr(__import__(module), attribute)
"""


def build_wheel(folder: Path) -> Path:
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "-w", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", str(ROOT), *options], check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def install_wheel(wheel: Path, folder: Path) -> None:
    """Install the wheel's package and its scripts, in ``folder/bin``. Other packages stay those of the tests."""
    options = ["--no-deps", "--no-index", "--quiet", "--target", str(folder)]
    subprocess.run([sys.executable, "-m", "pip", "install", str(wheel), *options], check=True, capture_output=True)


def own_requirements(extra: str) -> set[str]:
    """Return the import names of the packages that ``extra`` lists, without those of the extras that it includes."""
    names = {"hydra-core": "hydra", "scikit-learn": "sklearn", "pillow": "PIL", "pyyaml": "yaml"}
    listed = {Requirement(line).name.lower() for line in EXTRAS[extra]} - {"largebatch"}
    return {names.get(name, name.replace("-", "_")) for name in listed}


def modules_beyond(*extras: str) -> set[str]:
    """Return the import names of the program's packages that are missing if only ``extras`` are installed.

    torch's own requirements are never missing.
    """
    of_torch = {Requirement(line).name.lower() for line in requires("torch") or [] if "extra ==" not in line}
    kept = of_torch.union(*map(own_requirements, extras))
    return {module for extra in PROGRAM for module in own_requirements(extra)} - kept


def lacking(folder: Path, modules: set[str], attributes: tuple[str, ...] = ()) -> str:
    """Write to ``folder`` what hides modules and attributes from a Python with this folder in PYTHONPATH."""
    folder.mkdir()
    text = _HIDE.replace("{modules}", repr(modules)).replace("{attributes}", repr(attributes))
    (folder / "sitecustomize.py").write_text(text)
    return str(folder)


def with_packages(*folders: Path | str, base: dict[str, str]) -> dict[str, str]:
    """Return ``base`` with only these folders in PYTHONPATH, before the packages of the tests' environment.

    Packages that the present PYTHONPATH has beside the project stay.
    """
    before = [entry for entry in base.get("PYTHONPATH", "").split(os.pathsep) if entry]
    kept = [entry for entry in before if not re.fullmatch(r".*/src/?", entry)]
    return base | {"PYTHONPATH": os.pathsep.join([*map(str, folders), *kept])}
