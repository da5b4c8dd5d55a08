"""Pixels for lists of indices, in order: worker processes decode files ahead of time; copies don't wait for a GPU."""

from __future__ import annotations

import itertools
import math
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from largebatch.data.images import FileImages, Images, MemoryImages, decode
from largebatch.errors import UserError

_CHUNK = 64  # images a worker decodes at once: several workers share a large batch


def stream(images: Images, index_lists: Iterable[Tensor], *, batch: int, workers: int) -> Iterator[Tensor]:
    """Yield uint8 [n, C, S, S] for each of ``index_lists`` (int64 [n] with n at most ``batch``; may be endless).

    ``workers`` processes decode files up to two batches ahead, across steps and epochs; 0 decodes in this process.

    Raises:
        UserError: from the iterator, if a file can't be read.
    """
    if isinstance(images, MemoryImages):
        yield from (images.pixels[indices] for indices in index_lists)
        return
    ahead, here = itertools.tee(index_lists)
    chunks = (chunk.tolist() for indices in ahead for chunk in torch.split(indices, _CHUNK))
    loader = DataLoader(
        _Decoder(images),
        batch_size=None,
        sampler=chunks,
        num_workers=workers,
        prefetch_factor=max(2, math.ceil(2 * batch / (_CHUNK * workers))) if workers else None,
        generator=torch.Generator(),  # the default takes a number from the global generator, so a resume would differ
        worker_init_fn=_leave_signals_to_the_parent,
    )
    decoded = iter(loader)
    for indices in here:
        results = [next(decoded) for _ in torch.split(indices, _CHUNK)]
        for result in results:
            if isinstance(result, UserError):
                raise result
        yield torch.cat(results)


@dataclass(frozen=True)
class _Decoder(Dataset[Tensor | UserError]):
    """Decoding in a worker process. It returns errors: a raised error would arrive wrapped in a traceback."""

    images: FileImages

    def __getitem__(self, indices: list[int]) -> Tensor | UserError:
        images = self.images
        try:
            decoded = [decode(images.paths[i], images.channels, images.image_size) for i in indices]
        except UserError as error:
            return error
        return torch.from_numpy(np.stack(decoded))


def _leave_signals_to_the_parent(worker: int) -> None:
    """Ignore Ctrl-C, which reaches the whole process group: the parent ends its workers, without their tracebacks."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # instead of the inherited handler of the training process


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy ``tensor`` to ``device``; to a GPU from pinned memory, in the order of its stream."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def one_ahead(tensors: Iterator[Tensor], device: torch.device) -> Iterator[Tensor]:
    """Yield each of ``tensors`` (host memory) on ``device``; a GPU copies on another stream, one tensor ahead."""
    if device.type != "cuda":
        yield from (tensor.to(device) for tensor in tensors)
        return
    copying = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def upload(tensor: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        with torch.cuda.stream(copying):
            return to_device(tensor, device), copying.record_event()

    uploads = map(upload, tensors)
    coming = next(uploads, None)
    while coming is not None:
        uploaded, done = coming
        coming = next(uploads, None)
        using = torch.cuda.current_stream(device)
        using.wait_event(done)
        uploaded.record_stream(using)  # so that its memory isn't reused while it is read
        yield uploaded
