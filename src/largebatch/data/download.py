"""Finding a published archive's folder, or fetching it: by one process, and whole or not at all."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tarfile
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tqdm import tqdm

from largebatch.config.datasets import DatasetConfig
from largebatch.errors import UserError

_TIMEOUT = 20  # seconds without an answer
_BLOCK = 1 << 20


def find_or_download(config: DatasetConfig, folder: str, needed: tuple[str, ...], url: str, md5: str) -> Path:
    """The folder named ``folder`` in ``config.root`` (or that is it), holding all that is ``needed``.

    Where it isn't there and ``config.download`` allows it, the archive at ``url`` with checksum ``md5`` is fetched and
    unpacked; an archive that already lies in the root is used. Safe when several processes start at once.

    Raises:
        UserError: naming ``dataset.root``, what was looked for, and why it couldn't be fetched.
    """
    root = Path(config.root)
    if not _missing(root, needed):
        return root
    place = root if root.name == folder else root / folder
    if not _missing(place, needed):
        return place
    try:
        if not config.download:
            raise UserError("dataset.download=false, so it isn't fetched")
        with _lock(place):
            if _missing(place, needed):  # not brought by another process meanwhile
                _fetch(place, url, md5)
    except (UserError, OSError) as error:
        raise UserError(
            f"dataset={config.name}: {error}. Looked in dataset.root={root} for {folder}/, "
            f"missing: {', '.join(_missing(place, needed))}. Put the unpacked archive of {url} there, point "
            "dataset.root to it, or set dataset.download=true where there is a network"
        ) from error
    still_missing = _missing(place, needed)
    if still_missing:
        raise UserError(
            f"dataset={config.name}: {place} came without {', '.join(still_missing)}; is {url} still right?"
        )
    return place


def md5_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def _missing(place: Path, needed: tuple[str, ...]) -> list[str]:
    return [name for name in needed if not os.path.exists(place / name)]


@contextmanager
def _lock(place: Path) -> Iterator[None]:
    """One process at a time; the lock goes with the process that holds it, however that ends."""
    made = not place.parent.exists()
    place.parent.mkdir(parents=True, exist_ok=True)
    lock = place.parent / f".{place.name}.lock"
    try:
        with lock.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
    except (UserError, OSError):
        if made:  # a folder that nothing came to isn't left behind
            lock.unlink(missing_ok=True)
            with suppress(OSError):  # something else came to it meanwhile
                place.parent.rmdir()
        raise


def _fetch(place: Path, url: str, md5: str) -> None:
    """Fetch and unpack beside ``place``, and rename into place when all is there."""
    if place.exists() and any(place.iterdir()):
        raise UserError(f"{place} is incomplete; complete it, or delete it so that it can be fetched")
    work = place.parent / f".{place.name}.download"
    shutil.rmtree(work, ignore_errors=True)  # left by a process that was killed
    try:
        work.mkdir()
        archive = place.parent / url.rsplit("/", 1)[-1]
        if not (archive.is_file() and md5_of(archive) == md5):
            archive = work / archive.name
            _download(url, archive, md5)
        _unpack(archive, work / "unpacked")
        (work / "unpacked" / place.name).replace(place)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _download(url: str, archive: Path, md5: str) -> None:
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as answer, archive.open("wb") as file:
            size = int(answer.headers.get("Content-Length", 0)) or None
            with tqdm(desc=archive.name, total=size, unit="B", unit_scale=True, disable=None) as progress:
                while block := answer.read(_BLOCK):
                    file.write(block)
                    progress.update(len(block))
    except OSError as error:  # urllib's errors and timeouts are such
        raise UserError(f"{url} couldn't be fetched ({error})") from error
    got = md5_of(archive)
    if got != md5:
        raise UserError(f"{url} came damaged or changed (md5 {got}, expected {md5})")


def _unpack(archive: Path, into: Path) -> None:
    try:
        if archive.suffix == ".zip":
            shutil.unpack_archive(archive, into)
        else:
            with tarfile.open(archive) as tar:
                tar.extraction_filter = getattr(tarfile, "data_filter", None)  # Python before 3.11.4 has none
                tar.extractall(into)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        raise UserError(f"{archive} can't be unpacked ({error})") from error
