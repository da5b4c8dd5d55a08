"""Processes of one run: rank, sums over processes, batch statistics over processes."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from largebatch.errors import UserError

T = TypeVar("T")
_PATIENCE = timedelta(days=1)


def start(device: str) -> tuple[int, int, torch.device]:
    """Join the process group from the launcher's environment; return rank, processes and this process's device.

    A run of one process has no group.
    """
    rank, processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    where = torch.device("cpu")
    if device == "cuda":
        where = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(where)
    if processes > 1:
        # gloo in addition to nccl: small sums of host tensors must not wait for the device.
        backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
        # The launcher ends a rank that hangs sooner, and names it.
        dist.init_process_group(backend, timeout=_PATIENCE, device_id=where if device == "cuda" else None)
    return rank, processes, where


def processes() -> int:
    """Return the number of processes of the run, on all machines."""
    return dist.get_world_size() if dist.is_initialized() else 1


def processes_here() -> int:
    """Return the number of the run's processes on this machine; they share its memory and cores."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def sum_over_processes(values: Tensor) -> Tensor:
    """Sum ``values`` over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def gather_rows(values: Tensor, rows: list[int]) -> Tensor:
    """Concatenate the ``values`` [rows[rank], ...] of all processes, in every process."""
    if not dist.is_initialized():
        return values
    padded = values.new_zeros(max(rows), *values.shape[1:])
    padded[: len(values)] = values
    gathered = [torch.empty_like(padded) for _ in rows]
    dist.all_gather(gathered, padded)
    return torch.cat([part[:n] for part, n in zip(gathered, rows, strict=True)])


def smallest_over_processes(value: Tensor) -> float:
    if dist.is_initialized():
        dist.all_reduce(value, op=dist.ReduceOp.MIN)
    return float(value)


def any_process(here: bool) -> bool:
    """Return True if ``here`` is True in any process; every process must call this."""
    # On the host, without a wait for the device.
    return here if not dist.is_initialized() else smallest_over_processes(torch.tensor(float(not here))) == 0


def from_rank_0(value: T) -> T:
    """Return rank 0's ``value`` in every process."""
    if not dist.is_initialized():
        return value
    held = [value]
    dist.broadcast_object_list(held, src=0, device=torch.device("cpu"))
    return held[0]


def average_gradients(model: nn.Module) -> None:
    """Average the gradients over processes after the backward pass; DDP does so during it.

    A process without images has no gradients, which count as zero.
    """
    if not dist.is_initialized():
        return
    for p in model.parameters():
        if p.requires_grad and p.grad is None:
            p.grad = torch.zeros_like(p)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    means = torch.split(flat, [gradient.numel() for gradient in gradients])
    for gradient, mean in zip(gradients, means, strict=True):
        gradient.copy_(mean.view(gradient.shape))


def replicate(model: nn.Module, example: Tensor) -> nn.Module:
    """Return ``model`` with gradients averaged over the run's processes; with one process, ``model`` itself.

    DDP rebuilds its buckets after the first backward pass, which changes the order of sums over three or more
    processes. A backward pass of ``example`` [n, C, H, W] triggers this here. A resumed run then sums like an
    uninterrupted one.
    """
    if not dist.is_initialized():
        return model
    # gradient_as_bucket_view avoids a copy of the gradients. broadcast_buffers=False: RunningStatistics averages the
    # buffers of batch norm, and evaluation takes rank 0's other buffers (share_buffers).
    replica = DistributedDataParallel(model, gradient_as_bucket_view=True, broadcast_buffers=False)
    replica.eval()  # leaves the running statistics unchanged
    replica(example).sum().backward()
    replica.zero_grad(set_to_none=True)
    return replica


def share_buffers(model: nn.Module) -> None:
    """Copy rank 0's buffers to every process: buffers may differ because the processes see other images."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


class _SumOverProcesses(torch.autograd.Function):
    """All-reduce whose gradient is the all-reduce of the gradient."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm with statistics over all processes, on any device; torch's SyncBatchNorm doesn't support the CPU.

    Input [B, C, ...]; B may differ between processes and be 0. Training mode computes mean and (biased) variance over
    processes, batch and positions; the running variance is the unbiased one, as in ``torch.nn.BatchNorm2d``.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2 dimensions, got {input.dim()}")

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or not dist.is_initialized():
            return super().forward(input)
        self._check_input_dim(input)
        dims = [0, *range(2, input.dim())]
        shape = [1, -1, *[1] * (input.dim() - 2)]
        values = input.float()
        here = values.new_tensor([values.numel() / values.shape[1]])
        total = _SumOverProcesses.apply(torch.cat([values.sum(dims), here]))
        count = total[-1].detach()
        mean = total[:-1] / count
        centred = values - mean.view(shape)
        variance = _SumOverProcesses.apply(centred.square().sum(dims)) / count
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            momentum = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean.detach(), momentum)
            self.running_var.lerp_(variance.detach() * count / (count - 1).clamp(min=1), momentum)
        normalised = centred * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            normalised = normalised * self.weight.view(shape) + self.bias.view(shape)
        return cast(Tensor, normalised.to(input.dtype))


def synchronise_batch_norm(model: nn.Module, device: torch.device) -> nn.Module:
    """Replace the batch-norm layers of ``model`` by layers with statistics over all processes.

    Raises:
        UserError: on CPU, for a model with its own batch-norm class (some timm models).
    """
    if device.type == "cuda":
        if type(model).__module__.startswith("timm."):
            from timm.layers import convert_sync_batchnorm

            return cast(nn.Module, convert_sync_batchnorm(model))
        return cast(nn.Module, nn.SyncBatchNorm.convert_sync_batchnorm(model))  # type: ignore[no-untyped-call]
    for name, child in model.named_children():
        if type(child) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
            assert isinstance(child, nn.modules.batchnorm._BatchNorm)
            sync = SyncBatchNorm(child.num_features, child.eps, child.momentum, child.affine, child.track_running_stats)
            sync.load_state_dict(child.state_dict())
            setattr(model, name, sync)
        elif isinstance(child, nn.modules.batchnorm._BatchNorm):
            raise UserError(f"sync_bn=true: {type(child).__name__} can't be synchronised on CPU; use a GPU")
        else:
            synchronise_batch_norm(child, device)
    return model
