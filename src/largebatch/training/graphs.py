"""CUDA graphs: the host starts all kernels of a forward and backward pass at once.

The host takes 14 ms to queue an eager pass of ResNet-18, which is longer than a GPU computes. A graph records the
kernels of a pass, eager or compiled, and starts them again with one call. It needs no compiler, and the kernels and
their results are the same.

A function that can be recorded

- takes and returns tensors on the GPU, with the same shapes and layouts in each call;
- reads no number from the GPU, and draws random numbers on the GPU only, after a seed that the caller sets;
- uses other tensors only if they stay at their addresses, as parameters and buffers do;
- may add to the gradients of parameters.
"""

from __future__ import annotations

import contextlib
import random
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from largebatch.data.cache import Say
from largebatch.data.load import in_words
from largebatch.machine.memory import free_memory
from largebatch.training.micro_batch import release_memory

Tensors = tuple[Tensor, ...]
Function = Callable[..., Tensors]

_TOLERANCE = 0.02  # between an eager pass and its replay, relative: atomic additions round differently each time


class CannotRecordError(Exception):
    """A function that can't be recorded."""


class Graphs:
    """Functions of a run as CUDA graphs, recorded at their first call.

    A function that can't be recorded is called eagerly from then on, and so are the others.

    Args:
        model: the model whose parameters and buffers the functions change.
        device: the GPU.
        repeated: True if functions are called several times in a step, and gradients add up.
        off: the reason to call all functions eagerly; empty to record them.
        say: called with a line on each recorded function, and with the reason if one can't be recorded.
    """

    def __init__(self, model: nn.Module, device: torch.device, repeated: bool, off: str, say: Say) -> None:
        self._model, self._device, self._repeated, self._say = model, device, repeated, say
        self.off = off
        self._recorded: dict[Function, _Recorded] = {}

    def __call__(self, function: Function, *inputs: Tensor) -> Tensors:
        """Return ``function(*inputs)``, by a replay if it is recorded. The next call overwrites replayed results."""
        if not self.off and function not in self._recorded:
            self._record(function, inputs)
        if self.off:
            return function(*inputs)
        return self._recorded[function].replay(inputs)

    def _record(self, function: Function, inputs: Tensors) -> None:
        """Record ``function``, or set ``off``. Gradients, buffers and random state stay as they are."""
        started, stream = time.perf_counter(), torch.cuda.current_stream(self._device)
        parameters, buffers = list(self._model.parameters()), list(self._model.buffers())
        gradients, before = [p.grad for p in parameters], [buffer.clone() for buffer in buffers]
        seed = torch.cuda.get_rng_state(self._device)
        try:
            self._recorded[function], size = self._capture(function, inputs, seed)
            seconds = time.perf_counter() - started
            self._say(f"CUDA graph of the {_name(function)}: recorded in {seconds:.1f} s, keeps {in_words(size)}")
        except Exception as error:  # any error: an eager pass takes over, and shows an error of its own
            reason = str(error).strip().partition("\n")[0]
            if not isinstance(error, CannotRecordError):
                reason = f"{type(error).__name__}: {reason}"
            self.off = f"the {_name(function)} can't be recorded ({reason})"
            self._recorded.clear()
            self._say(f"no CUDA graphs: {self.off}")
        finally:
            torch.cuda.set_stream(stream)  # a failed capture leaves its own stream
            torch.cuda.set_rng_state(seed, self._device)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            for buffer, saved in zip(buffers, before, strict=True):
                buffer.copy_(saved)
        release_memory(self._device)  # of the other stream's passes

    def free(self) -> None:
        """Forget the recorded functions and their memory."""
        self._recorded.clear()

    def _capture(self, function: Function, inputs: Tensors, seed: Tensor) -> tuple[_Recorded, int]:
        """Return the recorded function, and the bytes of its memory.

        Three passes on another stream come first, as CUDA graphs need: the first chooses algorithms and compiles, the
        second adds gradients, the third measures memory and gives the expected results.

        Raises:
            CannotRecordError: if the function does what a graph can't repeat, or takes too much memory.
        """
        parameters, static = list(self._model.parameters()), tuple(tensor.clone() for tensor in inputs)
        warming = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        warming.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(warming):
            _forget_gradients(parameters)
            function(*static)
            function(*static)
            _forget_gradients(parameters)
            torch.cuda.reset_peak_memory_stats(self._device)
            held = torch.cuda.memory_allocated(self._device)
            torch.cuda.set_rng_state(seed, self._device)
            with _nothing_read(), _nothing_drawn_on_the_host():
                expected = function(*static)
            expected_gradients = [p.grad for p in parameters if p.grad is not None]
        torch.cuda.synchronize(self._device)
        size = torch.cuda.max_memory_allocated(self._device) - held
        if 2 * size > free_memory(self._device):  # the graph keeps its memory; evaluations and last batches need theirs
            raise CannotRecordError(f"a graph would keep {in_words(size)}, more than half of the free memory")

        _forget_gradients(parameters)
        pool = torch.cuda.graph_pool_handle()
        writing = _Graph.of(function, static, pool)
        changed = [p for p in parameters if p.grad is not None]
        # The memory of these gradients stays theirs, because they are kept while the second graph is recorded.
        recorded = _Recorded(static, changed, [p.grad for p in changed if p.grad is not None], writing, None)
        if changed and self._repeated:
            recorded.adding = _Graph.of(function, static, pool)

        _forget_gradients(parameters)
        torch.cuda.set_rng_state(seed, self._device)
        results = recorded.replay(inputs)
        if _differ(results, expected) or _differ(recorded.gradients, expected_gradients):
            raise CannotRecordError("a replay gives other results than the pass")
        return recorded, size


