"""What layer-wise adaptive optimizers share: the walk over the parameters, norms and trust ratios, the statistics."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import chain
from numbers import Real
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

Group = dict[str, Any]
Measured = tuple[Tensor, Tensor, Tensor]  # weight norm, gradient norm and trust ratio of a layer, 0-dimensional

_HALF = (torch.float16, torch.bfloat16)


class LayerwiseOptimizer(Optimizer):
    """The common part of LARS, TVLARS and LAMB; each of them writes ``_check_group`` and ``_update_group``.

    A *layer* is a parameter that is adapted: one with more than one dimension, or any with ``adapt_1d``. State is kept
    in fp32 for fp16 and bf16 parameters, else in the parameter's own type.
    """

    def __init__(self, params: Any, defaults: Group) -> None:
        super().__init__(params, defaults)
        self._measured: dict[Tensor, Measured] = {}  # by layer, of the latest step

    def _check_group(self, group: Group) -> None:
        """Raise ``ValueError`` for a hyper-parameter of ``group`` that is out of its range."""
        raise NotImplementedError

    def _update_group(self, group: Group, parameters: list[Tensor]) -> None:
        """Update ``parameters``, those of ``group`` that have a gradient, and ``_record`` what each layer did."""
        raise NotImplementedError

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient once; ``p.grad`` is left as it was.

        Args:
            closure: evaluates the model anew, calls ``backward`` and returns the loss.

        Returns:
            What ``closure`` returned, or None.

        Raises:
            RuntimeError: for a sparse or complex gradient; then no parameter is changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with_gradient = [self._parameters_with_gradient(group) for group in self.param_groups]
        self._measured.clear()
        for group, parameters in zip(self.param_groups, with_gradient, strict=True):
            self._update_group(group, parameters)
        return loss

    def _parameters_with_gradient(self, group: Group) -> list[Tensor]:
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        for parameter in parameters:
            kind = "sparse" if parameter.grad.layout != torch.strided else "complex"
            if kind == "sparse" or parameter.grad.is_complex():
                name = next(name for name, other, _ in self._named_parameters() if other is parameter)
                raise RuntimeError(
                    f"{type(self).__name__} takes dense real gradients only, and that of {name} is {kind}; "
                    "give this parameter to another optimizer"
                )
        return parameters

    # -- statistics

    @property
    def layer_names(self) -> list[str]:
        """The layers' names, as given by ``named_parameters()``, else ``param_I`` counted over all parameters."""
        return [name for name, parameter, group in self._named_parameters() if is_adapted(parameter, group)]

    def layer_stats(self) -> dict[str, Tensor]:
        """What the latest step found in each layer, in the order of ``layer_names``.

        Returns:
            fp32 tensors of shape [number of layers], on the first layer's device: ``weight_norm`` (before the update)
            and ``gradient_norm`` (of ``p.grad``, without decay), both unclipped, and ``trust_ratio``, the factor that
            was applied. NaN where the layer had no gradient. Reading them here costs no synchronisation.
        """
        layers = [parameter for _, parameter, group in self._named_parameters() if is_adapted(parameter, group)]
        keys = ("weight_norm", "gradient_norm", "trust_ratio")
        if not layers:
            return {key: torch.empty(0) for key in keys}
        missing = torch.full((), math.nan, device=layers[0].device)
        rows = [self._measured.get(layer, (missing, missing, missing)) for layer in layers]
        return {
            key: torch.stack([row[column].to(missing) for row in rows])  # .to: of the same device and type
            for column, key in enumerate(keys)
        }

    def _record(self, layer: Tensor, measured: Measured) -> None:
        self._measured[layer] = measured

    def _named_parameters(self) -> Iterator[tuple[str, Tensor, Group]]:
        index = 0
        for group in self.param_groups:
            names = group.get("param_names")
            for place, parameter in enumerate(group["params"]):
                yield (names[place] if names else f"param_{index}"), parameter, group
                index += 1

    # -- what torch.optim.Optimizer does, and a little more

    def add_param_group(self, param_group: Group) -> None:
        """Add a group that may set any option for itself.

        Raises:
            ValueError: for a hyper-parameter out of its range; then nothing is added.
        """
        if isinstance(param_group, dict):  # torch says so if it isn't
            self._check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue exactly where ``state_dict()`` was taken."""
        super().load_state_dict(state_dict)
        # torch has cast all state to its parameter's type, which rounds the fp32 state of half-precision parameters.
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        own = chain.from_iterable(group["params"] for group in self.param_groups)
        for index, parameter in zip(saved, own, strict=True):
            if parameter.dtype in _HALF:
                for key, value in state_dict["state"].get(index, {}).items():
                    if isinstance(value, Tensor):
                        self.state[parameter][key] = value.to(parameter.device, torch.float32, copy=True)

    def __setstate__(self, state: dict[str, Any]) -> None:  # after unpickling, a deep copy and load_state_dict
        super().__setstate__(state)
        self._measured = {}


# -- parameters of one dimension


def is_adapted(parameter: Tensor, group: Group) -> bool:
    """Biases and norm parameters (at most one dimension) keep the global rate unless ``adapt_1d``."""
    return parameter.ndim > 1 or bool(group["adapt_1d"])


def is_decayed(parameter: Tensor, group: Group) -> bool:
    """Biases and norm parameters (at most one dimension) aren't decayed unless ``decay_1d``."""
    return group["weight_decay"] != 0 and (parameter.ndim > 1 or bool(group["decay_1d"]))


# -- norms and ratios; everything stays on the device


def at_least_float32(tensor: Tensor) -> Tensor:
    """``tensor``, in fp32 if it is fp16 or bf16."""
    return tensor.float() if tensor.dtype in _HALF else tensor


def norm(tensor: Tensor) -> Tensor:
    """The L2 norm of all elements, a 0-dimensional tensor."""
    # In two levels: over a large fp32 tensor at once, torch's CPU kernel is off by 4e-5 (2.4 million elements).
    if tensor.ndim > 1:
        tensor = torch.linalg.vector_norm(tensor, dim=tuple(range(1, tensor.ndim)))
    total: Tensor = torch.linalg.vector_norm(tensor)
    return total


def clipped(norm: Tensor, limit: float | None) -> Tensor:
    """``min(norm, limit)``; no limit where it is None."""
    return norm if limit is None else norm.clamp(max=limit)


def trust_ratio(coefficient: float, numerator: Tensor, denominator: Tensor) -> Tensor:
    """``coefficient * numerator / denominator``, and 1 where either norm is 0."""
    ratio = coefficient * numerator / denominator
    return torch.where((numerator == 0) | (denominator == 0), 1.0, ratio)


# -- checks of hyper-parameters


def check_non_negative(name: str, value: Any) -> None:
    if not (_is_finite(value) and value >= 0):
        raise ValueError(f"{name} must be a finite number of at least 0, got {value!r}")


def check_positive(name: str, value: Any) -> None:
    if not (_is_finite(value) and value > 0):
        raise ValueError(f"{name} must be a finite number above 0, got {value!r}")


def check_fraction(name: str, value: Any) -> None:
    if not (_is_finite(value) and 0 <= value < 1):
        raise ValueError(f"{name} must be at least 0 and below 1, got {value!r}")


def _is_finite(value: Any) -> bool:
    return isinstance(value, Real) and math.isfinite(value)
