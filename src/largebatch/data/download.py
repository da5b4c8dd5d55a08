"""Find or download a published archive. One process downloads; the folder appears whole or not at all."""

from __future__ import annotations

import hashlib
import os
import shutil
import urllib.request
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

from largebatch.config.datasets import DatasetConfig
from largebatch.data.cache import alone
from largebatch.errors import UserError

_TIMEOUT = 20  # seconds without an answer


def find_or_download(config: DatasetConfig, folder: str, needed: tuple[str, ...], url: str, md5: str) -> Path:
    """Return ``config.root`` or the folder named ``folder`` in it, whichever has all names in ``needed``.

    If neither has and ``config.download`` allows it, download and unpack the archive at ``url`` with checksum ``md5``.
    An archive that already is in the root is used. Several processes may call this at once.

    Raises:
        UserError: naming ``dataset.root``, the missing files, and the reason why the download failed.
    """
    root = Path(config.root)
    if not _missing(root, needed):
        return root
    place = root if root.name == folder else root / folder
    if not _missing(place, needed):
        return place
    created = not place.parent.exists()
    try:
        if not config.download:
            raise UserError("dataset.download=false, so it isn't downloaded")
        with alone(place, lambda line: None):
            if _missing(place, needed):  # else another process has downloaded it meanwhile
                _fetch(place, url, md5)
    except (UserError, OSError) as error:
        if created:  # remove the folder, unless another process wrote to it
            with suppress(OSError):
                place.with_name(f"{place.name}.lock").unlink(missing_ok=True)
                place.parent.rmdir()
        raise UserError(
            f"dataset={config.name}: {error}. Looked in dataset.root={root} for {folder}/, "
            f"missing: {', '.join(_missing(place, needed))}. Put the unpacked archive of {url} there, point "
            "dataset.root to it, or set dataset.download=true on a machine with a network"
        ) from error
    return place


def md5_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def _missing(place: Path, needed: tuple[str, ...]) -> list[str]:
    return [name for name in needed if not os.path.exists(place / name)]


def _fetch(place: Path, url: str, md5: str) -> None:
    """Download and unpack beside ``place``, then rename."""
    if place.exists() and any(place.iterdir()):
        raise UserError(f"{place} is incomplete; complete it, or delete it to download it again")
    work = place.parent / f".{place.name}.download"
    shutil.rmtree(work, ignore_errors=True)  # from a process that was killed
    try:
        work.mkdir()
        archive = place.parent / url.rsplit("/", 1)[-1]
        if not (archive.is_file() and md5_of(archive) == md5):
            archive = work / archive.name
            _download(url, archive, md5)
        shutil.unpack_archive(archive, work / "unpacked")
        (work / "unpacked" / place.name).replace(place)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _download(url: str, archive: Path, md5: str) -> None:
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as answer, archive.open("wb") as file:
            size = int(answer.headers.get("Content-Length", 0)) or None
            with tqdm.wrapattr(file, "write", total=size, desc=archive.name, disable=None) as progress:
                shutil.copyfileobj(answer, progress)
    except OSError as error:  # includes urllib's errors and timeouts
        raise UserError(f"{url} couldn't be downloaded ({error})") from error
    got = md5_of(archive)
    if got != md5:
        raise UserError(f"{url} is damaged or changed (md5 {got}, expected {md5})")
