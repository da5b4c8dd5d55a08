"""Compiled libraries in the cache are loaded only if they are whole, and only this user could have written them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# Prints the reason why there is no library, and the folder of torch's compiled kernels.
LOAD = """
import os, sys
from pathlib import Path
from largebatch import native
print(native.why_not(Path(sys.argv[1])))
native.keep_compiled_kernels_private()
print(os.environ["TORCHINDUCTOR_CACHE_DIR"], os.environ["TRITON_CACHE_DIR"])
print(native.library(Path(sys.argv[1])).number())
"""


def load(tmp_path: Path) -> tuple[list[str], str]:
    """Load a library that returns 7, in a new process. Return the lines of its output, and its errors."""
    source = tmp_path / "seven.cpp"
    source.write_text('extern "C" int number() { return 7; }\n')
    environment = {**os.environ, "LARGEBATCH_CACHE": str(tmp_path / "cache")}
    for variable in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        environment.pop(variable, None)
    command = [sys.executable, "-c", LOAD, str(source)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), done.stderr


def library(tmp_path: Path) -> Path:
    (path,) = (tmp_path / "cache").glob("*.so")
    return path


def test_a_new_cache_is_this_user_s_alone_and_holds_the_kernels_of_torch(tmp_path: Path) -> None:
    lines, errors = load(tmp_path)
    cache = tmp_path / "cache"
    assert lines == ["", f"{cache / 'inductor'} {cache / 'triton'}", "7"]
    assert errors == ""
    assert cache.stat().st_mode & 0o777 == 0o700
    assert library(tmp_path).stat().st_mode & 0o777 == 0o700


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:3000])


def clear(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def let_others_write(path: Path) -> None:
    path.chmod(0o777)


def give_away(path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can change the owner of a file")
    os.chown(path, 12345, -1)


@pytest.mark.parametrize("damage", [cut, clear, flip, let_others_write, give_away])
def test_a_damaged_or_foreign_library_is_compiled_again(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    load(tmp_path)
    whole = library(tmp_path).stat().st_size
    damage(library(tmp_path))
    lines, _ = load(tmp_path)
    assert lines[-1] == "7"
    status = library(tmp_path).stat()
    assert (status.st_size, status.st_uid, status.st_mode & 0o777) == (whole, os.geteuid(), 0o700)


@pytest.mark.parametrize("change", [let_others_write, give_away])
def test_a_cache_that_others_may_write_to_is_not_used(tmp_path: Path, change: Callable[[Path], None]) -> None:
    load(tmp_path)
    library(tmp_path).write_bytes(b"planted")
    change(tmp_path / "cache")
    (reason, kernels, number), errors = load(tmp_path)
    assert (reason, number) == ("", "7")
    assert str(tmp_path) not in kernels
    assert library(tmp_path).read_bytes() == b"planted"
    assert f"chmod go-w {tmp_path / 'cache'}" in errors
    assert not Path(kernels.split()[0]).parent.exists()  # the process's own folder is removed
