"""Helpers of all tests: the real program, and configurations as the launcher makes them."""

from __future__ import annotations

import copy
import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from largebatch import native
from largebatch.config.schema import Config
from largebatch.config.typed import from_composed
from largebatch.launch import devices
from largebatch.launch.composition import plain, store_defaults

if TYPE_CHECKING:
    from programs import Programs

ROOT = Path(__file__).resolve().parent.parent

# Keep what tests compile and measure apart from the user's cache.
os.environ["LARGEBATCH_CACHE"] = str(ROOT / ".pytest_cache" / "largebatch")

sys.path.append(str(ROOT / "examples"))
# Own classes that the presets named custom take in tests, unless a test names another.
TARGETS = {
    "dataset": "mylab.data:stripes", "model": "mylab.model:Perceptron", "optimizer": "mylab.optimizer:SignMomentum",
    "schedule": "mylab.schedule:staircase",
}  # fmt: skip

Launch = Callable[..., subprocess.CompletedProcess[str]]

# The default network on 64 training images: a whole run takes a second beside the imports.
TINY = (
    "dataset=synthetic", "dataset.train_size=64", "dataset.test_size=21", "dataset.image_size=8", "dataset.channels=1",
    "dataset.num_classes=4", "batch_size=16", "tracker=none", "tracker.log_every=2",
)  # fmt: skip


@pytest.fixture
def four_gpus(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Pretend that this machine has four GPUs, which only the driver's program lists."""
    program = tmp_path_factory.mktemp("driver") / "nvidia-smi"
    program.write_text('#!/bin/sh\nfor i in 0 1 2 3; do echo "GPU $i: None (UUID: GPU-0000000$i-ab)"; done\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    devices._gpus_of_the_machine.cache_clear()
    yield
    devices._gpus_of_the_machine.cache_clear()


@pytest.fixture(params=["there is no C++ compiler", "failed: broken: no such thing"])
def compiler_fault(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Take away or break the C++ compiler, with an empty cache. Return the reason that the program must give."""
    (tmp_path / "broken").write_text("#!/bin/sh\necho 'broken: no such thing' >&2\nexit 1\n")
    (tmp_path / "broken").chmod(0o755)
    missing = "no C++" in request.param
    monkeypatch.setenv("CXX", "" if missing else str(tmp_path / "broken"))
    if missing:
        monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    monkeypatch.setenv("LARGEBATCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(native, "_library", functools.cache(native._library.__wrapped__))
    monkeypatch.setattr(native, "private_folder", functools.cache(native.private_folder.__wrapped__))
    return str(request.param)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the slowest rooms first, so that no process ends long after the others."""
    items.sort(key=lambda item: item.path.parent.name not in ("training", "launch", "tracking"))


def environment() -> dict[str, str]:
    """Return the tests' environment without GPUs and the user's settings of W&B and Hydra."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "HYDRA_"))}
    return {**kept, "CUDA_VISIBLE_DEVICES": ""}


def start(*overrides: str, cwd: Path, **popen: object) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "launch.py"), *overrides]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | popen
    return subprocess.Popen(command, cwd=cwd, env=environment(), text=True, **streams)  # type: ignore[call-overload,no-any-return]


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    """Return a function that runs ``python launch.py`` in an empty folder; runs are in ``tmp_path/runs``."""

    def run(*overrides: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "launch.py"), *overrides]
        return subprocess.run(
            command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=timeout, check=False
        )

    return run


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the project's wheel."""
    from wheel import build_wheel

    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder for PYTHONPATH with the installed wheel; its scripts are in ``bin``."""
    from wheel import install_wheel

    folder = tmp_path_factory.mktemp("installed")
    install_wheel(wheel, folder)
    return folder


@pytest.fixture(scope="session")
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Programs]:
    """Return the process that calls programs and trains runs without the time of their imports."""
    import programs  # not found by programs of tests that import this file

    with programs.programs(tmp_path_factory.mktemp("programs")) as process:
        yield process


def configuration(*overrides: str) -> Config:
    """Return the configuration that ``python launch.py`` makes of overrides, without a new process."""
    return from_composed(composition(*overrides))


def composition(*overrides: str) -> DictConfig:
    """Return the tree that Hydra composes of overrides."""
    presets = tuple(o for o in overrides if o[0] in "+~" or (ROOT / "conf" / o.partition("=")[0]).is_dir())
    tree = copy.deepcopy(_composed(presets))
    values = [f"{group}.target={target}" for group, target in TARGETS.items() if f"{group}=custom" in presets]
    values += [override for override in overrides if override not in presets]
    for override in OverridesParser.create().parse_overrides(values):
        OmegaConf.update(tree, override.get_key_element(), override.value(), force_add=True)
    return tree


@functools.cache
def _composed(presets: tuple[str, ...]) -> DictConfig:
    """Return what Hydra composes of presets. Composing takes 0.1 s, and the suite has a thousand configurations."""
    store_defaults()
    with initialize_config_dir(config_dir=str(ROOT / "conf"), version_base="1.3"):
        return OmegaConf.create(plain(compose(config_name="config", overrides=list(presets))))
