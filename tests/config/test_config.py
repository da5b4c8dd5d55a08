"""The schema, its checks and the identity of a run."""

from __future__ import annotations

import dataclasses
import importlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT, configuration
from omegaconf import OmegaConf

from largebatch.config.checks import validate
from largebatch.config.identity import NOT_DECISIVE, decisive, identity, run_name
from largebatch.config.optimizer_libraries import TimmOptimizer
from largebatch.config.optimizers import OPTIMIZERS
from largebatch.config.schema import CHOICES, LIBRARIES, Config
from largebatch.config.typed import from_composed, load_config, to_yaml
from largebatch.errors import UserError

PRESETS = [
    f"{group.name}={preset.stem}"
    for group in sorted((ROOT / "conf").iterdir())
    if group.is_dir() and group.name != "sweeps"
    for preset in sorted(group.glob("*.yaml"))
]


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_composes_and_is_valid(preset: str) -> None:
    validate(configuration(preset))


def test_defaults_are_valid_and_survive_freezing(tmp_path: Path) -> None:
    config = configuration()
    validate(config)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("batch_size=-1", "batch_size=-1"),
        ("epochs=0", "epochs=0"),
        ("dataset.val_fraction=1" + 400 * "0", "too large"),
        ("cluster.devices=[[0]]", "must be a list of plain values"),
        ("cluster.setup=[[module]]", "must be a list of plain values"),
        ("seed=1" + 400 * "0", "must be an integer below 2**63 of at least 0"),
        ("optimizer.lr=nan", "optimizer.lr=nan"),
        ("optimizer.lr=0", "optimizer.lr=0"),
        ("cluster.processes=0", "cluster.processes=0"),
        ("batch_size=2000", "digits has 1437 images"),
        ("dataset.val_fraction=1", "dataset.val_fraction=1"),
        ("precision=fp8", "allowed: auto, fp32, bf16"),
        ("optimizer.lmbda=0.1", "lars has no such option"),
        ("schedule.power=2", "constant has no such option"),
        ("model.stem=cifar", "smallcnn has no such option"),
        ("model.init=xavier", "did you mean xavier_uniform?"),
        ("optimizer.momentum=null", "needs a value"),
        ("optimizer.momentum=1", "of at least 0 and below 1"),
        ("optimizer.momentum=nan", "must be a finite number"),
        ("+model.options.depth=3", "smallcnn has no such option"),
        ("micro_batch=100", "micro_batch=128"),
        ("micro_batch=most", "or auto"),
        ("compile=ture", "did you mean true?"),
        ("dataset.location=gpu", "allowed: auto, device, host"),
        ("dataset.on_error=ignore", "allowed: stop"),
        ("dataset.last_batch=wrap", "allowed: carry, keep, drop"),
        ("lr_scaling.rule=surg", "did you mean surge?"),
        ("lr_scaling.rule=surge", "measure it as docs/lr_scaling.md explains"),
        ("lr_scaling.noise_scale=900", "only lr_scaling.rule=surge has this key"),
        ("lr_scaling.noise_scale=0", "must be a finite number above 0"),
        ("lr_scaling.force=true", "only lr_scaling.rule=surge has this key"),
        ("dataset.mean=[0.1,0.2]", "one number per channel"),
        ("dataset.mean=[nan]", "must be one or more numbers from 0 to 1"),
        ("dataset.std=[0.0]", "above 0"),
        ("dataset.train_size=600", "allowed: 1437"),
        ("dataset.on_error=skip", "allowed: stop"),
        ("dataset.crop_padding=100000", "Fix: at most 8"),
        ("dataset.resized_crop.scale=[0.08,1]", "Fix: dataset.crop_padding=0 dataset.rotation=0"),
        ("dataset.resized_crop.scale=[1,0.5]", "Fix: [0.5, 1.0]"),
        ("dataset.resized_crop.scale=[0,1]", "above 0 and at most 1"),
        ("dataset.resized_crop.interpolation=nearest", "allowed: bicubic, bilinear"),
        ("dataset.resized_crop.source=files", "did you mean file?"),
        ("dataset.resized_crop.source=file", "dataset=digits has no image files to crop from. Fix: dataset.resized"),
        ("dataset.erasing.min_area=0.5", "Fix: at most 0.333333"),
        ("dataset.color_jitter.hue=0.6", "from 0 to 0.5"),
        ("dataset.rand_augment.magnitude=31", "from 0 to 30"),
        ("mode.mix_per=step", "allowed: batch, pair, image"),
        ("dataset.resize_size=7", "Fix: 8 or more"),
        ("mode.label_smoothing=1", "must be a finite number of at least 0 and below 1"),
        ("mode.label_smoothing=-0.1", "of at least 0"),
        ("early_stopping=0", "must be an integer of at least 1"),
        (
            "early_stopping=3",
            "needs validation images, because the test set must not decide when to stop. Fix: dataset",
        ),
        ("ema_decay=1", "above 0 and below 1"),
        ("clip_norm=0", "must be a finite number above 0"),
        ("clip_norm=inf", "must be a finite number above 0"),
    ],
)
def test_the_message_names_a_wrong_value(override: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        validate(configuration(override))
    assert override.lstrip("+").split("=")[0].removesuffix(".depth") in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "override",
    ["cluster.partition='a\nb'", "cluster.setup=['a\nb']", "cluster.options={comment:'a\nb'}", "runs_dir='a\nb'"],
)
def test_a_line_break_cannot_add_a_line_to_a_job_script(override: str) -> None:
    with pytest.raises(UserError, match="has a line break or another control character"):
        validate(configuration("cluster=slurm", override))


