"""The mean, over samples, of the norm of each layer's gradient, by which CLARS divides."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch import distributed as dist

from largebatch.optim.group_norms import Conv, bias_group_norms, conv_group_norms, linear_group_norms, norms

_KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # exactly these: a subclass may compute something else
_PASSES = 'use method="passes"'


class SampleNorms:
    """Sum, over groups of samples, of the norm of the group's contribution to a layer's gradient.

    CLARS scales layer k by ``trust_coefficient * ||w_k|| / mean_i ||grad_k f_i(w)||``. If the loss is a mean over
    samples, ``p.grad`` is a sum over groups j of their contributions c_j, and the mean over the groups of
    ``||gradient of the group's own mean loss||`` is ``sum_j ||c_j||``. This class therefore only adds norms of
    contributions, in the scale of the backward passes. Loss scaling and accumulation,
    ``(loss / accumulation).backward()``, need no counting.

    Attach it before the first forward pass, run forward and backward passes as usual, and call ``means()`` once an
    optimizer step. ``p.grad`` isn't changed.

    - ``hooks``: one backward pass over any number of groups. Each layer must belong to one ``nn.Linear`` or
      ``nn.Conv1d/2d/3d`` that is called once a backward pass, with samples along the first dimension.
      A group is ``sample_size`` consecutive samples of a micro-batch. See ``group_norms`` for the computation.
    - ``passes``: each ``backward()`` is one group, so feed ``sample_size`` samples at a time. Any model and parameter;
      a shared parameter counts as one.

    Batch norm in training mode couples samples. With hooks, a contribution is then the gradient through the group's own
    activations, with the statistics of the micro-batch: it is exact, and contributions add up to ``p.grad``. With
    passes each group has its own statistics.

    It works inside DistributedDataParallel (pass the inner module or the replica), with ``no_sync`` and autocast, and
    with ``torch.utils.checkpoint(use_reentrant=False)``. A forward pass without gradients stores nothing, and nothing
    is kept after the backward pass.

    Args:
        model: the model, on its device; freeze parameters before.
        sample_size: samples a group. With hooks every micro-batch must be a multiple of it.
        method: ``auto`` takes hooks if every layer allows them, else passes; the attribute ``why`` has the reason.
        parameters: the layers; by default all trainable parameters of more than one dimension. Others (biases, norm
            layers) are allowed; hooks support those of linear layers and convolutions.

    Raises:
        ValueError: for a ``sample_size`` below 1, no layers, a layer that isn't a trainable parameter of the model,
            or, with ``hooks``, a layer that hooks don't support.
        RuntimeError: in a backward pass, for cases that hooks don't support: a module called twice, samples not along
            the first dimension, a micro-batch that ``sample_size`` doesn't divide.
    """

    QUANTITY = "norms"  # in log lines

    def __init__(
        self,
        model: nn.Module,
        sample_size: int = 1,
        *,
        method: Literal["auto", "hooks", "passes"] = "auto",
        parameters: Iterable[Tensor] | None = None,
    ) -> None:
        if isinstance(sample_size, bool) or not isinstance(sample_size, int) or sample_size < 1:
            raise ValueError(f"sample_size must be a whole number of at least 1, got {sample_size!r}")
        if method not in ("auto", "hooks", "passes"):
            raise ValueError(f'method must be "auto", "hooks" or "passes", got {method!r}')
        self.sample_size = sample_size
        self._names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
        self._layers = _layers(self._names, parameters)
        self._places: dict[Tensor, int] = {layer: place for place, layer in enumerate(self._layers)}
        self._sums: Tensor | None = None  # [number of layers], of this step; None before its first backward pass
        self._visits: dict[nn.Module, int] = {}  # number of the latest backward pass through each module
        self._batch = (-1, 0, "")  # the latest backward pass, its number of samples, and the module that had them
        self._modules = {module: name or type(module).__name__ for name, module in model.named_modules()}
        obstacle = _obstacle(model, self._layers, self._names)
        if method == "hooks" and obstacle:
            raise ValueError(f'method="hooks" needs layers of nn.Linear and nn.Conv modules: {obstacle}; {_PASSES}')
        self.method, self.why = method, "set by the caller"
        if method == "auto":
            self.method = "passes" if obstacle else "hooks"
            self.why = obstacle or "every layer belongs to one nn.Linear or nn.Conv module"
        if self.method == "hooks":
            self._handles = self._attach_hooks()
        else:
            self._handles = [_register(layer, partial(self._add_pass, layer)) for layer in self._layers]

    def means(self, scale: float | Tensor = 1.0) -> dict[nn.Parameter, Tensor]:
        """Return the mean over groups of each layer's gradient norm since the last call, and reset the sums.

        With ``torch.distributed`` initialised it is the mean over all ranks, like the loss of DistributedDataParallel,
        and every rank must call it. The call doesn't synchronise with the device.

        Args:
            scale: the factor of the loss, as ``GradScaler.get_scale()``. It may be a 0-dimensional tensor.

        Returns:
            0-dimensional fp32 tensors, on the model's device.

        Raises:
            RuntimeError: if no backward pass has run since the last call.
        """
        sums, self._sums = self._sums, None
        if sums is None:
            raise RuntimeError("no backward pass since the last call of means(), or since SampleNorms was created")
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(sums)
            sums /= dist.get_world_size()
        sums /= scale
        return dict(zip(self._layers, sums.unbind(), strict=True))

    def without_samples(self) -> None:
        """Count a backward pass of another process, where this process has no samples, so that ``means`` is allowed."""
        if self._sums is None:
            self._sums = self._zeros()

    def forget(self) -> None:
        """Reset the sums since the last call of ``means``, because the step is run again."""
        self._sums = None

    def remove(self) -> None:
        """Remove the hooks from the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _zeros(self) -> Tensor:
        return torch.zeros(len(self._layers), device=self._layers[0].device)

    def _add(self, layer: Tensor, norm: Tensor) -> None:
        if self._sums is None:
            self._sums = self._zeros()
        self._sums[self._places[layer]] += norm

    # -- method "passes"

    @torch.no_grad()
    def _add_pass(self, layer: nn.Parameter, gradient: Tensor) -> None:
        self._add(layer, norms(gradient[None, ..., None])[0])

    # -- method "hooks"

    def _attach_hooks(self) -> list[Any]:
        handles: list[Any] = []
        for module in self._modules:
            layers = [layer for layer in module.parameters(recurse=False) if layer in self._places]
            if layers:
                handles.append(module.register_forward_hook(self._forward, with_kwargs=True))
                handles += [_register(layer, partial(self._check_visited, module, layer)) for layer in layers]
        return handles

    def _forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        if output.requires_grad:
            inputs = args[0] if args else kwargs["input"]
            held = [_held(inputs)]
            _register(output, partial(self._backward, cast(nn.Linear | Conv, module), held))

    @torch.no_grad()
    def _backward(self, module: nn.Linear | Conv, held: list[Any], gradient: Tensor) -> None:
        """Measure one module, given the gradient with respect to its output."""
        name = self._modules[module]
        if not held:
            raise RuntimeError(f"a second backward pass through the same graph, at {name}: hooks allow one; {_PASSES}")
        anchor = held.pop()  # popped: the graph may outlive its backward pass
        (inputs,) = anchor.grad_fn.saved_tensors
        if inputs.ndim < (
            2 if isinstance(module, nn.Linear) else module.weight.ndim
        ):  # one sample, without a dimension of samples
            inputs, gradient = inputs[None], gradient[None]
        self._check_backward(module, name, len(inputs))
        if len(inputs) == 0:
            self.without_samples()
            return
        with torch.autocast(inputs.device.type, enabled=False):
            self._measure(module, inputs, gradient)

    def _measure(self, module: nn.Linear | Conv, inputs: Tensor, gradient: Tensor) -> None:
        """Add the norms of one module's groups, given its input and the gradient with respect to its output."""
        linear = isinstance(module, nn.Linear)
        if module.weight in self._places:
            if linear:
                found = linear_group_norms(inputs, gradient, self.sample_size)
            else:
                found = conv_group_norms(inputs, gradient, self.sample_size, cast(Conv, module))
            self._add(module.weight, found.sum())
        if module.bias is not None and module.bias in self._places:
            found = bias_group_norms(gradient, self.sample_size, channels=-1 if linear else 1)
            self._add(module.bias, found.sum())

    def _check_backward(self, module: nn.Module, name: str, samples: int) -> None:
        task = torch._C._current_graph_task_id()  # a number for each call of backward()
        if self._visits.get(module) == task:
            raise RuntimeError(f"{name} was called twice in one backward pass, which hooks don't support; {_PASSES}")
        self._visits[module] = task
        if self._batch[0] != task:
            self._batch = (task, samples, name)
        elif self._batch[1] != samples:
            raise RuntimeError(
                f"{name} got {samples} rows along its first dimension, but {self._batch[2]} got {self._batch[1]}: "
                f"hooks need one row per sample; {_PASSES}"
            )
        if samples % self.sample_size:
            raise RuntimeError(f"a micro-batch of {samples} samples isn't a multiple of sample_size={self.sample_size}")

    def _check_visited(self, module: nn.Module, layer: nn.Parameter, gradient: Tensor) -> None:
        if self._visits.get(module) != torch._C._current_graph_task_id():
            raise RuntimeError(
                f"{self._names[layer]} got a gradient though its module wasn't called: it is used outside its module, "
                f"which hooks don't support; {_PASSES}"
            )


