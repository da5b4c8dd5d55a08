"""Label smoothing of mode ``clf``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import configuration
from steps import at_start, take_steps
from torch import Tensor

from largebatch.config.checks import validate
from largebatch.errors import UserError
from largebatch.modes import clf


def loss(logits: Tensor, labels: Tensor, *overrides: str) -> tuple[float, list[float]]:
    value, totals = clf.loss(configuration(*overrides), lambda images: images, logits, labels)
    return float(value), totals.tolist()


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_the_loss_is_the_cross_entropy_of_smoothed_labels(smoothing: float) -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(7, 5), torch.arange(7) % 5
    targets = (1 - smoothing) * F.one_hot(labels, 5) + smoothing / 5
    expected = -(targets * logits.log_softmax(dim=1)).sum(dim=1).mean().item()
    value, totals = loss(logits, labels, f"mode.label_smoothing={smoothing}")
    assert value == pytest.approx(expected, rel=1e-6)
    assert totals == [pytest.approx(7 * expected, rel=1e-6), float((logits.argmax(1) == labels).sum()), 7.0]


def test_without_smoothing_no_bit_changes() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(64, 10), torch.arange(64) % 10
    assert loss(logits, labels)[0] == F.cross_entropy(logits, labels).item()


def test_held_out_images_and_the_probe_have_no_smoothing() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(8, 4), torch.arange(8) % 4
    plain = F.cross_entropy(logits, labels).item()
    found = clf.evaluate(torch.nn.Identity(), [(logits, labels)], torch.device("cpu"))
    assert clf.evaluation_metrics("test", found)["test/loss"] == pytest.approx(plain, rel=1e-6)
    assert loss(logits, labels, "mode=bt")[0] == plain
    with pytest.raises(UserError, match=r"mode\.label_smoothing"):
        validate(configuration("mode=bt", "mode.label_smoothing=0.1"))


@pytest.mark.parametrize("optimizer", ["sgd", "clars"])
def test_accumulation_trains_the_same_with_smoothed_labels(tmp_path: Path, optimizer: str) -> None:
    """The smoothed loss is a mean over images too."""
    overrides = ("mode.label_smoothing=0.4", f"optimizer={optimizer}", "optimizer.lr=0.01")
    whole, divided = (at_start(tmp_path / str(size), *overrides, f"micro_batch={size}") for size in (16, 4))
    for phase in (whole, divided):
        take_steps(phase, 3)
    expected = whole.training.model.state_dict()
    for name, tensor in divided.training.model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-6)