def test_the_worker_reads_text_literally(tmp_path: Path) -> None:
    for text in ("${oc.env:HOME}", "\\${seed}", "\\\\${seed}", "${", "a\\b", "1e3"):
        config = from_composed({**asdict(configuration()), "runs_dir": "/x"})
        config.tracker.notes = text
        (tmp_path / "config.yaml").write_text(to_yaml(config))
        assert load_config(tmp_path / "config.yaml").tracker.notes == text


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (
            "optimizer.lrr:[1,2]",
            "space: the run has no key optimizer.lrr. Fix: declare it only in the cases that have it",
        ),
        ("optimizer.lr:[1,1.9]", r"optimizer.lr=2.0: outside of its declared space \[1, 1.9\]"),
        ("optimizer.lr:[3,2]", r"space: optimizer.lr=\[3, 2\]: invalid. Allowed: \[low, high\] for numbers"),
        ("optimizer.lr:[1,2,3]", "invalid"),
        ("optimizer.lr:2", "space: optimizer.lr=2: invalid"),
        ("optimizer.denominator:[a,b]", "optimizer.denominator=norm_of_sum: outside of its declared space"),
    ],
)
def test_an_invalid_search_space_is_refused(space: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        validate(configuration(f"space={{{space}}}", "optimizer.lr=2"))


def test_a_search_space_has_the_run_s_value_and_is_frozen(tmp_path: Path) -> None:
    config = configuration(
        "space={optimizer.lr:[0.1,2],optimizer.nesterov:[true,false],schedule.name:[constant,cosine]}",
        "optimizer.lr=2",
    )
    validate(config)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "config.yaml").space == config.space
    assert config.space["optimizer.nesterov"] == [True, False]


def test_one_error_lists_all_problems() -> None:
    with pytest.raises(UserError) as caught:
        validate(configuration("batch_size=-1", "seed=-2", "precision=fp8"))
    assert len(str(caught.value).splitlines()) == 3


SURGE = ("lr_scaling.rule=surge", "lr_scaling.noise_scale=900")
TIMM = "optimizer=timm"


@pytest.mark.parametrize(
    "optimizer",
    [
        ["optimizer=adam"],
        ["optimizer=adamw"],
        ["optimizer=rmsprop"],
        [TIMM, "optimizer.name=nadamw"],
        [TIMM, "optimizer.name=lion"],
    ],
)
def test_surge_scaling_is_allowed_with_sign_like_optimizers(optimizer: list[str]) -> None:
    validate(configuration(*SURGE, *optimizer))


