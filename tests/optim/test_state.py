"""State dicts of other optimizers are refused."""

import copy

import pytest
import torch

from largebatch.optim import LAMB, LARS, MERIT, TVLARS


@pytest.mark.parametrize(
    ("build", "other", "message"),
    [
        (LARS, torch.optim.SGD, "isn't from LARS: its groups have no .*trust_coefficient"),
        (TVLARS, LARS, "isn't from TVLARS: its groups have no alpha, delay"),
        (LAMB, torch.optim.AdamW, "isn't from LAMB: its groups have no .*bias_correction"),
        (LARS, LAMB, "isn't from LARS"),
        (MERIT, LAMB, "isn't from MERIT: its groups have no update_clip"),
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


@pytest.mark.parametrize("build", [LARS, TVLARS, LAMB, MERIT])
def test_a_change_of_options_or_parameters_acts_at_the_next_step(build):
    """Lists kept from step to step follow the groups, the parameters' types and which of them have a gradient."""

    def change(optimizer, first, second):
        (group,) = optimizer.param_groups
        yield
        group["adapt_1d"] = True
        yield
        group["weight_decay"], group["decay_1d"] = 0.1, True
        yield
        first.grad = None
        yield
        first.grad = torch.full_like(first, 0.5)
        group["params"][:] = [second, first]
        yield
        first.data, first.grad = first.data.bfloat16(), None
        first.grad = torch.full_like(first, 0.5)
        yield
        group["params"][:] = [second]
        yield

    def parameters():
        made = torch.nn.Parameter(torch.full((3, 2), 2.0)), torch.nn.Parameter(torch.full((3,), 2.0))
        for parameter in made:
            parameter.grad = torch.full_like(parameter, 0.5)
        return made

    kept, fresh = parameters(), parameters()
    one, other = (build(list(own), lr=0.1, weight_decay=0.0) for own in (kept, fresh))
    for _ in zip(change(one, *kept), change(other, *fresh), strict=True):
        other._forget()
        one.step()
        other.step()
        for mine, theirs in zip(kept, fresh, strict=True):
            assert torch.equal(mine, theirs)
        torch.testing.assert_close(one.layer_stats(), other.layer_stats(), rtol=0, atol=0, equal_nan=True)
