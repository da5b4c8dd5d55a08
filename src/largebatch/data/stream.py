"""Pixels for lists of indices, in order: worker processes decode files ahead of time; copies don't wait for a GPU."""

from __future__ import annotations

import itertools
import math
import multiprocessing
import multiprocessing.queues
import os
import signal
import time
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from largebatch.data.encoded import EncodedImages
from largebatch.data.file_crops import FileCrop
from largebatch.data.images import Images, MemoryImages, decode
from largebatch.data.resizing import kernel_or_none
from largebatch.errors import UserError
from largebatch.machine.pulse import waiting_for

Result = Tensor | NDArray[np.uint8] | UserError
Timed = tuple[Result, float]  # with the seconds of decoding
_CHUNK = 64  # images a worker decodes at once: several workers share a large batch


@dataclass
class DecodingTimes:
    """Times of decoded images since the last ``restart``.

    Attributes:
        images: number of decoded images that training has taken.
        seconds: seconds that the decoding processes worked on them, summed over the processes.
        waited: seconds that training waited for them.
    """

    images: int = 0
    seconds: float = 0.0
    waited: float = 0.0

    def restart(self) -> None:
        self.images, self.seconds, self.waited = 0, 0.0, 0.0


def stream(
    images: Images,
    index_lists: Iterable[Tensor],
    *,
    batch: int,
    workers: int,
    crop: FileCrop | None = None,
    times: DecodingTimes | None = None,
) -> Iterator[Tensor]:
    """Yield uint8 [n, C, S, S] for each of ``index_lists`` (int64 [n] with n at most ``batch``; may be endless).

    With ``crop``, the lists are rows of ``crop.rows``, and random crops of files, [n, views, C, S, S], are yielded.

    ``workers`` processes decode files up to two batches ahead, across steps and epochs; 0 decodes in this process.
    They hand images over in shared memory (/dev/shm), or through a pipe when that is full.

    Raises:
        UserError: from the iterator, if a file can't be read or no process can start.
        RuntimeError: from the iterator, if a decoding process ends.
    """
    if isinstance(images, MemoryImages):
        yield from (images.pixels[indices] for indices in index_lists)
        return
    times = times or DecodingTimes()
    if crop is not None:
        kernel_or_none()  # compiled and loaded here, once for all decoding processes
    ahead, here = itertools.tee(index_lists)
    chunks = (chunk.view(len(chunk), -1).tolist() for indices in ahead for chunk in torch.split(indices, _CHUNK))
    loader = DataLoader(
        _Decoder(images, crop),
        batch_size=None,
        sampler=chunks,
        num_workers=workers,
        prefetch_factor=max(2, math.ceil(2 * batch / (_CHUNK * workers))) if workers else None,
        generator=torch.Generator(),  # the default takes a number from the global generator, so a resume would differ
        worker_init_fn=_start_worker,
        collate_fn=_unchanged,
    )
    try:
        if workers:
            multiprocessing.Semaphore()  # fails before torch's iterator, which would be half made
        decoded = iter(loader)
    except OSError as error:  # no semaphores without /dev/shm, or no memory for another process
        raise UserError(
            f"dataset.workers={workers}: decoding processes can't start ({error.strerror}). They need memory, open "
            "files and a /dev/shm that can be written. Fix: dataset.workers=0 or fewer than now"
        ) from error
    try:
        for indices in here:
            try:
                begin = time.perf_counter()
                results, seconds = zip(*(_next(decoded, workers) for _ in torch.split(indices, _CHUNK)), strict=True)
                times.waited += time.perf_counter() - begin
            except RuntimeError as error:  # names the process and the signal that ended it
                raise RuntimeError(
                    f"dataset.workers={workers}: a decoding process failed ({error}). It may have run out of memory, "
                    "shared memory or open files (the log has more). Fix: dataset.workers=0 or fewer than now, or a "
                    "larger /dev/shm (docker run --shm-size)"
                ) from error
            for result in results:
                if isinstance(result, UserError):
                    raise result
            times.images += len(indices)
            times.seconds += sum(seconds)
            yield torch.cat([torch.as_tensor(result) for result in results])
    finally:
        del decoded  # ends its processes now: the traceback of an error would keep them until this process exits


def _next(decoded: Iterator[Timed], workers: int) -> Timed:
    who = "its decoding processes" if workers else "image files"
    with waiting_for(f"{who} (dataset.workers={workers}), which may be stopped or wait for a disk"):
        return next(decoded)


@dataclass(frozen=True)
class _Decoder(Dataset[Timed]):
    """Decoding in a worker process. It returns errors: a raised error would arrive wrapped in a traceback."""

    images: EncodedImages
    crop: FileCrop | None

    def __getitem__(self, rows: list[list[int]]) -> Timed:
        begin = time.perf_counter()
        return self._decoded(rows), time.perf_counter() - begin

    def _decoded(self, rows: list[list[int]]) -> Result:
        images, crop = self.images, self.crop
        try:
            if crop is None:
                decoded = [decode(images.source(i), images.channels, images.image_size) for (i,) in rows]
            else:
                decoded = [crop.cut(images.source(i), images.channels, seeds) for i, *seeds in rows]
        except UserError as error:
            return error
        pixels: NDArray[np.uint8] = np.stack(decoded)
        if get_worker_info() is None:
            return pixels
        try:
            return torch.from_numpy(pixels).share_memory_()  # type: ignore[no-untyped-call, no-any-return]
        except (RuntimeError, OSError):  # /dev/shm is full (64 MiB in a container by default) or missing
            return pixels  # through a pipe


def _unchanged(result: object) -> object:
    """Replace torch's conversion of arrays to tensors, which would need shared memory."""
    return result


def _start_worker(worker: int) -> None:
    """Set up a decoding process.

    It ignores Ctrl-C, which reaches the whole process group: the parent ends its workers, without their tracebacks.
    It ends if a result can't be handed over. The queue's thread would only drop the result, and the parent wait for it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # instead of the inherited handler of the training process
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(_end)  # type: ignore[attr-defined]


def _end(error: Exception, result: object) -> None:
    traceback.print_exception(error)
    os._exit(1)


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