@pytest.mark.parametrize(
    ("optimizer", "used"),
    [
        (["optimizer=lars"], "lars"),
        (["optimizer=tvlars"], "tvlars"),
        (["optimizer=lamb"], "lamb"),
        (["optimizer=sgd"], "sgd"),
        (["optimizer=adagrad"], "adagrad"),
        (["optimizer=rmsprop", "optimizer.centered=true"], "rmsprop with centered"),
        (["optimizer=adamw", "optimizer.amsgrad=true"], "adamw with amsgrad"),
        ([TIMM, "optimizer.name=lamb"], "lamb"),
        ([TIMM, "optimizer.name=adamw", "+optimizer.options.amsgrad=true"], "adamw with amsgrad"),
    ],
)
def test_surge_scaling_with_other_optimizers_needs_force(optimizer: list[str], used: str) -> None:
    with pytest.raises(UserError, match=rf"sign-like updates such as Adam's; {used} is not one.*force=true") as caught:
        validate(configuration(*SURGE, *optimizer))
    assert len(str(caught.value).splitlines()) == 1
    validate(configuration(*SURGE, *optimizer, "lr_scaling.force=true"))


def test_every_optimizer_that_surge_scaling_covers_exists() -> None:
    import timm.optim

    torch_names = {name for name, kind in OPTIMIZERS.items() if kind.sign_like}
    assert torch_names == {"adam", "adamw", "rmsprop"}
    # timm lists those of apex and bitsandbytes only if they are installed.
    names = {name for name in TimmOptimizer.SIGN_LIKE if not name.startswith(("fused", "bnb"))}
    assert names <= set(timm.optim.list_optimizers())


def test_an_indivisible_batch_names_the_nearest_divisible_sizes() -> None:
    with pytest.raises(UserError, match=r"batch_size=1000: .* Fix: batch_size=999 or 1002"):
        validate(configuration("batch_size=1000", "cluster.processes=3"))


def test_epochs_and_steps_exclude_each_other() -> None:
    with pytest.raises(UserError, match="epochs=3 and steps=5"):
        validate(configuration("epochs=3", "steps=5"))
    assert configuration("steps=5").epochs is None
    assert configuration().epochs == configuration().dataset.default_epochs


def test_exactly_one_warmup_key_is_set() -> None:
    with pytest.raises(UserError, match="exactly one must be set"):
        validate(configuration("schedule=warmup_cosine", "schedule.warmup_steps=5"))
    validate(configuration("schedule=warmup_cosine", "schedule.warmup_steps=5", "schedule.warmup_epochs=null"))


def test_unknown_keys_are_named_with_the_allowed_keys() -> None:
    for override, message in {
        "optimizer.lrr=1": "optimizer.lrr=1: lars has no such option; allowed: name, lr, .*did you mean lr",
        "batchsize=1": r"unknown key batchsize; did you mean batch_size=1\? allowed: dataset, ",
        "batch_size.x=1": "unknown key batch_size.x: batch_size is a value without keys of its own",
        "dataset.views.grey=1": "unknown key dataset.views.grey in dataset.views; allowed: .*did you mean gray",
    }.items():
        with pytest.raises(UserError, match=message):
            configuration(override)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("lr=3", "optimizer.lr=3"), ("bs=3", "batch_size=3"), ("wd=0.1", "optimizer.weight_decay=0.1"),
        ("learning_rate=1", "optimizer.lr=1"), ("batch=64", "batch_size=64"), ("max_epochs=9", "epochs=9"),
        ("gpus=2", "cluster.gpus_per_node=2"), ("training.lr=1", "optimizer.lr=1"),
    ],
)  # fmt: skip
def test_an_unknown_key_is_answered_with_the_key_that_was_meant(given: str, meant: str) -> None:
    with pytest.raises(UserError, match=rf"^unknown key {given.partition('=')[0]}; did you mean {meant}\? allowed: "):
        configuration(given)


def test_an_option_in_the_wrong_group_is_answered_with_its_key() -> None:
    with pytest.raises(UserError, match=r"model\.lr=1: smallcnn has no such option; .*did you mean optimizer\.lr\?"):
        configuration("model.lr=1")
    with pytest.raises(UserError, match=r"optimizer\.wd=1: lars has no such option; .*did you mean weight_decay\?"):
        configuration("optimizer.wd=1")


def test_a_plus_does_not_allow_an_unknown_key() -> None:
    with pytest.raises(UserError, match="unknown key typo"):
        configuration("+typo=1")


