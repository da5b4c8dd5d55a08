"""The points of a grid, compared with Hydra's own expansion and composition."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import hydra
import pytest
from conftest import ROOT
from hydra import initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from programs import Programs

from largebatch.config.checks import validate
from largebatch.config.idle import idle_options, planned_length
from largebatch.config.schema import Config
from largebatch.config.typed import from_composed
from largebatch.errors import UserError
from largebatch.launch import composition
from largebatch.launch.composition import Composed, by_force, compose_grid, store_defaults

CONF = ROOT / "conf"


@pytest.fixture(autouse=True, scope="module")
def _defaults() -> None:
    store_defaults()


def points(jobs: list[Composed], fixed: int = 0) -> list[str]:
    """Return each job's overrides without the first ``fixed``."""
    return [" ".join(job.overrides[fixed:]) for job in jobs]


def by_hydra(*overrides: str) -> Config:
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        return from_composed(hydra.compose("config", by_force(list(overrides), CONF)))


def multirun_of_hydra(arguments: list[str]) -> list[list[str]]:
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
        (jobs,) = BasicSweeper.split_arguments(parser.parse_overrides(arguments), max_batch_size=None)
    return [list(job) for job in jobs]


@pytest.mark.parametrize(
    "command",
    [
        "optimizer=lars,tvlars|seed=0,1|batch_size=64",
        "optimizer.lr=1,2e-1,.5",
        "dataset=digits,synthetic|dataset.val_fraction=0.1,0.2",
        "dataset.val_fraction=0.1,0.2|dataset=digits,synthetic",
        "experiment=demo,cifar10|batch_size=128,256",
        "experiment=cifar10|optimizer=lars,lamb|optimizer.lr=1,2",
        """tracker.notes='a, b',c,"d=e f"|tracker.group=1""",
        "optimizer=lamb|optimizer.betas=[0.9,0.99],[0.8,0.9]",
        "optimizer.norm_clip=null,10|compile=true,auto",
        "model=timm|model.name=test_resnet|+model.options.drop_rate=0.1,0.2",
        "model=timm|model.name=test_resnet|+model.options.drop_rate=0.1|seed=0,1",
        "++optimizer.lr=0.5|seed=0,1",
        "~experiment|hydra.verbose=true|seed=0,1",
        "optimizer={momentum:0.8},{momentum:0.7}",
        "seed=range(1,4)",
        "optimizer=glob(la*,exclude=*_published)",
        "schedule=choice(constant,cosine)",
        "optimizer.lr=1,2|optimizer.lr_1d=${optimizer.lr}",
    ],
)
def test_points_and_configurations_equal_hydra_s(command: str) -> None:
    arguments = command.split("|")
    jobs = compose_grid(arguments, CONF)
    expected = multirun_of_hydra(arguments)
    assert len(jobs) == len(expected) > 0
    for job, overrides in zip(jobs, expected, strict=True):
        assert from_composed(job.tree) == by_hydra(*overrides)
        assert job.multirun
        assert job.sweep is None


def test_later_axes_vary_faster_and_equal_points_are_merged() -> None:
    jobs = compose_grid(["batch_size=64", "seed=0,1", "optimizer.lr=1,2,1"], CONF)
    assert points(jobs, fixed=1) == [
        "seed=0 optimizer.lr=1", "seed=0 optimizer.lr=2", "seed=1 optimizer.lr=1", "seed=1 optimizer.lr=2",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("optimizer.lr=1,2|optimizer.lr=3", ["optimizer.lr=3"]),
        ("optimizer.lr=3|optimizer.lr=1,2", ["optimizer.lr=1", "optimizer.lr=2"]),
        ("optimizer=lars,lamb|optimizer=lars", ["optimizer=lars"]),
    ],
)
def test_the_last_value_of_a_repeated_key_counts(command: str, expected: list[str]) -> None:
    jobs = compose_grid(command.split("|"), CONF)
    assert points(jobs) == expected
    assert [from_composed(job.tree) for job in jobs] == [by_hydra(point) for point in expected]


