"""State dicts of the first version, and of other optimizers."""

import copy

import pytest
import torch

from largebatch.optim import LAMB, LARS, TVLARS

# Each group's options in version 0.1, before there was a choice of denominators or of ways to carry out a step.
FIRST_LARS = {
    "lr": 0.5, "momentum": 0.9, "weight_decay": 0.01, "trust_coefficient": 0.001, "adapt_1d": False, "decay_1d": False,
    "norm_clip": None, "nesterov": False,
}  # fmt: skip
FIRST = {
    LARS: FIRST_LARS,
    TVLARS: FIRST_LARS | {"lmbda": 0.1, "alpha": 1.0, "delay": 4, "gamma_min": 0.0, "step": 6},
    LAMB: {
        "lr": 0.5, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.01, "bias_correction": True,
        "adapt_1d": False, "decay_1d": False, "norm_clip": None,
    },
}  # fmt: skip
STATE = {LARS: ("momentum_buffer",), TVLARS: ("momentum_buffer",), LAMB: ("exp_avg", "exp_avg_sq")}


def first_version(optimizer):
    """A state dict as version 0.1 wrote it after six steps."""
    values = {name: torch.full((3, 2), 0.01 * (1 + i)) for i, name in enumerate(STATE[optimizer])}
    state = values | ({"step": 6} if optimizer is LAMB else {})
    return {"state": {0: state}, "param_groups": [FIRST[optimizer] | {"params": [0], "param_names": ["weight"]}]}


def next_step(optimizer, weight):
    weight.grad = torch.full((3, 2), 0.5)
    optimizer.step()
    return weight.detach().clone()


@pytest.mark.parametrize("build", FIRST)
def test_the_first_versions_state_is_continued(build):
    """With the new options at what the first version did."""
    weight = torch.nn.Parameter(torch.ones(3, 2))
    old = build([("weight", weight)], lr=9.0)
    old.load_state_dict(first_version(build))
    continued = next_step(old, weight)

    options = {key: value for key, value in FIRST[build].items() if key != "step"}
    twin = torch.nn.Parameter(torch.ones(3, 2))
    new = build([("weight", twin)], **options)
    new.state[twin].update(copy.deepcopy(first_version(build)["state"][0]))
    if build is TVLARS:
        new.param_groups[0]["step"] = 6
    assert torch.equal(next_step(new, twin), continued)
    assert old.state_dict()["param_groups"][0].keys() == new.state_dict()["param_groups"][0].keys()


@pytest.mark.parametrize(
    ("build", "other", "said"),
    [
        (LARS, torch.optim.SGD, "not of LARS: its groups have no .*trust_coefficient"),
        (TVLARS, LARS, "not of TVLARS: its groups have no alpha, delay"),
        (LAMB, torch.optim.AdamW, "not of LAMB: its groups have no .*bias_correction"),
        (LARS, LAMB, "not of LARS"),
    ],
)
def test_the_state_of_another_optimizer_is_refused(build, other, said):
    def used(optimizer_class):
        weight = torch.nn.Parameter(torch.ones(3, 2))
        optimizer = optimizer_class([weight], lr=0.1)
        next_step(optimizer, weight)
        return optimizer

    optimizer = used(build)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=said):
        optimizer.load_state_dict(used(other).state_dict())
    assert str(optimizer.state_dict()) == str(before)


def test_state_that_belongs_to_no_such_optimizer_is_refused():
    weight = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = LARS([weight], lr=0.1)
    state = optimizer.state_dict()
    state["state"] = {0: {"square_avg": torch.ones(3, 2)}}
    with pytest.raises(ValueError, match="it keeps square_avg for a parameter, and LARS keeps momentum_buffer"):
        optimizer.load_state_dict(state)