IDENTITY_FREE = [
    "profile=true", "dataset.location=host", "dataset.location=device",
    "cluster.processes=2", "tracker=none", "tracker.project=x", "tracker.log_every=3", "runs_dir=elsewhere",
    "rerun=true", "dry_run=true", "confirms=true", "space={optimizer.lr:[1,2]}",
    "dataset.root=elsewhere", "dataset.workers=7", "dataset.download=false",
    "dataset.verify=false", "checkpoint.every_seconds=1", "epochs=120", "lr_scaling.force=true",
    "micro_batch=128", "micro_batch=auto", "sync_bn=true",
]  # fmt: skip


@pytest.mark.parametrize("override", IDENTITY_FREE)
def test_identity_ignores_keys_that_cannot_change_the_result(override: str) -> None:
    default = configuration("epochs=120") if override.startswith("epochs") else configuration()
    assert default.epochs == 120
    assert identity(configuration(override)) == identity(default)


@pytest.mark.parametrize(
    "override",
    [
        "optimizer=lamb", "optimizer.lr=0.3", "optimizer.momentum=0.8", "schedule=cosine", "batch_size=256", "seed=1",
        "epochs=7", "steps=7", "model.init=xavier_uniform", "model.norm=batch", "precision=bf16",
        "batch_norm_size=128", "dataset.rotation=0", "dataset.val_fraction=0.1", "lr_scaling.rule=sqrt", "eval_every=2",
        "deterministic=true", "lr_scaling.base_batch=128", "lr_scaling.noise_scale=900",
        "compile=true", "compile=false", "dataset.on_error=skip", "dataset.last_batch=drop", "dataset.last_batch=keep",
        "mode.label_smoothing=0.1", "clip_norm=1", "ema_decay=0.9", "early_stopping=3",
    ],
)  # fmt: skip
def test_identity_changes_with_keys_that_can_change_the_result(override: str) -> None:
    assert identity(configuration(override)) != identity(configuration())


def test_identity_and_name_of_image_folders_depend_on_root() -> None:
    one, two = (configuration("dataset=imagefolder", f"dataset.root={root}") for root in ("/a/cats", "/b/cats"))
    assert identity(one) != identity(two)
    assert run_name(one).startswith("cats-")


def test_run_name_is_readable_and_a_valid_folder_name() -> None:
    name = run_name(configuration("model=timm", "model.name=vit_tiny_patch16_224.augreg in/x"))
    assert "/" not in name
    assert " " not in name
    assert name.endswith(identity(configuration("model=timm", "model.name=vit_tiny_patch16_224.augreg in/x")))
    assert run_name(configuration()).startswith("digits-smallcnn-clf-lars-constant-b512-lr")


def test_missing_value_is_named() -> None:
    with pytest.raises(UserError, match=r"dataset\.name has no value"):
        from_composed(OmegaConf.create({"batch_size": 4}))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_options_and_defaults_equal_the_arguments_of_the_class(name: str) -> None:
    module, _, function = OPTIMIZERS[name].target.partition(":")
    parameters = [torch.zeros(1, requires_grad=True)]
    defaults = getattr(importlib.import_module(module), function)(parameters, lr=1.0).defaults
    per_step = {"lmbda": 1e-3} if name == "tvlars" else {}  # its default is per training, which a class can't know
    config = OPTIMIZERS[name](name=name, lr=1.0, **per_step)
    options = config.arguments(batch_size=256, steps_per_epoch=1)
    assert options == {option: defaults[option] for option in options}
    if module.startswith("largebatch"):  # implementation and per-group arguments aren't options
        not_configured = {"lr", "adapt", "maximize", "foreach", "fused", "capturable"}
        if "muon" in name:
            not_configured = {"lr", "orthogonal"}
        if name == "rotational_lion":
            not_configured = {"lr"}
        assert defaults.keys() - {"step"} == options.keys() | not_configured


