"""Mixup and CutMix, compared with timm's ``Mixup`` at equal parameters."""

import numpy as np
import pytest
import torch
from conftest import configuration
from timm.data import mixup as timm_mixup
from timm.data.mixup import Mixup
from timm.loss import SoftTargetCrossEntropy

from largebatch.config.batch import plan_batch
from largebatch.config.checks import validate
from largebatch.config.epochs import plan_epochs
from largebatch.config.modes import Clf
from largebatch.data.mixing import draw_mixing, mixed, soft
from largebatch.errors import UserError
from largebatch.modes import clf

SIDE, CLASSES = 12, 5


def mixing(mixup=0.8, cutmix=1.0, probability=1.0, switch=0.5, per="batch"):
    return Clf(mixup=mixup, cutmix=cutmix, mix_probability=probability, mix_switch=switch, mix_per=per)


def images_and_labels(n):
    generator = torch.Generator().manual_seed(n)
    labels = torch.randint(0, CLASSES, (n,), generator=generator)
    return torch.randn(n, 3, SIDE, SIDE, generator=generator), labels


@pytest.mark.parametrize("per", ["batch", "pair", "image"])
@pytest.mark.parametrize("alphas", [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)], ids=["mixup", "cutmix", "both"])
def test_a_batch_equals_timms_at_equal_parameters(per, alphas, monkeypatch):
    """timm pairs image i with n - 1 - i. So its batch has the pairs of neighbours at these places."""
    n = 8
    images, labels = images_and_labels(n)
    order = [*range(0, n, 2), *reversed(range(1, n, 2))]
    draws = draw_mixing(3, n, SIDE, mixing(*alphas, per=per))
    got, parts = mixed(images, soft(labels, CLASSES), draws)

    chosen = {"batch": order[:1], "pair": order[: n // 2], "image": order}[per]
    boxes = [tuple(draws.box[i].tolist()) for i in chosen]
    cut = [(draws.box[i] != 0).any().item() for i in chosen]
    lams = [draws.parts[i, 2 if was else 0].item() for i, was in zip(chosen, cut, strict=True)]
    queue = [box for box, was in zip(boxes, cut, strict=True) if was]
    monkeypatch.setattr(timm_mixup, "rand_bbox", lambda *_, **__: queue.pop(0))
    mode = {"batch": "batch", "pair": "pair", "image": "elem"}[per]
    theirs = Mixup(*alphas, mode=mode, label_smoothing=0.0, num_classes=CLASSES)
    monkeypatch.setattr(theirs, "_params_per_batch", lambda: (lams[0], cut[0]))
    monkeypatch.setattr(theirs, "_params_per_elem", lambda _: (np.array(lams), np.array(cut)))
    expected, expected_parts = theirs(images[order].clone(), labels[order])
    torch.testing.assert_close(got[order], expected)
    torch.testing.assert_close(parts[order], expected_parts.float())
    torch.testing.assert_close(parts.sum(1), torch.ones(n))


@pytest.mark.parametrize("alphas", [(0.4, 0.0), (0.0, 1.0), (0.8, 1.0)], ids=["mixup", "cutmix", "both"])
def test_draws_have_timms_distribution(alphas):
    np.random.seed(0)
    n, options = 20_000, {"probability": 0.7, "switch": 0.3}
    draws = draw_mixing(0, n, SIDE, mixing(*alphas, per="image", **options))
    theirs = Mixup(*alphas, prob=0.7, switch_prob=0.3, mode="elem", num_classes=CLASSES)
    lam, is_cut = theirs._params_per_elem(n)
    shape = (n, 3, SIDE, SIDE)
    corrected = [
        timm_mixup.cutmix_bbox_and_lam(shape, ratio)[1] if cut else ratio
        for ratio, cut in zip(lam, is_cut, strict=True)
    ]
    ours, expected = draws.parts[:, 2].double(), torch.tensor(corrected).double()
    torch.testing.assert_close(ours.mean(), expected.mean(), rtol=0, atol=0.01)
    torch.testing.assert_close(ours.std(), expected.std(), rtol=0, atol=0.01)
    for most in (0.05, 0.3, 0.7, 0.95, 0.999):
        parts = [(values <= most).double().mean() for values in (ours, expected)]
        torch.testing.assert_close(*parts, rtol=0, atol=0.015)


@pytest.mark.parametrize("per", ["batch", "pair", "image"])
def test_parts_of_a_batch_mix_as_the_whole(per):
    images, labels = images_and_labels(12)
    draws = draw_mixing(1, 12, SIDE, mixing(per=per))
    whole = mixed(images, soft(labels, CLASSES), draws)
    last = images.contiguous(memory_format=torch.channels_last)
    for size in (2, 4, 6):
        slices = [slice(at, at + size) for at in range(0, 12, size)]
        parts = [mixed(last[part], soft(labels[part], CLASSES), draws[part]) for part in slices]
        assert torch.equal(torch.cat([part[0] for part in parts]), whole[0])
        assert torch.equal(torch.cat([part[1] for part in parts]), whole[1])
        assert parts[0][0].is_contiguous(memory_format=torch.channels_last)


def test_the_last_of_an_odd_number_is_not_mixed():
    images, labels = images_and_labels(5)
    got, parts = mixed(images, soft(labels, CLASSES), draw_mixing(2, 5, SIDE, mixing(cutmix=0.0)))
    assert torch.equal(got[4], images[4])
    assert torch.equal(parts[4], soft(labels, CLASSES)[4])
    assert not torch.equal(got[3], images[3])


def test_probability_0_mixes_nothing():
    assert draw_mixing(0, 8, SIDE, mixing(probability=0.0)) is None


def test_the_loss_of_soft_labels_is_the_weighted_sum_of_both_cross_entropies():
    images, labels = images_and_labels(8)
    draws = draw_mixing(3, 8, SIDE, mixing(per="pair"))
    pixels, parts = mixed(images, soft(labels, CLASSES), draws)
    logits = torch.randn(8, CLASSES, generator=torch.Generator().manual_seed(0))
    value, totals = clf.loss(configuration(), lambda _: logits, pixels, parts)
    partner = labels[torch.arange(8) ^ 1]
    both = [torch.nn.functional.cross_entropy(logits, given, reduction="none") for given in (labels, partner)]
    expected = (both[0] * draws.parts[:, 2] + both[1] * draws.parts[:, 3]).mean()
    torch.testing.assert_close(value, expected)
    larger = torch.where(draws.parts[:, 2] >= draws.parts[:, 3], labels, partner)
    assert totals[1] == (logits.argmax(1) == larger).sum()


def test_label_smoothing_of_mixed_labels_equals_timms():
    """timm smooths the labels and then mixes them; cross-entropy smooths the mixed labels. Both give one target."""
    images, labels = images_and_labels(8)
    draws = draw_mixing(3, 8, SIDE, mixing(cutmix=0.0))
    pixels, parts = mixed(images, soft(labels, CLASSES), draws)
    logits = torch.randn(8, CLASSES, generator=torch.Generator().manual_seed(0))
    order = [0, 2, 4, 6, 7, 5, 3, 1]  # timm pairs image i with n - 1 - i
    targets = timm_mixup.mixup_target(labels[order], CLASSES, draws.parts[0, 2].item(), smoothing=0.3)
    value, _ = clf.loss(configuration("mode.label_smoothing=0.3", "mode.mixup=0.8"), lambda _: logits, pixels, parts)
    torch.testing.assert_close(value, SoftTargetCrossEntropy()(logits[order], targets))


def test_pairs_need_an_even_micro_batch():
    with pytest.raises(UserError, match=r"batch_size=255: mode.mixup and mode.cutmix mix pairs"):
        validate(configuration("mode.mixup=0.2", "batch_size=255"))
    with pytest.raises(UserError, match=r"Fix: batch_size=252 or 256"):
        plan_batch(254, 2, None, 1, 2)
    assert plan_batch(256, 2, None, 1, 2).pieces(1, 100) == (slice(0, 100),)
    validate(configuration("mode.mixup=0.2", "batch_size=254"))


def test_an_odd_last_batch_leaves_out_an_image():
    config = configuration("mode.cutmix=1", "dataset.last_batch=keep", "batch_size=256")
    assert plan_epochs(config, 1437).rest == 1437 % 256 - 1
    assert plan_epochs(configuration("dataset.last_batch=keep", "batch_size=256"), 1437).rest == 1437 % 256
