"""`largebatch.optim` from a wheel needs torch alone, and of the project only `largebatch.native`."""

import subprocess
import sys
from pathlib import Path

from wheel import modules_beyond

TORCHS_OWN = ("-W", "ignore:Failed to initialize NumPy")  # torch warns without NumPy, which it doesn't require

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


def test_optim_in_a_wheel_needs_torch_alone(installed: Path) -> None:
    """Two steps with each optimizer, fused and not, without any other dependency or module of the project."""
    hidden = modules_beyond()
    assert {"omegaconf", "hydra", "wandb", "torchvision", "timm", "sklearn", "numpy", "yaml"} <= hidden
    command = [sys.executable, "-I", *TORCHS_OWN, "-c", PROGRAM, str(installed), *sorted(hidden)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    runs = [f"{name} {fused}" for name in ("LARS", "TVLARS", "CLARS", "LAMB") for fused in (True, False)]
    assert result.stdout.splitlines() == [*runs, "['largebatch.native']"]
    assert "Warning" not in result.stderr
