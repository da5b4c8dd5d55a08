"""Compiled libraries in the cache are loaded only if they are whole, and only this user could have written them."""

from __future__ import annotations

import os
import signal
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


def loading(tmp_path: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Load a library that returns 7, in a new process."""
    source = tmp_path / "seven.cpp"
    source.write_text('extern "C" int number() { return 7; }\n')
    environment = {**os.environ, "LARGEBATCH_CACHE": str(tmp_path / "cache"), **variables}
    for variable in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        environment.pop(variable, None)
    command = [sys.executable, "-c", LOAD, str(source)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def load(tmp_path: Path) -> tuple[list[str], str]:
    """Load the library. Return the lines of the output, and the errors."""
    done = loading(tmp_path)
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


def test_without_a_folder_for_the_cache_a_process_compiles_for_itself(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file, such as the home of a user without one")
    (reason, kernels, number), errors = load(tmp_path)
    assert (reason, number) == ("", "7")
    assert "Fix: LARGEBATCH_CACHE=FOLDER" in errors
    assert not Path(kernels.split()[0]).parent.exists()  # the process's own folder is removed


def test_the_next_compile_removes_what_a_killed_compile_left(tmp_path: Path) -> None:
    """The compiler writes its temporary files into the folder that is removed, and kills its parent."""
    compiler = tmp_path / "compiler"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] || { echo half >"$TMPDIR/half.s"; kill -9 $PPID; }\n')
    compiler.chmod(0o755)
    killed = loading(tmp_path, CXX=str(compiler))
    assert killed.returncode == -signal.SIGKILL
    assert [path.name for path in (tmp_path / "cache").glob("*/*")] == ["half.s"]
    assert load(tmp_path)[0][-1] == "7"
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.is_dir()] == []