def _register(tensor: Tensor, hook: Callable[[Tensor], None]) -> Any:
    """Call ``hook`` with the gradient with respect to ``tensor``, once a backward pass."""
    return tensor.register_hook(hook)  # type: ignore[no-untyped-call]


class _Held(torch.autograd.Function):
    """Saves a tensor as a layer saves its input, so that checkpointing and offloading treat both alike."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, tensor: Tensor) -> Tensor:
        ctx.save_for_backward(tensor)
        return anchor.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise NotImplementedError("this function has no gradient")


def _held(tensor: Tensor) -> Any:
    """Return an empty tensor whose graph node has saved ``tensor``; torch frees both together."""
    return _Held.apply(torch.empty(0, requires_grad=True), tensor.detach())


# -- layers and methods


def _layers(names: dict[Tensor, str], wanted: Iterable[Tensor] | None) -> list[nn.Parameter]:
    if wanted is None:
        wanted = [parameter for parameter in names if parameter.requires_grad and parameter.ndim > 1]
    layers = list(dict.fromkeys(wanted))
    for layer in layers:
        if layer not in names or not layer.requires_grad:
            what = f"{names[layer]} is frozen" if layer in names else f"a tensor of shape {list(layer.shape)} isn't"
            raise ValueError(f"the layers must be trainable parameters of the model: {what}")
    if not layers:
        raise ValueError("no layers: the model has no trainable weight of two or more dimensions, or parameters=[]")
    return cast(list[nn.Parameter], layers)


def _obstacle(model: nn.Module, layers: list[nn.Parameter], names: dict[Tensor, str]) -> str:
    """Return the reason why hooks don't support the first such layer; empty if they support all."""
    owners: dict[nn.Parameter, list[nn.Module]] = {layer: [] for layer in layers}
    for module in model.modules():
        for _, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if parameter in owners:
                owners[parameter].append(module)
    for layer, modules in owners.items():
        if len(modules) > 1:
            return f"{names[layer]} is shared"
        (owner,) = modules
        if type(owner) not in _KINDS:
            return f"{names[layer]} belongs to {type(owner).__name__}"
        if layer is not owner.weight and layer is not owner.bias:
            return f"{names[layer]} isn't the weight or bias of its {type(owner).__name__}"
    return ""
