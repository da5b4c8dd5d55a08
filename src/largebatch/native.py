"""C++ that is compiled once for this machine with its own compiler, and called through ctypes.

Compiling takes about a second, at first use; the library is kept in ``$LARGEBATCH_CACHE``, by default
``~/.cache/largebatch``. It ends with its own checksum. It is loaded only if this user owns it and its folder, and if
others can't write to either. torch's extension builder isn't used: with torch's headers it takes half a minute.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

# -fno-math-errno and -fno-trapping-math allow vector square roots; NaN and infinity keep their meaning.
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math", "-fopenmp")


def why_not(source: Path) -> str:
    """Return the reason why ``source`` can't be compiled and loaded; empty if it can."""
    library = _library(source)
    return library if isinstance(library, str) else ""


def library(source: Path) -> ctypes.CDLL:
    """Return the compiled ``source``; call only if ``why_not()`` is empty."""
    compiled = _library(source)
    assert isinstance(compiled, ctypes.CDLL), compiled
    return compiled


@functools.cache
def _library(source: Path) -> ctypes.CDLL | str:
    if importlib.util.find_spec("fcntl") is None:
        return "compiling needs Linux or macOS"
    compiler = shutil.which(os.environ.get("CXX", "")) or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        return "there is no C++ compiler (c++, g++ or $CXX)"
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    key = "\n".join([source.read_text(), " ".join(_FLAGS), version, processor()])
    name = f"{source.stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    try:
        path = private_folder() / name
        if not _is_ours(path):
            _compile(compiler, source, path)
        return ctypes.CDLL(str(path))
    except subprocess.CalledProcessError as error:
        return f"{compiler} failed: {(error.stderr.strip().splitlines() or ['no message'])[0]}"
    except (OSError, RuntimeError) as error:  # no writable folder, no home, or a library that doesn't load
        return f"the compiled library can't be written or loaded: {error}"


def _compile(compiler: str, source: Path, path: Path) -> None:
    import fcntl  # not on Windows

    # To a temporary file, then renamed: several processes may compile at once. All hold the lock, so that whoever has
    # it alone can remove what killed processes left.
    with (path.parent / "compiling.lock").open("w") as lock:
        with contextlib.suppress(OSError):  # others compile now, or the file system has no locks
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for leftover in path.parent.glob("compiling-*"):
                shutil.rmtree(leftover, ignore_errors=True)
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_SH)
        with tempfile.TemporaryDirectory(prefix="compiling-", dir=path.parent) as folder:
            _compile_in(Path(folder), compiler, source, path)


def _compile_in(folder: Path, compiler: str, source: Path, path: Path) -> None:
    temporary = folder / path.name
    command = [compiler, *_FLAGS, str(source), "-o", str(temporary)]
    variables = {**os.environ, "TMPDIR": str(folder)}
    subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    content = temporary.read_bytes()
    temporary.write_bytes(content + hashlib.sha256(content).digest())  # a loader ignores bytes after the library
    temporary.chmod(0o700)
    os.replace(temporary, path)


def _is_ours(path: Path) -> bool:
    """Return True if the file is whole, this user's, and not writable by others."""
    if not path.is_file() or not _only_ours(path):
        return False
    content = path.read_bytes()
    return content[-32:] == hashlib.sha256(content[:-32]).digest()


def _only_ours(path: Path) -> bool:
    status = path.stat()
    return status.st_uid == os.geteuid() and not status.st_mode & 0o022


@functools.cache
def private_folder() -> Path:
    """Return ``cache_folder``, or a temporary folder of this process if there is none or others may write to it.

    Raises:
        OSError: if there is no folder that can be written.
    """
    try:
        folder = cache_folder()
        if _only_ours(folder):
            return folder
        problem, fix = f"{folder}: others own this folder or may write to it", f"`chmod go-w {folder}`, or "
    except (OSError, RuntimeError) as error:  # a user without a home, as in a container
        problem, fix = f"there is no folder for compiled libraries ({error})", ""
    warnings.warn(
        f"{problem}, so this process compiles for itself. Fix: {fix}LARGEBATCH_CACHE=FOLDER with a folder of your own",
        stacklevel=2,
    )
    own = Path(tempfile.mkdtemp(prefix="largebatch-"))
    atexit.register(shutil.rmtree, own, ignore_errors=True)
    return own


def keep_compiled_kernels_private() -> None:
    """Let torch.compile and Triton keep their kernels below ``private_folder``, unless their variables are set.

    torch's own default is a folder in /tmp with a predictable name, whoever owns it.
    """
    for variable, name in {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}.items():
        if variable not in os.environ:
            os.environ[variable] = str(private_folder() / name)


def cache_folder() -> Path:
    """Return the folder for libraries compiled for this machine, kept between runs.

    A new folder is this user's alone.
    """
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get("LARGEBATCH_CACHE") or Path(caches) / "largebatch")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def processor() -> str:
    """Return the properties that ``-march=native`` depends on: different machines may share a home directory."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor() + platform.machine()
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
