"""The base class of optimizers for which the training loop measures groups of samples before each step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from largebatch.optim.layerwise import LayerwiseOptimizer
from largebatch.optim.param_groups import Group, is_adapted
from largebatch.optim.sample_norms import SampleNorms


class MeasuredOptimizer(LayerwiseOptimizer):
    """The common part of CLARS, VR-LARS and VR-LAMB: a tensor for each layer, given before each step."""

    MEASURE: ClassVar[type[SampleNorms]]  # measures these tensors during backward passes
    GIVEN: ClassVar[str]  # the tensors, in messages
    GIVE: ClassVar[str]  # the call that gives them, in messages

    _given: dict[Any, Tensor]

    def give(self, means: Mapping[Any, Tensor]) -> None:
        """Set the mean of each layer, as ``MEASURE`` returns it, for the next step only."""
        self._given.clear()  # in place, as everywhere: see LayerwiseOptimizer.step
        self._given.update(means)

    def step(self, closure: Any = None) -> Any:
        """Update every parameter that has a gradient once, as ``torch.optim.Optimizer.step``.

        Raises:
            RuntimeError: if a layer with a gradient wasn't measured, and as in ``LARS``.
        """
        loss = super().step(closure)
        self._given.clear()
        return loss

    def _with_gradient(self, group: Group) -> tuple[list[Tensor], list[Tensor]]:
        parameters, gradients = super()._with_gradient(group)
        for layer in parameters:
            if is_adapted(layer, group) and layer not in self._given:
                measure = self.MEASURE.__name__
                raise RuntimeError(
                    f"{type(self).__name__} has no {self.GIVEN} of {self._name(layer)} for this step: between "
                    f"backward() and step(), call {self.GIVE}(norms.means()), with norms = {measure}(model, ...)"
                )
        return parameters, gradients

    def _forget(self) -> None:
        super()._forget()
        self._given = {}
