"""The presets of conf/optimizer: what each sets beside its optimizer's defaults."""

from pathlib import Path

import pytest
import yaml
from conftest import configuration

FOLDER = Path(__file__).parents[2] / "conf" / "optimizer"
PRESETS = {path.stem: yaml.safe_load(path.read_text()) for path in FOLDER.glob("*.yaml")}


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_leaves_out_what_its_class_has_by_default(preset):
    kind = type(configuration(f"optimizer={preset}").optimizer)
    default = kind(name=PRESETS[preset]["name"])
    for option, value in PRESETS[preset].items():
        assert option in ("name", "library") or value != getattr(default, option)


@pytest.mark.parametrize("preset", PRESETS)
def test_numbers_are_numbers(preset):
    """YAML reads 5e-4 without a point as a string."""
    texts = {option for option, value in PRESETS[preset].items() if isinstance(value, str)}
    assert texts <= {"name", "library", "denominator"} | ({"gamma_min"} if preset == "tvlars" else set())


def test_the_published_presets_are_the_released_programs():
    lars = configuration("optimizer=lars_published").optimizer
    assert lars == type(lars)(name="lars", lr=lars.lr, weight_decay=5e-4)
    expected = {"alpha": 0.1, "delay_epochs": 0, "gamma_min": 0.0, "norm_clip": 10.0, "lmbda": 1e-3}
    tvlars = configuration("optimizer=tvlars_published").optimizer
    assert tvlars.name == "tvlars"
    assert {option: getattr(tvlars, option) for option in expected} == expected
    expected = {"bias_correction": False, "norm_clip": 10.0, "adapt_1d": True, "decay_1d": True}
    lamb = configuration("optimizer=lamb_published").optimizer
    assert lamb.name == "lamb"
    assert {option: getattr(lamb, option) for option in expected} == expected