@pytest.mark.parametrize(("group", "name"), [(group, name) for group, kinds in CHOICES.items() for name in kinds])
def test_each_choice_has_a_preset_and_needs_only_a_name(group: str, name: str) -> None:
    """``name: lars`` and ``lr: 1`` make a preset; every other option keeps its default."""
    names = {yaml.safe_load(path.read_text())["name"] for path in (ROOT / "conf" / group).glob("*.yaml")}
    assert name in names
    tree = {key: {"name": next(iter(kinds))} for key, kinds in CHOICES.items()} | {group: {"name": name}}
    tree["optimizer"]["lr"] = 1
    tree |= {"cluster": {"name": "local"}, "tracker": {"name": "none"}}
    if name.startswith("warmup"):
        tree["schedule"]["warmup_steps"] = 3
    config = from_composed(tree)
    validate(config)
    assert type(getattr(config, group)) is CHOICES[group][name]


def leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return values by dotted keys. An empty mapping is a value."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return found


@pytest.mark.parametrize(
    "choices",
    [
        (),
        ("mode=bt", "optimizer=tvlars", "schedule=warmup_poly", "model=resnet18"),
        ("optimizer=clars", "dataset=imagefolder"),
        ("dataset=arrow",),
        ("optimizer=timm", "model=timm"),
        ("optimizer=custom", "model=custom", "dataset=custom", "schedule=custom"),
    ],
)
def test_every_key_is_decisive_or_listed_with_a_reason(choices: tuple[str, ...]) -> None:
    tree = dataclasses.asdict(configuration(*choices))
    decided = set(leaves(decisive(tree)))
    listed = {key for key in leaves(tree) if any(f"{key}.".startswith(f"{free}.") for free in NOT_DECISIVE)}
    conditional = {"dataset.root"} if {"dataset=imagefolder", "dataset=arrow", "dataset=custom"} & {*choices} else set()
    conditional |= {key for key in leaves(tree) if key.startswith("dataset.views.") and "mode=bt" in choices}
    assert decided == set(leaves(tree)) - (listed - conditional)
    assert all(NOT_DECISIVE.values())


def test_frozen_configuration_has_exactly_the_keys_of_its_choices() -> None:
    shown = yaml.safe_load(to_yaml(configuration("optimizer=tvlars")))["optimizer"]
    assert list(shown) == [field.name for field in dataclasses.fields(OPTIMIZERS["tvlars"])]
    assert shown["lmbda_relative"] == 10


def test_every_key_has_a_type() -> None:
    """OmegaConf can then refuse a wrong type before a run starts."""
    kinds = (kind for kinds in (*CHOICES.values(), *LIBRARIES.values()) for kind in kinds.values())
    for kind in (Config, *kinds):
        for field in dataclasses.fields(kind):
            assert field.type not in ("Any", ""), field.name


# -- mode=bt


@pytest.mark.parametrize(
    "override", ["mode.lmbda=0.1", "mode.projector=[8,8]", "mode.exact=true", "mode.knn_every=1", "mode.lr_backbone=0"]
)
def test_options_of_pre_training_are_unknown_to_a_classifier(override: str) -> None:
    with pytest.raises(UserError) as caught:
        validate(configuration(override))
    assert str(caught.value).startswith(override.partition("=")[0])
    assert "clf has no such option" in str(caught.value)
    validate(configuration("mode=bt", override))


