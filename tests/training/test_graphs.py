"""The inputs and gradients of a recorded pass, without a GPU: a list of operations stands for its CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from largebatch.training.graphs import Graphs, _Graph, _Recorded

CPU = torch.device("cpu")


class Operations:
    def __init__(self, replay: Callable[[], Any]) -> None:
        self.replay = replay


def recorded(weight: nn.Parameter) -> _Recorded:
    """Return a pass that returns twice its input, and whose gradient is its input."""
    static, gradient, results = torch.zeros(2), torch.zeros(2), [torch.zeros(2), torch.zeros(2)]

    def graph(result: Tensor, take: Callable[[Tensor], Tensor]) -> _Graph:
        def replay() -> None:
            take(static)
            result.copy_(2 * static)

        return _Graph(cast(Any, Operations(replay)), (result,))

    writing, adding = graph(results[0], gradient.copy_), graph(results[1], gradient.add_)
    return _Recorded((static,), [weight], [gradient], writing, adding)


def test_a_replay_sets_a_gradient_of_none_and_adds_to_its_own() -> None:
    """A pass does so too: the optimizer's ``zero_grad`` sets gradients to None, and accumulation adds."""
    weight = nn.Parameter(torch.ones(2))
    passes = recorded(weight)
    for _ in range(2):
        weight.grad = None
        (first,) = passes.replay((torch.tensor([1.0, 2.0]),))
        assert first.tolist() == [2.0, 4.0]
        assert weight.grad is passes.gradients[0]
        (second,) = passes.replay((torch.tensor([10.0, 20.0]),))
        assert second.tolist() == [20.0, 40.0]
        assert weight.grad.tolist() == [11.0, 22.0]


def test_a_replay_does_not_add_to_a_gradient_of_another_pass() -> None:
    weight = nn.Parameter(torch.ones(2))
    passes = recorded(weight)
    weight.grad = torch.ones(2)
    with pytest.raises(RuntimeError, match="its own gradients"):
        passes.replay((torch.ones(2),))


def test_a_graph_takes_inputs_of_its_own_number_only() -> None:
    with pytest.raises(ValueError, match="argument"):
        recorded(nn.Parameter(torch.ones(2))).replay((torch.ones(2), torch.ones(2)))


def test_with_a_reason_against_graphs_functions_are_called() -> None:
    calls: list[Tensor] = []
    lines: list[str] = []

    def function(values: Tensor) -> tuple[Tensor]:
        calls.append(values)
        return (values,)

    graphs = Graphs(nn.Linear(1, 1), CPU, repeated=False, off="they need a GPU", say=lines.append)
    values = torch.ones(1)
    assert graphs(function, values) == (values,)
    assert len(calls) == 1
    assert lines == []