@dataclass
class _Graph:
    graph: torch.cuda.CUDAGraph
    outputs: Tensors

    @classmethod
    def of(cls, function: Function, inputs: Tensors, pool: Any) -> _Graph:
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads may use the GPU at the same time.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                outputs = function(*inputs)
        except Exception:
            with contextlib.suppress(RuntimeError):  # torch has ended it
                torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
            raise
        return cls(graph, outputs)


@dataclass
class _Recorded:
    """A recorded function: the graph that writes the gradients of ``parameters``, and the graph that adds to them."""

    inputs: Tensors
    parameters: list[nn.Parameter]
    gradients: list[Tensor]
    writing: _Graph
    adding: _Graph | None

    def replay(self, inputs: Tensors) -> Tensors:
        """Do what the function does, also to gradients: a gradient of None is set, else it is added to."""
        for static, given in zip(self.inputs, inputs, strict=True):
            static.copy_(given)
        chosen: _Graph | None = self.writing
        if self.parameters and self.parameters[0].grad is not None:
            if self.parameters[0].grad is not self.gradients[0]:
                raise RuntimeError("a CUDA graph can only add to its own gradients")
            chosen = self.adding
        assert chosen is not None
        chosen.graph.replay()
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient
        return chosen.outputs


def _forget_gradients(parameters: Sequence[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None


@contextlib.contextmanager
def _nothing_read() -> Iterator[None]:
    """Let torch raise an error for an operation that waits for the GPU. In a capture, that leaves a broken stream."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls the mode a prototype
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


@contextlib.contextmanager
def _nothing_drawn_on_the_host() -> Iterator[None]:
    """Raise ``CannotRecordError`` if random numbers were drawn on the host: a replay wouldn't draw again."""
    before = torch.get_rng_state(), random.getstate()
    yield
    if not torch.equal(before[0], torch.get_rng_state()) or before[1] != random.getstate():
        raise CannotRecordError("it draws random numbers on the host")


def _differ(results: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Return True if results are far from the expected ones, over all tensors together. NaN equals NaN."""
    if not expected:
        return False
    others = [tensor.detach().float() for tensor in expected]
    differences = torch._foreach_sub([tensor.detach().float() for tensor in results], others)
    distance, length = (torch.stack(torch._foreach_norm(tensors)).norm() for tensors in (differences, others))
    return bool(distance > _TOLERANCE * length)


def _name(function: Function) -> str:
    return function.__name__.strip("_").replace("_", " ")
