"""Free memory, and recognition of failed allocations."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import torch

# Messages of torch's CPU allocator, the standard library, and oneDNN ("could not create a primitive").
_WORDS = ("can't allocate memory", "not enough memory", "bad_alloc", "out of memory", "could not create a primitive")


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if ``error`` is a failed allocation, on a GPU or on the host."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)
    )


def free_memory(device: torch.device) -> int:
    """Return the bytes of GPU memory (``cuda``) or host memory (``cpu``) that can still be allocated."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return host_memory()


def host_memory() -> int:
    """Return the bytes that this process can still allocate.

    It is the least of what the system, the control groups and the process's own limit (``ulimit -v``) leave.
    """
    return min(_of_the_system(), _of_the_group(), _of_the_process())


def _of_the_system() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # not Linux: half of the memory, since other programs need some
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024


def _of_the_group() -> int:
    """Return the least free bytes of all levels of the control groups (version 1 or 2), as in containers and SLURM."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return sys.maxsize
    least = sys.maxsize
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            root, limit, used = Path("/sys/fs/cgroup"), "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            root, limit, used = Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        folder = root / group.lstrip("/")
        for level in (folder, *folder.parents):
            try:
                given, taken = (level / limit).read_text().strip(), int((level / used).read_text())
                statistics = (level / "memory.stat").read_text()
            except OSError:  # the top level has no limit; a container can't read the levels above its own
                continue
            if given != "max":
                cached = re.search(r"^(?:total_)?inactive_file (\d+)$", statistics, re.MULTILINE)
                least = min(least, int(given) - taken + (int(cached[1]) if cached else 0))
    return max(least, 0)


def _of_the_process() -> int:
    import resource  # not on Windows

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY or sys.platform != "linux":
        return sys.maxsize
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    return max(limit - taken, 0)
