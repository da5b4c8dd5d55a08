"""The presets of conf/optimizer are complete and as in docs/optimizers.md."""

from pathlib import Path

import pytest
import yaml

from largebatch.config.choices import OPTIMIZER_OPTIONS, TIMM_OPTIMIZER_OPTIONS

FOLDER = Path(__file__).parents[2] / "conf" / "optimizer"
PRESETS = {path.stem: yaml.safe_load(path.read_text()) for path in FOLDER.glob("*.yaml")}


def test_there_is_a_preset_for_every_optimizer():
    published = {"tvlars_published", "lamb_published"}
    named = {name for options in OPTIMIZER_OPTIONS.values() for name in options}
    assert set(PRESETS) >= named | published | {"timm"}


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_gives_every_option_of_its_optimizer_and_no_other(preset):
    given = PRESETS[preset]
    library, name = given["library"], given["name"]
    options = TIMM_OPTIMIZER_OPTIONS if library == "timm" else OPTIMIZER_OPTIONS[library][name]
    assert set(given) == {"name", "library", "lr", *options}
    unset = {option for option, value in given.items() if value is None}
    assert unset <= {"norm_clip", "max_ratio"}
    assert given["lr"] > 0


@pytest.mark.parametrize("preset", PRESETS)
def test_numbers_are_numbers(preset):
    """YAML reads 5e-4 without a point as a string."""
    texts = {option for option, value in PRESETS[preset].items() if isinstance(value, str)}
    assert texts <= {"name", "library", "denominator"} | ({"gamma_min"} if preset == "tvlars" else set())


def test_the_published_presets_are_the_released_programs():
    expected = {"alpha": 0.1, "delay_epochs": 0, "gamma_min": 0.0, "norm_clip": 10.0, "lmbda": 1e-3}
    tvlars = PRESETS["tvlars_published"]
    assert tvlars["name"] == "tvlars"
    assert {option: tvlars[option] for option in expected} == expected
    expected = {"bias_correction": False, "norm_clip": 10.0, "adapt_1d": True, "decay_1d": True}
    lamb = PRESETS["lamb_published"]
    assert lamb["name"] == "lamb"
    assert {option: lamb[option] for option in expected} == expected
