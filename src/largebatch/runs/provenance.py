"""The code of a run: its git commit, and the copies of the package and of own modules that a queued job runs."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from largebatch.runs.folder import read_json

PACKAGE = Path(__file__).resolve().parent.parent  # src/largebatch
_NO_CODE = ("__pycache__", "conf")  # an installed package has presets; a job reads its frozen configuration
_GIT_STATE = "git.json"  # beside a copied package


def git_state() -> dict[str, Any]:
    """Return the commit, and True if the code has uncommitted changes; None outside a git checkout.

    A copied package has the state of its checkout when it was copied.
    """
    copied = read_json(PACKAGE.parent / _GIT_STATE)
    if copied:
        return copied
    commit = _git("rev-parse", "HEAD")
    return {"git_commit": commit, "git_dirty": bool(_git("status", "--porcelain", ".")) if commit else None}


@functools.cache
def code_hash() -> str:
    """Return sixteen hex digits, a hash of names and contents of the package's files. Its copy has this name."""
    digest = hashlib.sha256()
    files = (path.relative_to(PACKAGE) for path in PACKAGE.rglob("*") if path.is_file())
    for path in sorted(path for path in files if not set(_NO_CODE) & set(path.parts)):
        content = (PACKAGE / path).read_bytes()
        digest.update(f"{path}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:16]


def content_hash(path: Path) -> str:
    """Return sixteen hex digits, a hash of the file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def copy_code(folder: Path) -> Path:
    """Copy the package's files to ``folder/HASH``, for PYTHONPATH, if that doesn't exist."""

    def write(half: Path) -> None:
        shutil.copytree(PACKAGE, half / PACKAGE.name, ignore=shutil.ignore_patterns(*_NO_CODE))
        (half / _GIT_STATE).write_text(json.dumps(git_state()) + "\n")

    return _copied(folder / code_hash(), write)


def copy_files(copy: Path, files: Mapping[str, Path]) -> Path:
    """Copy ``files`` to their relative paths below ``copy``, if that doesn't exist."""

    def write(half: Path) -> None:
        for name, path in files.items():
            (half / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, half / name)

    return _copied(copy, write)


def _copied(copy: Path, write: Callable[[Path], None]) -> Path:
    """Return the folder ``copy``, which appears whole, with the files that ``write`` writes."""
    if copy.exists():
        return copy
    copy.parent.mkdir(parents=True, exist_ok=True)
    half = Path(tempfile.mkdtemp(dir=copy.parent, prefix=".copying-"))
    half.chmod(0o755)  # other users of a shared folder can read it
    write(half)
    try:
        os.rename(half, copy)
    except OSError:  # another launcher was faster
        shutil.rmtree(half)
        if not copy.exists():
            raise
    return copy


def _git(*arguments: str) -> str | None:
    try:
        answer = subprocess.run(["git", *arguments], cwd=PACKAGE, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # git isn't installed
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None