def test_an_unknown_mode_names_the_allowed_modes() -> None:
    with pytest.raises(UserError, match=r"mode\.name=bt_published: allowed: clf, bt"):
        validate(configuration("mode=bt", "mode.name=bt_published"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["mode.projector=[]"], "mode.projector=[]: must be one or more numbers of at least 1"),
        (["mode.projector=[8,0]"], "mode.projector=[8, 0]: must be one or more numbers of at least 1"),
        (["mode.projector=null"], "mode.projector=null: needs a value"),
        (["mode.lmbda=null"], "mode.lmbda=null: needs a value"),
        (["mode.eval_epochs=0"], "mode.eval_epochs=0: must be an integer of at least 1"),
        (["mode.lr_classifier=0"], "mode.lr_classifier=0.0: must be a finite number above 0"),
        (["mode.lr_backbone=-1"], "mode.lr_backbone=-1.0: must be a finite number of at least 0"),
        (["mode.knn_temperature=0"], "mode.knn_temperature=0.0: must be a finite number above 0"),
        (["mode.loss_scale=nan"], "mode.loss_scale=nan: must be a finite number above 0"),
        (["optimizer.lr_1d=-0.1"], "optimizer.lr_1d=-0.1: must be a finite number of at least 0"),
        (["batch_size=1"], "batch_size=1: mode=bt correlates the images of a batch"),
        (["batch_size=1", "mode.exact=false"], "batch_size=1: mode=bt correlates the images of a batch"),
        (["mode.exact=false", "micro_batch=1"], "mode.exact=false: correlates the images of each micro-batch"),
        (
            ["mode.exact=false", "batch_size=4", "cluster.processes=4"],
            "mode.exact=false: correlates the images of each micro-batch",
        ),
        (["early_stopping=3", "dataset.val_fraction=0.1"], "early_stopping=3: not allowed with mode=bt"),
        (["mode.exact=false", "optimizer=clars"], "mode.exact=false: clars measures the gradients of samples"),
        (["dataset.views.min_area=0"], "dataset.views.min_area=0.0: must be a finite number above 0 and at most 1"),
        (["dataset.views.min_area=1.1"], "dataset.views.min_area=1.1: must be a finite number above 0 and at most 1"),
        (["dataset.views.jitter=1.1"], "dataset.views.jitter=1.1: must be a finite number from 0 to 1"),
        (["dataset.views.gray=-0.1"], "dataset.views.gray=-0.1: must be a finite number from 0 to 1"),
        (["dataset.views.gray=nan"], "dataset.views.gray=nan: must be a finite number from 0 to 1"),
        (["dataset.views.blur=[1,2]"], "dataset.views.blur=[1.0, 2.0]: must be 2 numbers from 0 to 1"),
        (["dataset.views.blur=[0.5]"], "dataset.views.blur=[0.5]: must be 2 numbers from 0 to 1"),
        (["dataset.views.solarize=[0,0,0]"], "dataset.views.solarize=[0.0, 0.0, 0.0]: must be 2 numbers"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_the_message_names_a_wrong_value_of_pre_training(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        validate(configuration("mode=bt", *overrides))
    assert str(caught.value).startswith(message)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "overrides",
    [
        ["micro_batch=1"],  # the loss is over the whole batch
        ["optimizer=clars"],
        ["mode.exact=false"],
        ["mode.projector=[8]"],
        ["dataset.views.blur=[0,1]", "dataset.views.min_area=1", "dataset.views.jitter=0"],
        ["micro_batch=auto", "mode.exact=false"],
        ["mode.knn_every=0"],
    ],
    ids=lambda value: "-".join(value),
)
def test_these_options_of_pre_training_are_valid(overrides: list[str]) -> None:
    validate(configuration("mode=bt", *overrides))


@pytest.mark.parametrize("length", ["epochs=0", "steps=0"])
def test_only_pre_training_may_have_zero_steps(length: str) -> None:
    validate(configuration("mode=bt", length))
    with pytest.raises(UserError, match=f"{length}: zero training steps are only allowed with mode=bt"):
        validate(configuration(length))
    with pytest.raises(UserError, match="must be an integer of at least 0"):
        validate(configuration("mode=bt", length.replace("0", "-1")))


VIEWS = ["min_area=0.5", "jitter=0.5", "gray=0.5", "blur=[0.5,0.5]", "solarize=[0.5,0.5]"]


@pytest.mark.parametrize("view", VIEWS)
def test_views_change_the_identity_only_of_pre_training(view: str) -> None:
    override = f"dataset.views.{view}"
    assert identity(configuration(override)) == identity(configuration())
    assert identity(configuration("mode=bt", override)) != identity(configuration("mode=bt"))


@pytest.mark.parametrize(
    "override",
    ["mode.lmbda=0.1", "mode.projector=[8,8]", "mode.exact=false", "mode.eval_epochs=3", "mode.lr_backbone=0.1",
     "mode.loss_scale=1", "mode.eval_augmentation=true", "optimizer.lr_1d=0.1", "epochs=0"],
)  # fmt: skip
def test_identity_changes_with_options_of_pre_training_and_probe(override: str) -> None:
    assert identity(configuration("mode=bt", override)) != identity(configuration("mode=bt"))


def test_lr_1d_changes_the_identity_only_if_set() -> None:
    assert identity(configuration("optimizer.lr_1d=null")) == identity(configuration())
    assert identity(configuration("optimizer.lr_1d=0.1")) != identity(configuration())
