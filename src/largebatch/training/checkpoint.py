"""Checkpoints of a run: written atomically in the background. The newest two stay, and those of chosen steps.

A file is what ``torch.save`` writes, and a trailer after it: a JSON object (``Trailer``), its length, the CRC-32 of all
bytes before, and a mark. ``torch.load`` ignores the trailer and verifies nothing itself.
"""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
import struct
import sys
import threading
import zlib
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from largebatch.machine.pulse import waiting_for
from largebatch.runs.folder import checkpoint_path, newest_first, step_of

KEPT = 2
_FORMAT = 1  # version of the files
_END = struct.Struct("<II8s")  # bytes of the trailer's JSON, CRC-32, mark
_MARK = b"lbchkpt\0"
_READ = 1 << 20  # bytes

Trailer = dict[str, Any]  # format, run (identity), step, and records: the rows that the checkpoint relies on


class DamagedError(Exception):
    """A checkpoint can't be used. The message follows the file's name in a sentence."""


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
        run: identity of the run, part of each checkpoint.
        keep: steps whose checkpoints newer ones don't replace.
    """

    def __init__(self, folder: Path, device: torch.device, run: str = "", keep: Collection[int] = frozenset()) -> None:
        self._folder, self._run, self._keep = folder, run, keep
        self._device = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0"
        self._buffers: list[Tensor] = []  # uint8 [bytes], one for each storage of the last state
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint", initializer=_give_way)
        self._writing: Future[None] | None = None
        for leftover in (*folder.glob("step-*.tmp"), *folder.glob("best.tmp")):
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
        self, step: int, state: dict[str, Any], first: Callable[[], Any] | None = None, best: Path | None = None
    ) -> None:
        """Write the present ``state`` as the checkpoint after optimizer step ``step``.

        The copy keeps shapes, strides and shared memory. A shared storage is copied and written once, and completely
        even if the state has only a part of it. Loaded tensors are detached.

        Args:
            step: optimizer steps done.
            state: tensors and plain values, in any nesting of dicts, lists and tuples.
            first: called in the thread before the write, to write files that the checkpoint relies on. Its result
                describes them (JSON), for ``lacks`` of ``load_newest``.
            best: path of a second name for this checkpoint, kept after newer checkpoints replace it.
        """
        with waiting_for("the disk to write the checkpoint before"):
            self.wait()
        copied = self._copy({"step": step, **state})
        done = None
        if self._device.type == "cuda":
            done = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            done.record(torch.cuda.current_stream(self._device))

        def write() -> None:
            records = first() if first is not None else None
            if done is not None:
                done.synchronize()
            save_checkpoint(self._folder, step, copied, self._run, records, best, self._keep)

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


def save_checkpoint(
    folder: Path,
    step: int,
    state: dict[str, Any],
    run: str = "",
    records: Any = None,
    best: Path | None = None,
    keep: Collection[int] = frozenset(),
) -> Path:
    """Write ``state`` (tensors and plain values only) as the checkpoint after optimizer step ``step``. Return its path.

    The newest checkpoints up to this step are kept, and those of the steps ``keep``. Later checkpoints are removed: the
    run didn't resume from them.

    Args:
        folder: the run's checkpoints.
        step: optimizer steps done.
        state: content of the checkpoint.
        run: identity of the run.
        records: description of the rows that the checkpoint relies on (JSON).
        best: path of a second name. It appears before the checkpoint, whose state says that it is the best.
        keep: steps whose checkpoints newer ones don't replace.

    Raises:
        OSError: if the file can't be written. Earlier checkpoints stay intact.
    """
    folder.mkdir(exist_ok=True)
    path = checkpoint_path(folder, step)
    temporary = path.with_suffix(".tmp")
    try:
        # With a path instead of a Python file, torch writes without the interpreter's lock, which training needs.
        torch.save({"step": step, **state}, temporary)
        _seal(temporary, {"format": _FORMAT, "run": run, "step": step, "records": records})
        if best is not None:
            _keep(temporary, best)
        os.replace(temporary, path)
    except RuntimeError as error:  # from torch's file writer, without the cause
        free = shutil.disk_usage(folder).free / 1e6
        raise OSError(f"{path} can't be written ({_cause(temporary) or error}); {free:.0f} MB are free") from error
    finally:
        temporary.unlink(missing_ok=True)
    up_to_now = [old for old in newest_first(folder) if old.name <= path.name]
    chosen = {old for old in up_to_now if step_of(old) in keep}
    for old in {*newest_first(folder)} - {*up_to_now[:KEPT]} - chosen:
        old.unlink()
    return path


def load_newest(
    folder: Path,
    device: torch.device,
    say: Callable[[str], None],
    run: str = "",
    lacks: Callable[[int, Any], str] = lambda step, records: "",
    needs: Collection[str] = (),
) -> dict[str, Any] | None:
    """Return the newest usable checkpoint, or None. Name each unusable checkpoint through ``say``, with the reason.

    Args:
        folder: the run's checkpoints.
        device: device of the loaded tensors.
        say: called with each message.
        run: identity that the checkpoint must have.
        lacks: called with a checkpoint's step and records. It names a file without the rows of these records.
        needs: keys that the state must have.

    Raises:
        OSError: if no checkpoint is usable, and reading one failed: it may be readable later.
    """
    unread: OSError | None = None
    found = newest_first(folder)
    for path in found:
        try:
            state, trailer = load_checkpoint(path, device)
            if trailer["run"] != run:
                raise DamagedError(f"belongs to another run ({trailer['run'] or 'unnamed'})")
            if missing := [key for key in needs if key not in state]:
                raise DamagedError(f"has no {', '.join(missing)}")
            if reason := lacks(state["step"], trailer["records"]):
                raise DamagedError(f"can't be used: {reason}")
        except (OSError, DamagedError) as error:
            unread = error if isinstance(error, OSError) else unread
            problem = f"can't be read ({error})" if isinstance(error, OSError) else str(error)
            say(f"{path} {problem}; trying the previous checkpoint")
            continue
        return state
    if unread is not None:
        raise unread
    if found:
        say(f"{folder} has no usable checkpoint: the run starts again from step 0")
    return None


def load_checkpoint(path: Path, device: torch.device) -> tuple[dict[str, Any], Trailer]:
    """Return the state and the trailer of a checkpoint after checks of its whole content.

    Raises:
        DamagedError: if a byte has changed or is missing, or the file is another step's or another version's.
        OSError: if the file can't be read.
    """
    with path.open("rb") as file:
        trailer = _checked_trailer(file)
        if trailer["format"] != _FORMAT:
            raise DamagedError(f"has format {trailer['format']}, not {_FORMAT}: another version wrote it")
        if path.stem.startswith("step-") and trailer["step"] != step_of(path):
            raise DamagedError(f"is the checkpoint of step {trailer['step']}")
        file.seek(0)
        try:
            state = torch.load(file, map_location=device, weights_only=True)
        except (EOFError, RuntimeError, pickle.UnpicklingError) as error:
            raise DamagedError(f"can't be read ({error})") from error
    if not isinstance(state, dict) or state.get("step") != trailer["step"]:
        raise DamagedError("has another step inside")
    return state, trailer


def _seal(path: Path, trailer: Trailer) -> None:
    """Append the trailer, and wait until the content is on the disk."""
    text = json.dumps(trailer).encode()
    with path.open("r+b") as file:
        crc = _crc(file, path.stat().st_size)
        file.write(text + _END.pack(len(text), zlib.crc32(text, crc), _MARK))
        file.flush()
        os.fsync(file.fileno())


def _checked_trailer(file: BinaryIO) -> Trailer:
    size = os.fstat(file.fileno()).st_size
    file.seek(max(size - _END.size, 0))
    end = file.read(_END.size)
    length, crc, mark = _END.unpack(end) if len(end) == _END.size else (0, 0, b"")
    if mark != _MARK:
        raise DamagedError("is damaged or cut short, or another version wrote it: it has no checksum")
    file.seek(0)
    if _crc(file, size - _END.size) != crc or length > size - _END.size:
        raise DamagedError("is damaged: its checksum is wrong")
    file.seek(size - _END.size - length)
    trailer: Trailer = json.loads(file.read(length))
    return trailer


def _crc(file: BinaryIO, size: int) -> int:
    """Return the CRC-32 of the next ``size`` bytes. It takes 0.4 s for 1 GB, and a BLAKE2 hash five times as long."""
    crc = 0
    while size > 0 and (block := file.read(min(size, _READ))):
        crc, size = zlib.crc32(block, crc), size - len(block)
    return crc


def _cause(path: Path) -> str:
    """Return the reason why no more bytes can be written to ``path``, such as a full disk; empty if they can."""
    try:
        with path.open("ab") as file:
            file.write(bytes(_READ))
    except OSError as error:
        return error.strerror or str(error)
    return ""


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
