"""Faults of own classes that only the worker can find, and the construction of own optimizers and models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import TINY, configuration
from programs import Programs
from torch import nn

from largebatch.config.checks import validate
from largebatch.config.typed import to_yaml
from largebatch.errors import UserError
from largebatch.models.build import build_backbone, build_model
from largebatch.runs.folder import RunFolder
from largebatch.training.optimization import build_optimizer

FAULTS = """
import torch
from torch import nn

def forwards(parameters, **options):
    return torch.optim.SGD(parameters, **options)

def raises(parameters, lr, beta=1):
    raise ValueError(f"beta is {beta}")

def nothing(parameters, lr):
    return None

class WithoutRate(torch.optim.Optimizer):
    def __init__(self, params, lr):
        super().__init__(params, {})

number = 3

def wrong_classes(num_classes):
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes + 1))

def needs_images_of_4(num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(16, num_classes))

def no_module(num_classes):
    return 3

def rises(progress):
    return progress if progress < 1 else float("nan")
"""


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults")
    (folder / "faults_of_own.py").write_text(FAULTS)
    return folder


Worker = Callable[..., tuple[int, str, str]]


@pytest.fixture
def work(faults: Path, tmp_path: Path, process: Programs, monkeypatch: pytest.MonkeyPatch) -> Worker:
    """Return a function that runs a worker. It returns the exit code, the status's message and the output."""
    monkeypatch.syspath_prepend(faults)

    def run(*overrides: str) -> tuple[int, str, str]:
        config = configuration(*TINY, "steps=2", *overrides)
        validate(config)
        run = RunFolder(tmp_path / "runs" / "one")
        run.path.mkdir(parents=True)
        run.config.write_text(to_yaml(config))
        ended = process.call("worker", str(run.path), cwd=faults)
        return ended.code, str(run.read_status().get("message")), ended.output

    return run


@pytest.mark.parametrize(
    ("group", "target", "override", "message"),
    [
        ("optimizer", "forwards", "optimizer.options.bta=1", "optimizer.options.bta=1: NAME has no such option"),
        ("optimizer", "nothing", "", "optimizer.target=NAME: returns a NoneType. Allowed: a torch.optim.Optimizer"),
        ("optimizer", "WithoutRate", "", "optimizer.target=NAME: its parameter groups have no lr"),
        ("optimizer", "number", "", "optimizer.target=NAME: is of type int. Allowed: a class or a function"),
        ("model", "wrong_classes", "", "model.name=wrong_classes: its outputs for two images have the shape [2, 5]"),
        ("model", "no_module", "", "model.target=NAME: returns a int. Allowed: a torch.nn.Module"),
        ("schedule", "rises", "", "schedule.target=NAME: returns nan at progress 1. Allowed: a finite number from 0"),
    ],
)
def test_a_fault_that_the_user_can_fix_is_one_message(
    work: Worker, group: str, target: str, override: str, message: str
) -> None:
    name = f"faults_of_own:{target}"
    lr = ["optimizer.lr=1"] if group == "optimizer" else []
    code, found, output = work(f"{group}=custom", f"{group}.target={name}", *lr, *override.split())
    assert code == 2
    assert found.startswith(message.replace("NAME", name))
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("group", "target", "message"),
    [
        ("optimizer", "raises", "optimizer.target=faults_of_own:raises: ValueError: beta is 1; traceback in "),
        ("model", "needs_images_of_4", "model.target=faults_of_own:needs_images_of_4, with images of 1x8x8: RuntimeE"),
    ],
)
def test_a_class_that_raises_leaves_its_traceback_and_one_line(
    work: Worker, group: str, target: str, message: str
) -> None:
    lr = ["optimizer.lr=1"] if group == "optimizer" else []
    code, found, output = work(f"{group}=custom", f"{group}.target=faults_of_own:{target}", *lr)
    assert code == 1
    assert found.startswith(message)
    assert "Traceback" in output
    assert 'faults_of_own.py", line' in output if target == "raises" else "nn/modules" in output


# -- construction


def test_an_own_optimizer_has_the_keys_and_groups_of_the_others() -> None:
    model = nn.Linear(2, 2)
    config = configuration(
        "optimizer=custom", "optimizer.weight_decay=0.1", "optimizer.lr_1d_ratio=0.5", "lr_scaling.rule=linear",
        "lr_scaling.base_batch=256", "batch_size=512",
    )  # fmt: skip
    weights, biases = build_optimizer(config, model, steps_per_epoch=1).param_groups
    assert (weights["lr"], biases["lr"]) == pytest.approx((0.006, 0.003))
    assert (weights["weight_decay"], biases["beta"]) == (0.1, 0.9)
    assert weights["param_names"] == ["weight"]


def test_the_example_optimizer_steps_by_the_sign_of_its_momentum() -> None:
    config = configuration("optimizer=custom", "optimizer.lr=0.5", "optimizer.weight_decay=0.1")
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 2.0)
    optimizer = build_optimizer(config, model, steps_per_epoch=1)
    for gradient, expected in ((3.0, 2.0 * 0.95 - 0.5), (-0.1, (2.0 * 0.95 - 0.5) * 0.95 - 0.5)):
        model.weight.grad = torch.full((1, 1), gradient)
        optimizer.step()
        assert model.weight.item() == pytest.approx(expected)


def test_a_backbone_is_a_model_without_its_last_layer() -> None:
    config = configuration("model=custom", "model.options.width=7").model
    backbone, features = build_backbone(config, (1, 4, 4))
    assert features == 7
    assert [name for name, _ in backbone.named_parameters()] == ["hidden.weight", "hidden.bias"]
    torch.manual_seed(0)
    initial = build_model(configuration("model=custom", "model.init=xavier_normal").model, 3, 1, 4)
    assert initial(torch.zeros(5, 1, 4, 4)).shape == (5, 3)
    with pytest.raises(UserError, match="has no layer named head, classifier or fc, which mode=bt takes away"):
        build_backbone(configuration("model=custom", f"model.target={__name__}:without_head").model, (1, 4, 4))


def without_head(num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, num_classes))
