"""The base class of the layer-wise adaptive optimizers: step, layer statistics and state."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from itertools import chain
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from largebatch.optim import unfused
from largebatch.optim.fused import fused_kernels, may_be_fused
from largebatch.optim.param_groups import (
    HALF,
    Division,
    Group,
    Part,
    check_non_negative,
    check_positive,
    is_adapted,
    parts,
)

Measured = tuple[list[Tensor], Tensor]  # layers, and their statistics as fp32 [3, layers]


class LayerwiseOptimizer(Optimizer):
    """The common part of LARS, TVLARS, CLARS and LAMB.

    A *layer* is a parameter that is adapted (see ``is_adapted``). State is kept in fp32 for fp16 and bf16 parameters,
    else in the parameter's own type. Norms of sharded parameters (FSDP2's DTensors) are those of the whole parameter.

    A subclass defines ``_check_group`` and ``_step_group``. Its arithmetic is a function named ``EQUATION`` in
    ``unfused`` (torch) and, if it has a fused step, in ``fused_cpu`` (C++) and ``fused_cuda`` (Triton).
    """

    EQUATION: ClassVar[str]  # "lars", "lamb" or "merit"
    STATE: ClassVar[tuple[str, ...]]  # keys of a parameter's state

    _measured: list[Measured]  # of the latest step
    _divisions: dict[int, Division]  # by group
    _tables: dict[Any, dict[Any, Any]]  # ``Part.tables`` by group, device and type
    _warned: bool

    _own_options: Mapping[str, Any] = MappingProxyType({})  # of a subclass, beside its base class's options

    def __init__(self, params: Any, defaults: Group) -> None:
        super().__init__(params, {**defaults, **self._own_options})
        self._forget()

    def _check_group(self, group: Group) -> None:
        """Raise ``ValueError`` for a hyper-parameter of ``group`` that is out of its range."""
        if isinstance(group["lr"], Tensor):  # its value isn't read: that would wait for the device
            if group["lr"].numel() != 1:
                raise ValueError(f"lr must be one number, got a tensor of shape {tuple(group['lr'].shape)}")
        else:
            check_non_negative("lr", group["lr"])
        check_non_negative("weight_decay", group["weight_decay"])
        for name in ("norm_clip", "max_ratio"):
            if group[name] is not None:
                check_positive(name, group[name])
        for name in ("adapt", "foreach", "fused"):
            if group[name] not in (None, True, False):
                raise ValueError(f"{name} must be None, True or False, got {group[name]!r}")
        if group["foreach"] and group["fused"]:
            raise ValueError("foreach=True and fused=True: choose one of the two")

    def _step_group(
        self, index: int, group: Group, parameters: list[Tensor], gradients: list[Tensor]
    ) -> list[Measured]:
        """Update these parameters of the group at ``index``: call ``_step_part`` for each part, return its results."""
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update every parameter that has a gradient once; ``p.grad`` is left as it was.

        Args:
            closure: function that evaluates the model again, calls ``backward`` and returns the loss.

        Returns:
            The result of ``closure``, or None.

        Raises:
            RuntimeError: for a sparse or complex gradient; then no parameter is changed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with_gradient = [self._with_gradient(group) for group in self.param_groups]  # raises before anything is changed
        # In place: torch.compile drops an assignment to an optimizer's attribute.
        self._measured.clear()
        for index, (group, found) in enumerate(zip(self.param_groups, with_gradient, strict=True)):
            self._measured.extend(self._step_group(index, group, *found))
        return loss

    def _with_gradient(self, group: Group) -> tuple[list[Tensor], list[Tensor]]:
        """Return the group's parameters that have a gradient, and the gradients."""
        found = [parameter.grad for parameter in group["params"]]
        gradients = [gradient for gradient in found if gradient is not None]
        parameters = list(group["params"])
        if len(gradients) < len(parameters):
            parameters = [parameter for parameter in parameters if parameter.grad is not None]
        layouts, types = {one.layout for one in gradients}, {one.dtype for one in gradients}
        if layouts - {torch.strided} or any(dtype.is_complex for dtype in types):
            unfit = [one.layout != torch.strided or one.is_complex() for one in gradients].index(True)
            kind = "complex" if gradients[unfit].layout == torch.strided else "sparse"
            raise RuntimeError(
                f"{type(self).__name__} requires dense real gradients; the gradient of "
                f"{self._name(parameters[unfit])} is {kind}. Fix: give this parameter to another optimizer"
            )
        return parameters, gradients

    def _states(self, parameters: list[Tensor], *names: str) -> list[dict[str, Any]]:
        """Return the parameters' states; tensors of these names are zeros at the first step."""
        states = [self.state[parameter] for parameter in parameters]
        for name in names:
            for place in [place for place, state in enumerate(states) if name not in state]:
                kind = torch.float32 if parameters[place].dtype in HALF else parameters[place].dtype
                states[place][name] = torch.zeros_like(parameters[place], dtype=kind, requires_grad=False)
        return states

    def _parts(self, index: int, group: Group, *lists: list[Tensor]) -> list[Part]:
        """Divide parameters, gradients and state of the group at ``index``."""
        known = Division() if torch.compiler.is_compiling() else self._divisions.setdefault(index, Division())
        return parts(known, group, *lists)

    def _step_part(self, index: int, group: Group, part: Part, numbers: Any) -> Measured:
        """Update a part of the group at ``index``, fused if its options and its tensors allow it."""
        kernels = self._kernels(group, part)
        if kernels is not None:
            part.tables = self._tables.setdefault((index, part.weights[0].device, part.weights[0].dtype), {})
            statistics = getattr(kernels, self.EQUATION)(part, numbers)
            # The kernels write to memory directly: tell autograd that tensors that it may have saved are changed.
            torch.autograd.graph.increment_version(chain(part.weights, *part.state))
        else:
            statistics = getattr(unfused, self.EQUATION)(part, numbers)
        return part.layers(), statistics

    def _kernels(self, group: Group, part: Part) -> Any:
        """Return the module with the fused step for this part, or None."""
        # The compiler fuses by itself, and can't trace a warning.
        if not may_be_fused(group) or torch.compiler.is_compiling():
            return None
        kernels, reason = fused_kernels(self.EQUATION, group, part)
        if kernels is None and group["fused"] and not self._warned:
            self._warned = True
            warnings.warn(f"{type(self).__name__}(fused=True) takes the unfused step instead: {reason}", stacklevel=2)
        return kernels

    # -- statistics

    @property
    def layers(self) -> list[Tensor]:
        """The parameters that are adapted, in the order of ``layer_names``."""
        return [parameter for _, parameter, group in self._named_parameters() if is_adapted(parameter, group)]

    @property
    def layer_names(self) -> list[str]:
        """The layers' names, as given by ``named_parameters()``, else ``param_I`` counted over all parameters."""
        return [name for name, parameter, group in self._named_parameters() if is_adapted(parameter, group)]

    def layer_stats(self) -> dict[str, Tensor]:
        """Return the latest step's statistics of each layer, in the order of ``layer_names``.

        Returns:
            fp32 tensors of shape [number of layers], on the first layer's device: ``weight_norm`` (before the update)
            and ``gradient_norm`` (of ``p.grad``, without decay), both unclipped, and ``trust_ratio``, the factor that
            was applied. NaN where the layer had no gradient. The call doesn't synchronise with the device.
        """
        layers = self.layers
        keys = ("weight_norm", "gradient_norm", "trust_ratio")
        if not layers:
            return {key: torch.empty(0) for key in keys}
        missing = torch.full((3, 1), math.nan, device=layers[0].device)
        table = torch.cat([*(values.to(missing.device) for _, values in self._measured), missing], dim=1)
        measured = [id(layer) for parameters, _ in self._measured for layer in parameters]
        if measured != list(map(id, layers)):  # some layers had no gradient, or the order differs
            *columns, last = table.unbind(1)
            by_id = dict(zip(measured, columns, strict=True))
            table = torch.stack([by_id.get(id(layer), last) for layer in layers], dim=1)
        return dict(zip(keys, table[:, : len(layers)].unbind(), strict=True))

    def _named_parameters(self) -> Iterator[tuple[str, Tensor, Group]]:
        index = 0
        for group in self.param_groups:
            names = group.get("param_names")
            for place, parameter in enumerate(group["params"]):
                yield (names[place] if names else f"param_{index}"), parameter, group
                index += 1

    def _name(self, parameter: Tensor) -> str:
        return next(name for name, other, _ in self._named_parameters() if other is parameter)

    # -- additions to torch.optim.Optimizer

    def add_param_group(self, param_group: Group) -> None:
        """Add a group that may set any option for itself.

        Raises:
            ValueError: for a hyper-parameter out of its range; then nothing is added.
        """
        if isinstance(param_group, dict):  # else torch raises
            self._check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue exactly where ``state_dict()`` was taken, on any device.

        Raises:
            ValueError: for the state of another optimizer, or of other parameters; then nothing is changed.
        """
        name = type(self).__name__
        for group in state_dict["param_groups"]:
            if missing := sorted(self.defaults.keys() - group.keys()):
                raise ValueError(f"this state_dict isn't from {name}: its groups have no {', '.join(missing)}")
        for state in state_dict["state"].values():
            if unknown := sorted(state.keys() - set(self.STATE)):
                raise ValueError(
                    f"this state_dict isn't from {name}: a parameter's state has "
                    f"{', '.join(unknown)}. Allowed: {', '.join(self.STATE)}"
                )
        super().load_state_dict(state_dict)
        # torch has cast all state to its parameter's type, which rounds the fp32 state of half-precision parameters.
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        own = chain.from_iterable(group["params"] for group in self.param_groups)
        for index, parameter in zip(saved, own, strict=True):
            if parameter.dtype in HALF:
                for key, value in state_dict["state"].get(index, {}).items():
                    if isinstance(value, Tensor):
                        self.state[parameter][key] = value.to(parameter.device, torch.float32, copy=True)

    def __setstate__(self, state: dict[str, Any]) -> None:  # after unpickling, a deep copy and load_state_dict
        super().__setstate__(state)
        self._forget()

    def _forget(self) -> None:
        """Reset the attributes that are no part of the state."""
        self._measured = []
        self._divisions = {}
        self._tables = {}
        self._warned = False
