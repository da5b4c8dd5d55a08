"""Checkpoints of a run: written atomically in the background; the newest two are kept."""

from __future__ import annotations

import copy
import os
import pickle
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

KEPT = 2


class CheckpointWriter:
    """Writer of checkpoints in a thread, from a copy of the state that later steps can't change.

    Training waits only for the copy, and on a GPU only for queueing it: the thread waits for the device. If a write is
    still running at the next save, training waits for it too. Saves reuse the copy's memory. A writer therefore holds
    as much host memory as a checkpoint has bytes, pinned for tensors on a GPU.

    The next ``save`` or ``wait``, or the end of the context, raises the thread's errors, such as the ``OSError`` of a
    full disk. If an exception ends the context, that exception gets a note about the thread's error. Use the writer as
    a context manager, else an error of the last write is lost. The interpreter exits only after a write.

    Args:
        folder: folder of the run's checkpoints, for one writer. A killed writer's partial files are removed.
        device: device of the model. The state can have tensors on other devices too.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self._folder = folder
        self._device = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0"
        self._buffers: list[Tensor] = []  # uint8 [bytes], one for each storage of the last state
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint", initializer=_give_way)
        self._writing: Future[None] | None = None
        for leftover in folder.glob("step-*.tmp"):
            leftover.unlink()

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self.wait()
        except Exception as failure:
            if error is None:
                raise
            error.add_note(f"The last checkpoint is missing too: {type(failure).__name__}: {failure}")
        finally:
            self._thread.shutdown()

    def save(
        self, step: int, state: dict[str, Any], first: Callable[[], None] | None = None, best: Path | None = None
    ) -> None:
        """Write the present ``state`` as the checkpoint after optimizer step ``step``.

        The copy keeps shapes, strides and shared memory. A shared storage is copied and written once, and completely
        even if the state has only a part of it. Loaded tensors are detached.

        Args:
            step: optimizer steps done.
            state: tensors and plain values, in any nesting of dicts, lists and tuples.
            first: called in the thread before the write, to write files that the checkpoint relies on.
            best: path of a second name for this checkpoint, kept after newer checkpoints replace it.
        """
        self.wait()
        copied = self._copy({"step": step, **state})
        done = None
        if self._device.type == "cuda":
            done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            done.record(torch.cuda.current_stream(self._device))

        def write() -> None:
            if first is not None:
                first()
            if done is not None:
                done.synchronize()
            path = save_checkpoint(self._folder, step, copied)
            if best is not None:
                _keep(path, best)

        self._writing = self._thread.submit(write)

    def wait(self) -> None:
        """Wait until all saved checkpoints are on disk."""
        if self._writing is not None:
            wait_for([self._writing])  # before the reset: after an interrupt here, the writer can wait again
            writing, self._writing = self._writing, None
            writing.result()

    def _copy(self, state: dict[str, Any]) -> dict[str, Any]:
        """Return a copy of ``state`` in host memory. Copies of tensors on the writer's GPU are only queued."""
        old, self._buffers = self._buffers, []
        places: dict[int, Tensor] = {}  # the buffer of each storage
        copies: dict[int, Any] = {}  # by the original's id, as in deepcopy's memo
        for tensor in _tensors(state):
            storage = tensor.untyped_storage()
            if storage._cdata not in places:  # torch.save distinguishes storages in the same way
                number = len(self._buffers)
                buffer = _buffer(storage, old[number] if number < len(old) else None)
                content = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
                if storage.device.type == "cpu":
                    buffer.numpy()[:] = content.numpy()  # one thread: torch's threads wait for each other on busy cores
                else:
                    buffer.copy_(content, non_blocking=storage.device == self._device)
                places[storage._cdata] = buffer
                self._buffers.append(buffer)
            host = places[storage._cdata].untyped_storage()
            copies[id(tensor)] = torch.empty(0, dtype=tensor.dtype).set_(
                host, tensor.storage_offset(), tensor.size(), tensor.stride()
            )
        return copy.deepcopy(state, copies)  # copies all that isn't in copies yet


def save_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Write ``state`` (tensors and plain values only) as the checkpoint after optimizer step ``step``. Return its path.

    Raises:
        OSError: if the file can't be written. Earlier checkpoints stay intact.
    """
    folder.mkdir(exist_ok=True)
    path = folder / f"step-{step:08d}.pt"
    temporary = path.with_suffix(".tmp")
    try:
        # With a path instead of a Python file, torch writes without the interpreter's lock, which training needs.
        torch.save({"step": step, **state}, temporary)
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())  # the content must reach the disk before the rename
        os.replace(temporary, path)
    except RuntimeError as error:  # from torch's file writer, without the cause
        free = shutil.disk_usage(folder).free
        raise OSError(f"{path} can't be written ({error}); {free / 1e6:.0f} MB are free on the disk") from error
    finally:
        temporary.unlink(missing_ok=True)
    for old in _newest_first(folder)[KEPT:]:
        old.unlink()
    return path


def load_newest(folder: Path, device: torch.device, say: Callable[[str], None]) -> dict[str, Any] | None:
    """Return the newest readable checkpoint, or None. Name damaged checkpoints through ``say`` and skip them."""
    for path in _newest_first(folder):
        try:
            state = torch.load(path, map_location=device, weights_only=True)
        except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
            say(f"{path} can't be read ({error}); trying the previous checkpoint")
            continue
        assert isinstance(state, dict)
        return state
    return None


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.pt"), reverse=True)


def _give_way() -> None:
    """Lower the thread's priority: a training step during a write then takes a tenth longer instead of half."""
    if sys.platform == "linux":  # only on Linux does a thread have its own priority
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


def _keep(checkpoint: Path, name: Path) -> None:
    """Link ``checkpoint`` as ``name``, replacing that file. Copy it if the file system has no hard links."""
    temporary = name.with_suffix(".tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(checkpoint, temporary)
    except OSError:
        shutil.copyfile(checkpoint, temporary)
    os.replace(temporary, name)


def _tensors(state: Any) -> Iterator[Tensor]:
    """Yield the tensors that are plain views of a storage; deepcopy copies others (sparse, subclasses)."""
    if type(state) in (Tensor, nn.Parameter):
        if state.layout is torch.strided and not (state.is_quantized or state.is_conj() or state.is_neg()):
            yield state
    elif isinstance(state, dict):
        for value in state.values():
            yield from _tensors(value)
    elif isinstance(state, list | tuple):
        for value in state:
            yield from _tensors(value)


def _buffer(storage: torch.UntypedStorage, old: Tensor | None) -> Tensor:
    """Return host memory for ``storage``, uint8 [bytes]: ``old`` if it fits; new memory costs more than a copy."""
    pinned = storage.device.type == "cuda"
    if old is not None and old.numel() == storage.nbytes() and old.is_pinned() == pinned:
        return old
    return torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=pinned)
