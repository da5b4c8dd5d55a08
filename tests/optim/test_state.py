"""State dicts of other optimizers are refused."""

import copy

import pytest
import torch

from largebatch.optim import LAMB, LARS, TVLARS


@pytest.mark.parametrize(
    ("build", "other", "message"),
    [
        (LARS, torch.optim.SGD, "isn't from LARS: its groups have no .*trust_coefficient"),
        (TVLARS, LARS, "isn't from TVLARS: its groups have no alpha, delay"),
        (LAMB, torch.optim.AdamW, "isn't from LAMB: its groups have no .*bias_correction"),
        (LARS, LAMB, "isn't from LARS"),
    ],
)
def test_the_state_of_another_optimizer_is_refused(build, other, message):
    def used(optimizer_class):
        weight = torch.nn.Parameter(torch.ones(3, 2))
        optimizer = optimizer_class([weight], lr=0.1)
        weight.grad = torch.full((3, 2), 0.5)
        optimizer.step()
        return optimizer

    optimizer = used(build)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(used(other).state_dict())
    assert str(optimizer.state_dict()) == str(before)


def test_an_unknown_key_of_state_is_refused():
    weight = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = LARS([weight], lr=0.1)
    state = optimizer.state_dict()
    state["state"] = {0: {"square_avg": torch.ones(3, 2)}}
    with pytest.raises(ValueError, match=r"state has square_avg\. Allowed: momentum_buffer"):
        optimizer.load_state_dict(state)
