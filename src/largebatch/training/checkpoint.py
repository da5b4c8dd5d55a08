"""Checkpoints of a run: written atomically in the background, the newest two kept, a damaged one passed over."""

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
    """Writes checkpoints in a thread, from a copy of the state that later steps can't change.

    Training waits for the copy alone: on a GPU for queueing it, because the thread waits for the device. Only when a
    write is still going on at the next save is that waited for too. The copy's memory is used again by the next save,
    so a writer holds as much host memory as a checkpoint has bytes, pinned where tensors are on a GPU.

    What the thread raises, such as the ``OSError`` of a full disk, is raised by the next ``save`` or ``wait``, or on
    leaving the context; where that is left by an exception, this one goes on and gets a note about the other.
    Use it as a context, else an error of the last write is lost. The interpreter ends after a write, not in it.

    Args:
        folder: the checkpoints, of one run and one writer at a time; what a killed writer left half written is removed.
        device: where the model is. Tensors elsewhere can be in the state too.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self._folder = folder
        self._device = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0"
        self._buffers: list[Tensor] = []  # of bytes, one for each storage of the last state, in its order
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
            error.add_note(f"Besides, the last checkpoint is missing: {type(failure).__name__}: {failure}")
        finally:
            self._thread.shutdown()

    def save(
        self, step: int, state: dict[str, Any], first: Callable[[], None] | None = None, best: Path | None = None
    ) -> None:
        """Write ``state`` as it is now as the checkpoint after optimizer step ``step``.

        The copy keeps shapes, strides, and which tensors share memory: shared memory is copied and written once, and
        as a whole, even where the state holds only a part of it. Tensors come back detached.

        Args:
            step: optimizer steps done.
            state: tensors and plain values, in any nesting of dicts, lists and tuples.
            first: what the thread is to write before: files that the checkpoint says are there.
            best: a name under which this checkpoint stays, when later ones take its place.
        """
        self.wait()
        copied = self._copy({"step": step, **state})
        done = None
        if self._device.type == "cuda":
            done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            done.record(torch.cuda.current_stream(self._device))
        self._writing = self._thread.submit(_write, self._folder, step, copied, done, first, best)

    def wait(self) -> None:
        """Until everything saved is on disk."""
        if self._writing is not None:
            wait_for([self._writing])  # interrupted here, the writer still knows that it is writing
            writing, self._writing = self._writing, None
            writing.result()

    def _copy(self, state: dict[str, Any]) -> dict[str, Any]:
        """``state`` in host memory. The copies of tensors on the writer's GPU are only queued."""
        old, self._buffers = self._buffers, []
        places: dict[int, Tensor] = {}  # the buffer of each storage
        copies: dict[int, Any] = {}  # by the original's id, as deepcopy has it
        for tensor in _tensors(state):
            storage = tensor.untyped_storage()
            if storage._cdata not in places:  # what torch.save too tells storages apart by
                number = len(self._buffers)
                buffer = _buffer(storage, old[number] if number < len(old) else None)
                content = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
                if storage.device.type == "cpu":
                    buffer.numpy()[:] = content.numpy()  # in one thread: torch's wait for each other on busy cores
                else:
                    buffer.copy_(content, non_blocking=storage.device == self._device)
                places[storage._cdata] = buffer
                self._buffers.append(buffer)
            host = places[storage._cdata].untyped_storage()
            copies[id(tensor)] = torch.empty(0, dtype=tensor.dtype).set_(
                host, tensor.storage_offset(), tensor.size(), tensor.stride()
            )
        return copy.deepcopy(state, copies)  # what isn't in copies yet


def save_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> None:
    """Write ``state`` (tensors and plain values only) as the checkpoint after optimizer step ``step``, and wait for it.

    Raises:
        OSError: where it can't be written; what was there before is intact.
    """
    folder.mkdir(exist_ok=True)
    path = folder / f"step-{step:08d}.pt"
    temporary = path.with_suffix(".tmp")
    try:
        # Given a path rather than a Python file, torch writes without the interpreter's lock, which training needs.
        torch.save({"step": step, **state}, temporary)
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())  # so that the rename can't reach the disk before the content
        os.replace(temporary, path)
    except RuntimeError as error:  # of torch's own file, which doesn't say why
        free = shutil.disk_usage(folder).free
        raise OSError(f"{path} can't be written ({error}); {free / 1e6:.0f} MB are free on its disk") from error
    finally:
        temporary.unlink(missing_ok=True)
    for old in _newest_first(folder)[KEPT:]:
        old.unlink()


def load_newest(folder: Path, device: torch.device, say: Callable[[str], None]) -> dict[str, Any] | None:
    """The newest checkpoint that can be read, or None. A damaged one is named through ``say`` and passed over."""
    for path in _newest_first(folder):
        try:
            state = torch.load(path, map_location=device, weights_only=True)
        except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
            say(f"{path} can't be read ({error}); trying the one before")
            continue
        assert isinstance(state, dict)
        return state
    return None


def _newest_first(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-*.pt"), reverse=True)


def _give_way() -> None:
    """Let training have the processor first: a step during a write then takes a tenth longer and not half."""
    if sys.platform == "linux":  # where a thread has a priority of its own
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


def _write(
    folder: Path,
    step: int,
    state: dict[str, Any],
    copied: torch.cuda.Event | None,
    first: Callable[[], None] | None,
    best: Path | None,
) -> None:
    if first is not None:
        first()
    if copied is not None:
        copied.synchronize()
    save_checkpoint(folder, step, state)
    if best is not None:
        _keep(folder / f"step-{step:08d}.pt", best)


def _keep(checkpoint: Path, name: Path) -> None:
    """Give a file a second name, in place of what had it; where the file system has no second names, copy it."""
    temporary = name.with_suffix(".tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(checkpoint, temporary)
    except OSError:
        shutil.copyfile(checkpoint, temporary)
    os.replace(temporary, name)


def _tensors(state: Any) -> Iterator[Tensor]:
    """Those that are a view of a storage and nothing more. Others (sparse, a subclass) are left to deepcopy."""
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
    """Host memory for ``storage``: [bytes], the last save's where it fits: fresh memory costs more than a copy."""
    pinned = storage.device.type == "cuda"
    if old is not None and old.numel() == storage.nbytes() and old.is_pinned() == pinned:
        return old
    return torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=pinned)
