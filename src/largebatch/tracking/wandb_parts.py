"""The parts of a W&B run in its run folder: each start of wandb begins a new one, with a log of its own.

A part is a folder ``wandb/run-TIME-ID`` (online) or ``wandb/offline-run-TIME-ID`` with ``run-ID.wandb``, the log of all
that wandb was told. Beside it wandb leaves ``.synced`` once a part is uploaded, and ``.syncstate`` once its upload has
begun, with the number of rows that W&B had then.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# The log is a file header and then blocks; a record is one chunk or several, none of which crosses a block's end.
_HEADER = struct.pack("<4sHB", b":W&B", 0xBEE1, 0)
_BLOCK = 1 << 15  # bytes
_CHUNK = struct.Struct("<IHB")  # CRC-32 of kind and content, length of the content, kind
_WHOLE, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


class Part:
    """One part, by its log."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.name = log.parent.name
        self.started = self.name.partition("run-")[2]  # YYYYMMDD_HHMMSS-ID, with -1, -2, ... in the same second
        self.run_id = log.stem.removeprefix("run-")

    @property
    def is_done(self) -> bool:
        """Whether nothing of it is to be uploaded any more."""
        return self._mark.exists()

    def mark_done(self) -> None:
        self._mark.touch()

    @property
    def _mark(self) -> Path:
        return self.log.with_name(f"{self.log.name}.synced")

    def first_row(self) -> int | None:
        """The number of rows that W&B had before it, once its upload has begun."""
        state = self.log.with_name(f"{self.log.name}.syncstate")
        try:
            start = json.loads(state.read_text()).get("starting_step")
        except (FileNotFoundError, ValueError):  # ValueError: cut off by a crash, before a row was sent
            return None
        return None if start is None else int(start)

    def announcement(self) -> Any | None:
        """What it says of the run (a ``RunRecord``): the last word, or None in a part that was killed before it."""
        runs = [record.run for record in read_records(self.log) if record.WhichOneof("record_type") == "run"]
        return runs[-1] if runs else None

    def rows(self) -> int:
        return sum(record.WhichOneof("record_type") == "history" for record in read_records(self.log))


def parts_of(run: Path) -> list[Part]:
    """The parts in a run folder, oldest first; of several W&B runs where the run was repeated."""
    logs = (log for log in run.glob("wandb/*run-*/run-*.wandb") if not log.parent.is_symlink())
    return sorted(map(Part, logs), key=lambda part: part.started)


def rows_after(parts: list[Part]) -> int:
    """The number of rows that W&B has, or will have, of a run with these parts.

    Each part goes on after those before it, apart from one that was online: that goes on after what W&B had of them.
    """
    rows = 0
    for part in parts:
        first = part.first_row()
        rows = (rows if first is None else first) + part.rows()
    return rows


def read_records(log: Path) -> Iterator[Any]:
    """The records of a log (``wandb_internal_pb2.Record``), up to where a crash cut it off."""
    from wandb.proto import wandb_internal_pb2

    record: Any = wandb_internal_pb2.Record  # type: ignore[attr-defined]  # made when it is imported
    for content in _contents(log.read_bytes()):
        yield record.FromString(content)


def write_without_rows(log: Path, count: int, copy: Path) -> None:
    """Copy a log without its first ``count`` rows, the others counted from 0 as in a part of its own."""
    left = -count
    contents = []
    for record in read_records(log):
        if record.WhichOneof("record_type") == "history":
            left += 1
            if left <= 0:
                continue
            record.history.step.num = left - 1
            for item in record.history.item:
                if (item.key or "/".join(item.nested_key)) == "_step":
                    item.value_json = str(left - 1)
        contents.append(record.SerializeToString())
    copy.write_bytes(_log(contents))


def _contents(data: bytes) -> Iterator[bytes]:
    if not data.startswith(_HEADER):
        return
    at, begun = len(_HEADER), b""
    while at + _CHUNK.size <= len(data):
        left = _BLOCK - at % _BLOCK
        if left < _CHUNK.size:  # too little for another chunk: padding
            at += left
            continue
        checksum, length, kind = _CHUNK.unpack_from(data, at)
        content = data[at + _CHUNK.size : at + _CHUNK.size + length]
        if checksum != zlib.crc32(content, zlib.crc32(bytes([kind]))):  # cut off
            return
        at += _CHUNK.size + length
        begun = content if kind in (_WHOLE, _FIRST) else begun + content
        if kind in (_WHOLE, _LAST):
            yield begun


def _log(contents: list[bytes]) -> bytes:
    data = bytearray(_HEADER)
    for content in contents:
        at = 0
        while at == 0 or at < len(content):
            left = _BLOCK - len(data) % _BLOCK
            if left <= _CHUNK.size:
                data += bytes(left)
                left = _BLOCK
            piece = content[at : at + left - _CHUNK.size]
            at += len(piece)
            begins, ends = at == len(piece), at == len(content)
            kind = {(True, True): _WHOLE, (True, False): _FIRST, (False, False): _MIDDLE, (False, True): _LAST}
            checksum = zlib.crc32(piece, zlib.crc32(bytes([kind[begins, ends]])))
            data += _CHUNK.pack(checksum, len(piece), kind[begins, ends]) + piece
    return bytes(data)
