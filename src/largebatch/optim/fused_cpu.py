"""The fused step on CPU: ``fused_cpu.cpp``, compiled once for this machine with its own C++ compiler.

Compiling takes about a second and is done at the first step that needs it; the library is kept in
``$LARGEBATCH_CACHE``, by default ``~/.cache/largebatch``. torch's extension builder isn't used: with torch's headers
the same takes half a minute.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import Tensor

from largebatch.optim.numbers import LambNumbers, LarsNumbers

_SOURCE = Path(__file__).with_suffix(".cpp")
# -fno-math-errno and -fno-trapping-math allow vector square roots; NaN and infinity keep their meaning.
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared", "-fno-math-errno", "-fno-trapping-math", "-fopenmp")


class _Tensors(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int32) for name in ("count", "threads", "rows")),
        *((name, ctypes.c_void_p) for name in ("weights", "gradients", "first", "second")),
        *((name, ctypes.c_void_p) for name in ("numel", "row", "decayed", "given_norms", "statistics")),
    )


def _structure(numbers: type[LarsNumbers] | type[LambNumbers]) -> type[ctypes.Structure]:
    kinds = {float: ctypes.c_double, bool: ctypes.c_bool}
    fields = [(name, kinds[kind]) for name, kind in get_type_hints(numbers).items()]
    return type(numbers.__name__, (ctypes.Structure,), {"_fields_": fields})


_LarsNumbers, _LambNumbers = _structure(LarsNumbers), _structure(LambNumbers)


def why_not(weights: list[Tensor]) -> str:
    """Why these tensors can't take the fused step; empty where they can."""
    if weights[0].dtype != torch.float32:  # all are of one type
        return "the fused step on CPU is for fp32 parameters"
    library = _library()
    return library if isinstance(library, str) else ""


def lars(
    weights: list[Tensor],
    gradients: list[Tensor],
    buffers: list[Tensor],
    adapted: Sequence[bool],
    decayed: Sequence[bool],
    given_norms: Tensor | None,
    numbers: LarsNumbers,
    tables: dict[Any, Any],
) -> Tensor:
    """One step of LARS, in place.

    Args:
        weights, gradients, buffers: fp32 tensors, dense, each triple of one shape and layout; ``buffers`` empty without
            momentum.
        adapted, decayed: for each tensor, whether it is scaled and whether it is decayed.
        given_norms: in place of the gradient norms in the denominators, of shape [adapted tensors]; None measures them.
        numbers: the hyper-parameters.
        tables: kept by the caller for these tensors from step to step; unused here.

    Returns:
        fp32 of shape [3, adapted tensors]: weight norm, gradient norm, trust ratio.
    """
    return _call("lars", weights, gradients, (buffers, []), adapted, decayed, given_norms, _LarsNumbers(*numbers))


def lamb(
    weights: list[Tensor],
    gradients: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    adapted: Sequence[bool],
    decayed: Sequence[bool],
    numbers: LambNumbers,
    tables: dict[Any, Any],
) -> Tensor:
    """One step of LAMB, in place; as ``lars``."""
    return _call("lamb", weights, gradients, (exp_avgs, exp_avg_sqs), adapted, decayed, None, _LambNumbers(*numbers))


def _call(
    function: str,
    weights: list[Tensor],
    gradients: list[Tensor],
    state: tuple[list[Tensor], list[Tensor]],
    adapted: Sequence[bool],
    decayed: Sequence[bool],
    given_norms: Tensor | None,
    numbers: ctypes.Structure,
) -> Tensor:
    library = _library()
    assert isinstance(library, ctypes.CDLL), library
    count, rows = len(weights), sum(adapted)
    statistics = torch.empty(3, rows)
    given = None if given_norms is None else given_norms.to("cpu", torch.float64).contiguous()
    ranks = iter(range(rows))
    row = (ctypes.c_int32 * count)(*[next(ranks) if one else -1 for one in adapted])
    numel = (ctypes.c_int64 * count)(*map(Tensor.numel, weights))
    arrays = [_pointers(tensors) for tensors in (weights, gradients, *state)]
    flags = (ctypes.c_bool * count)(*decayed)
    tensors = _Tensors(
        count, torch.get_num_threads(), rows, *[ctypes.addressof(array) if array else None for array in arrays],
        ctypes.addressof(numel), ctypes.addressof(row), ctypes.addressof(flags),
        None if given is None else given.data_ptr(), statistics.data_ptr(),
    )  # fmt: skip
    getattr(library, function)(ctypes.byref(tensors), ctypes.byref(numbers))
    return statistics


def _pointers(tensors: list[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*map(Tensor.data_ptr, tensors))


# -- compiling


@functools.cache
def _library() -> ctypes.CDLL | str:
    """The compiled library, or why there is none."""
    compiler = shutil.which(os.environ.get("CXX", "")) or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        return "there is no C++ compiler (c++, g++ or $CXX)"
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    key = "\n".join([_SOURCE.read_text(), " ".join(_FLAGS), version, _processor()])
    name = f"fused_cpu-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    try:
        path = _cache_folder() / name
        if not path.exists():
            _compile(compiler, path)
        return ctypes.CDLL(str(path))
    except subprocess.CalledProcessError as error:
        return f"{compiler} failed: {(error.stderr.strip().splitlines() or ['without a word'])[0]}"
    except (OSError, RuntimeError) as error:  # no place to write, no home at all, or a library that doesn't load
        return f"its library can't be made or loaded: {error}"


def _compile(compiler: str, path: Path) -> None:
    # Under a name of its own, then renamed: several processes may be compiling at once.
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        temporary = Path(folder) / path.name
        command = [compiler, *_FLAGS, str(_SOURCE), "-o", str(temporary)]
        subprocess.run(command, capture_output=True, text=True, check=True)
        os.replace(temporary, path)


def _cache_folder() -> Path:
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(os.environ.get("LARGEBATCH_CACHE") or Path(caches) / "largebatch")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _processor() -> str:
    """What ``-march=native`` depends on: a home directory may be shared by different machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor() + platform.machine()
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))
