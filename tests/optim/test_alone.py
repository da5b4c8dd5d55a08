"""`largebatch.optim` from a wheel needs torch alone, and of the project only `largebatch.native`."""

import importlib.util
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

# Trains while the given names, and every module of the project but three, can't be found.
PROGRAM = """
import sys
from importlib.machinery import PathFinder

wheel, *hidden = sys.argv[1:]


class Hiding(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        parts = name.split(".")
        other_room = parts[0] == "largebatch" and parts[1:2] not in ([], ["native"], ["optim"])
        return None if other_room or parts[0] in hidden else super().find_spec(name, path, target)


sys.meta_path = [Hiding if finder is PathFinder else finder for finder in sys.meta_path]
sys.path.insert(0, wheel)
for name in hidden + ["largebatch.errors", "largebatch.config"]:
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise AssertionError(f"{name} isn't hidden")

import torch
from largebatch.optim import CLARS, LAMB, LARS, TVLARS, SampleNorms

for build in (LARS, TVLARS, CLARS, LAMB):
    for fused in (True, False):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Conv2d(1, 3, 3), torch.nn.Flatten(), torch.nn.Linear(12, 2))
        optimizer = build(model.named_parameters(), lr=0.1, weight_decay=1e-4, fused=fused)
        norms = SampleNorms(model, parameters=optimizer.layers) if build is CLARS else None
        before = [parameter.detach().clone() for parameter in model.parameters()]
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.randn(5, 1, 4, 4)).square().mean().backward()
            if norms is not None:
                optimizer.set_sample_norms(norms.means())
            optimizer.step()
        assert all(value.isfinite().all() for value in optimizer.layer_stats().values())
        assert not any(map(torch.equal, before, model.parameters())), (build, fused)
        optimizer.load_state_dict(optimizer.state_dict())
        print(build.__name__, fused)

import largebatch
assert largebatch.__file__.startswith(wheel), largebatch.__file__
print(sorted(name for name in sys.modules if name.startswith("largebatch.") and "optim" not in name))
"""


def make_wheel(folder: Path) -> Path:
    """Unpack the project's wheel to ``folder``; without hatchling, copy the folders that it would pack."""
    if importlib.util.find_spec("hatchling") is not None:
        options = ["--no-deps", "--no-build-isolation", "--no-index", "-w", str(folder / "wheel")]
        subprocess.run([sys.executable, "-m", "pip", "wheel", str(ROOT), *options], check=True, capture_output=True)
        with zipfile.ZipFile(next((folder / "wheel").glob("*.whl"))) as wheel:
            wheel.extractall(folder / "installed")
    else:
        for package in PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]:
            target = folder / "installed" / Path(package).name
            shutil.copytree(ROOT / package, target, ignore=shutil.ignore_patterns("__pycache__"))
    return folder / "installed"


def modules_that_the_project_needs_beyond_torch() -> set[str]:
    """Return the import names of all dependencies, except torch, numpy and torch's own dependencies."""
    of_torch = map(Requirement, requires("torch") or [])
    torchs = {"torch", "numpy", *(one.name.lower() for one in of_torch if "extra" not in str(one.marker))}
    given = {Requirement(line).name.lower() for line in PROJECT["project"]["dependencies"]}
    names = {"hydra-core": "hydra", "scikit-learn": "sklearn", "pillow": "PIL", "pyyaml": "yaml"}
    return {names.get(name, name.replace("-", "_")) for name in given - torchs}


def test_optim_in_a_wheel_needs_torch_alone(tmp_path: Path) -> None:
    """Two steps with each optimizer, fused and not, without any other dependency or module of the project."""
    hidden = modules_that_the_project_needs_beyond_torch()
    assert {"omegaconf", "hydra", "wandb", "torchvision", "timm", "sklearn", "scipy", "PIL", "yaml"} <= hidden
    command = [sys.executable, "-I", "-c", PROGRAM, str(make_wheel(tmp_path)), *sorted(hidden)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    runs = [f"{name} {fused}" for name in ("LARS", "TVLARS", "CLARS", "LAMB") for fused in (True, False)]
    assert result.stdout.splitlines() == [*runs, "['largebatch.native']"]
    assert "Warning" not in result.stderr