def test_points_of_a_preset_share_no_objects() -> None:
    one, other = compose_grid(["seed=0,1"], CONF)
    one.tree["optimizer"]["betas"] = one.tree["tracker"]["tags"]
    one.tree["tracker"]["tags"].append("changed")
    assert other.tree["tracker"]["tags"] == []


def test_hydra_composes_once_for_each_choice_of_presets(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(*arguments: Any, **named: Any) -> Any:
        calls.append(arguments)
        return hydra.compose(*arguments, **named)

    monkeypatch.setattr(composition, "compose", counted)
    jobs = compose_grid(["seed=range(0,100)", "optimizer=lars,lamb", "optimizer.lr=range(1,6)"], CONF)
    assert len(jobs) == 1000
    assert len(calls) <= 1 + 2  # the sweep, and each optimizer
    assert from_composed(jobs[-1].tree) == by_hydra("seed=99", "optimizer=lamb", "optimizer.lr=5")


# Named grids.


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    """Return a copy of the presets with an empty folder for named grids."""
    shutil.copytree(CONF, tmp_path / "conf", ignore=shutil.ignore_patterns("sweeps"))
    (tmp_path / "conf" / "sweeps").mkdir()
    return tmp_path / "conf"


def mine(conf: Path, text: str, *arguments: str) -> list[Composed]:
    """Return the grid of ``arguments`` and of a named grid with this text."""
    (conf / "sweeps" / "mine.yaml").write_text(f"# @package _global_\n{text}")
    jobs = compose_grid(["sweeps=mine", *arguments], conf)
    assert all(job.sweep == "mine" and job.overrides[0] == "sweeps=mine" for job in jobs)
    return jobs


PARAMS = """
hydra:
  sweeper:
    params:
      optimizer: lars,lamb
      seed: range(0,2)
batch_size: 64
"""


def test_a_sweep_file_sets_axes_and_values(conf: Path) -> None:
    jobs = mine(conf, PARAMS)
    expected = ["optimizer=lars seed=0", "optimizer=lars seed=1", "optimizer=lamb seed=0", "optimizer=lamb seed=1"]
    assert points(jobs, fixed=1) == expected
    for job in jobs:
        assert from_composed(job.tree) == by_hydra("batch_size=64", *job.overrides[1:])


def test_the_command_line_adds_axes_and_replaces_axes_of_the_file(conf: Path) -> None:
    added = mine(conf, PARAMS, "schedule=constant,cosine", "seed=3")
    assert points(added, fixed=2) == [
        "optimizer=lars schedule=constant", "optimizer=lars schedule=cosine",
        "optimizer=lamb schedule=constant", "optimizer=lamb schedule=cosine",
    ]  # fmt: skip
    assert {job.tree["seed"] for job in added} == {3}
    replaced = mine(conf, PARAMS, "seed=5,6", "optimizer=tvlars", "batch_size=32")
    assert points(replaced, fixed=3) == ["seed=5", "seed=6"]
    expected = [by_hydra("optimizer=tvlars", "batch_size=32", f"seed={seed}") for seed in (5, 6)]
    assert [from_composed(job.tree) for job in replaced] == expected


def test_a_sweep_file_can_build_on_an_experiment(conf: Path) -> None:
    file = (
        "defaults: [override /experiment: cifar10]\nhydra: {sweeper: {params: {'optimizer': 'lars,tvlars'}}}\nepochs: 9"
    )
    jobs = mine(conf, file)
    expected = [by_hydra("experiment=cifar10", f"optimizer={name}", "epochs=9") for name in ("lars", "tvlars")]
    assert [from_composed(job.tree) for job in jobs] == expected


CASES = """
hydra: {sweeper: {params: {seed: '0,1'}}}
cases:
  - {optimizer: lars, optimizer.lr: [1, 2], optimizer.norm_clip: null}
  - {optimizer: lamb, optimizer.lr: '0.01,0.02'}
  - {optimizer: lamb, optimizer.lr: 0.01, optimizer.betas: [[0.9, 0.99]], compile: true}
"""


def test_each_case_is_combined_with_the_other_axes(conf: Path) -> None:
    jobs = mine(conf, CASES)
    cases = [
        "optimizer=lars optimizer.lr=1 optimizer.norm_clip=null",
        "optimizer=lars optimizer.lr=2 optimizer.norm_clip=null",
        "optimizer=lamb optimizer.lr=0.01",
        "optimizer=lamb optimizer.lr=0.02",
        "optimizer=lamb optimizer.lr=0.01 optimizer.betas=[0.9,0.99] compile=true",
    ]
    expected = [f"{case} seed={seed}" for case in cases for seed in (0, 1)]
    assert points(jobs, fixed=1) == expected
    assert [from_composed(job.tree) for job in jobs[::2]] == [by_hydra(*point.split()) for point in expected[::2]]


def test_a_key_on_the_command_line_replaces_it_in_every_case(conf: Path) -> None:
    fixed = mine(conf, CASES, "optimizer.lr=7", "seed=0", "compile=false", "optimizer.norm_clip=null")
    assert points(fixed, fixed=5) == ["optimizer=lars", "optimizer=lamb", "optimizer=lamb optimizer.betas=[0.9,0.99]"]
    assert {job.tree["optimizer"]["lr"] for job in fixed} == {7}
    axis = mine(
        conf, CASES, "optimizer=tvlars,lars", "optimizer.lr=3", "seed=0", "optimizer.betas=null", "compile=true"
    )
    assert points(axis, fixed=5) == [
        "optimizer.norm_clip=null optimizer=tvlars", "optimizer.norm_clip=null optimizer=lars",
        "optimizer=tvlars", "optimizer=lars",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cases: []", "cases: must be a list of mappings"),
        ("cases: [1]", "cases: must be a list of mappings"),
        ("cases: [{seed: []}]", "cases: seed has no value"),
        ("cases: [{optimizer.lr: 'interval(1,2)'}]", "optimizer.lr: an interval needs the number of points"),
        ("cases: [{seed: 1}]\nhydra: {sweeper: {params: {seed: '2,3'}}}", "seed: is in cases and in hydra.sweeper"),
        ("hydra: {sweeper: {params: {seed: 'range(1,1)'}}}", r"seed=range\(1,1\): has no value"),
    ],
)
def test_an_invalid_sweep_file_is_refused(conf: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        mine(conf, text)


def test_the_command_line_can_replace_a_key_of_both_cases_and_params(conf: Path) -> None:
    text = "cases: [{seed: 1}]\nhydra: {sweeper: {params: {seed: '2,3'}}}"
    assert points(mine(conf, text, "seed=4,5"), fixed=1) == ["seed=4", "seed=5"]


def test_a_mapping_as_cases_is_refused(conf: Path) -> None:
    with pytest.raises(UserError, match="cases: must be a list of mappings"):
        mine(conf, "cases: {seed: 1}")


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("optimizer.lrr=1,2", "optimizer.lrr=1: lars has no such option; .*did you mean lr"),
        ("model.options.depth=1,2", "model.options={'depth': 1}: smallcnn has no such option"),
        ("cases=[{optimizer.lrr: 1}]", "optimizer.lrr=1: lars has no such option; .*did you mean lr"),
    ],
)
def test_an_unknown_key_of_a_grid_is_refused(command: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        from_composed(compose_grid([command], CONF)[0].tree)


def test_an_option_that_the_preset_leaves_out_can_be_an_axis() -> None:
    jobs = compose_grid(["optimizer.larc=true,false", "optimizer.max_ratio=1"], CONF)
    assert [from_composed(job.tree).optimizer.arguments(512, 1)["larc"] for job in jobs] == [True, False]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("optimizer=glob(zz*)", r"optimizer=glob\(zz\*\): has no value"),
        ("sweeps=demo,digits_search", "sweeps=demo,digits_search: only one named grid is allowed"),
        ("optimizer.lr=interval(1,2)", "optimizer.lr: an interval needs the number of points"),
        ("optimizer.lr=interval(1,2)|trials=0", "optimizer.lr: an interval needs the number of points"),
        ("optimizer.lr=tag(log,interval(0,2))|trials=3", "a logarithmic interval must start above 0"),
        ("optimizer.lr=interval(2,2)|trials=3", "the interval's end must be above its start"),
        ("optimizer.lr=1,2|trials=3", "trials=3: no axis is an interval"),
        ("cases=[{seed: [1, 'int(interval(2,5))']}]|trials=3", "cases: seed mixes an interval with other values"),
        ("batch_size.x=1,2", "unknown key batch_size.x: batch_size is a value"),
    ],
)
def test_an_invalid_grid_on_the_command_line_is_refused(command: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        compose_grid(command.split("|"), CONF)


# Searches.


def radical_inverse(number: int, base: int) -> float:
    """Return ``number`` with its digits mirrored at the point, an element of the Halton sequence."""
    value, part = 0.0, 1.0
    while number:
        part /= base
        value += part * (number % base)
        number //= base
    return value


def test_intervals_are_drawn_from_the_halton_sequence() -> None:
    command = [
        "trials=6",
        "optimizer=tvlars",
        "optimizer.lr=tag(log,interval(0.1,10))",
        "optimizer.lmbda=interval(0,1)",
    ]
    found = [job.tree["optimizer"] for job in compose_grid(command, CONF)]
    assert len(found) == 6
    for number, optimizer in enumerate(found, start=1):
        assert optimizer["lr"] == pytest.approx(0.1 * 100 ** radical_inverse(number, 2), rel=1e-3)
        assert optimizer["lmbda"] == pytest.approx(radical_inverse(number, 3), rel=1e-3)
    more = [job.tree["optimizer"] for job in compose_grid(["trials=9", *command[1:]], CONF)]
    assert more[:6] == found  # more trials keep the earlier runs


def test_each_drawn_point_is_combined_with_the_other_axes() -> None:
    jobs = compose_grid(["trials=3", "optimizer=lars,lamb", "optimizer.lr=interval(1,2)", "seed=0,1"], CONF)
    assert points(jobs[:4], 1) == [
        f"optimizer={name} optimizer.lr=1.5 seed={seed}" for name in ("lars", "lamb") for seed in (0, 1)
    ]
    assert len(jobs) == 12


def test_each_case_draws_from_its_own_intervals(conf: Path) -> None:
    cases = (
        "cases=[{optimizer: lars, optimizer.lr: 'interval(1,3)'}, {optimizer: lamb, batch_size: 'int(interval(8,12))'}]"
    )
    jobs = compose_grid(["trials=2", cases], conf)
    assert points(jobs, 2) == [
        "optimizer=lars optimizer.lr=2", "optimizer=lars optimizer.lr=1.5",
        "optimizer=lamb batch_size=10", "optimizer=lamb batch_size=9",
    ]  # fmt: skip


def spaces(jobs: list[Composed]) -> list[dict[str, list[object]]]:
    return [job.tree["space"] for job in jobs]


def test_intervals_declare_the_search_space() -> None:
    command = [
        "trials=1",
        "optimizer=tvlars",
        "optimizer.lr=tag(log,interval(0.1,10))",
        "optimizer.lmbda=interval(0,1)",
    ]
    assert spaces(compose_grid(command, CONF)) == [{"optimizer.lr": [0.1, 10], "optimizer.lmbda": [0, 1]}]
    assert spaces(compose_grid(["optimizer.lr=1,2"], CONF)) == [{}, {}]


SPACES = """
space: {batch_size: [32, 512]}
cases:
  - {optimizer: lars, optimizer.lr: [1, 2], space: {optimizer.lr: [0.1, 10]}}
  - {optimizer: sgd, optimizer.lr: 'interval(1,2)', space: {optimizer.nesterov: [false, true]}}
  - {optimizer: lamb}
trials: 1
"""


def test_each_case_declares_its_own_space(conf: Path) -> None:
    shared = {"batch_size": [32, 512]}
    lars = shared | {"optimizer.lr": [0.1, 10]}
    sgd = shared | {"optimizer.lr": [1, 2], "optimizer.nesterov": [False, True]}
    jobs = mine(conf, SPACES)
    assert spaces(jobs) == [lars, lars, sgd, shared]
    for job in jobs:
        config = from_composed(job.tree)
        validate(config)
        assert config.space == job.tree["space"]


def test_a_value_from_the_command_line_is_not_of_the_declared_space(conf: Path) -> None:
    sgd = {"optimizer.nesterov": [False, True]}
    changed = mine(conf, SPACES, "trials=null", "optimizer.lr=5", "batch_size=64")
    assert spaces(changed[:2]) == [{}, sgd]
    own = mine(conf, SPACES, "trials=null", "optimizer.lr=5", "space={optimizer.lr:[1,9]}")
    lars = {"batch_size": [32, 512], "optimizer.lr": [1, 9]}
    assert spaces(own) == [lars, lars | sgd, lars]
    drawn = mine(conf, SPACES, "optimizer.lr=interval(3,4)", "batch_size=64")
    assert spaces(drawn[:1]) == [{"optimizer.lr": [3, 4]}]


def test_a_space_that_is_no_mapping_is_refused(conf: Path) -> None:
    with pytest.raises(UserError, match="space=3: must be a mapping from a key to its range"):
        mine(conf, "cases: [{seed: 1, space: 3}]")


# The released program's lambdas, some of which do nothing; the plan notes them.
RELEASED = ("clf_lambda", "bt_lambda")


@pytest.mark.parametrize("name", sorted(file.stem for file in (ROOT / "sweeps").glob("*.yaml")))
def test_named_grids_are_valid_and_have_the_number_of_runs_in_their_header(name: str) -> None:
    """In a grid of our own, phi falls in every run."""
    text = (ROOT / "sweeps" / f"{name}.yaml").read_text()
    header = text.partition("\ndefaults:")[0]
    stated = re.search(r"(\d+) runs", header)
    assert stated, "the header has no number of runs"
    assert f"#   python launch.py -m sweeps={name}" in header.splitlines()
    jobs = compose_grid([f"sweeps={name}"], CONF)
    assert len({json.dumps(job.tree) for job in jobs}) == len(jobs) == int(stated[1])
    kinds = {(job.tree["optimizer"]["name"], job.tree["schedule"]["name"], job.tree["batch_size"]): job for job in jobs}
    for job in kinds.values():  # validating all points takes half a minute
        validate(from_composed(job.tree))
    if "tvlars_published" not in text and name not in RELEASED:
        for job in jobs:
            if job.tree["optimizer"]["name"] == "tvlars":
                config = from_composed(job.tree)
                length = planned_length(config)
                assert length is not None
                assert not [note for note in idle_options(config, *length) if "phi" in note]


# The program.


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        ("sweeps=demo seed=3", 2, "sweeps=demo: is a grid and needs -m. Fix: python launch.py -m sweeps=demo seed=3\n"),
        ("-m --help", 0, "Groups and their presets"),
        ("-m optimizer=lars,lamb --cfg job", 2, "--multirun, --cfg"),
        ("-m --config-dir . sweeps=demo", 2, "--config-dir: not allowed with -m. Fix: add presets with"),
        ("trials=3", 2, "trials: only a grid has this key. Fix: add -m"),
    ],
)
def test_mistakes_and_flags_with_and_without_m(
    tmp_path: Path, process: Programs, command: str, code: int, message: str
) -> None:
    result = process.call("launch", *command.split(), cwd=tmp_path)
    assert result.code == code
    assert message in result.output
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("seed=range(0,100000000)",), "has 100,000,000 values. Allowed: at most 10,000"),
        (("seed=range(0,1000)", "batch_size=range(1,1000)"), "the grid has 999,000 points. Allowed: at most 10,000"),
        (("optimizer.lr=interval(1,2)", "+trials=1000000000"), "the grid has 1,000,000,000 points"),
        (("seed=range(0,1,0)",), "a step other than 0"),
        (("+=",), "has no key"),
    ],
)
@pytest.mark.timeout(30)
def test_a_grid_without_an_end_is_refused_before_it_is_expanded(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        compose_grid(list(arguments), CONF)
