"""Choice of the fastest number format and memory layout for a model, measured once per machine."""

from __future__ import annotations

import copy
import fcntl
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from largebatch.config.schema import Config
from largebatch.errors import UserError
from largebatch.machine.memory import is_out_of_memory
from largebatch.native import cache_folder, processor
from largebatch.runs.folder import read_json, write_atomic

Image = tuple[int, int, int]  # channels, height, width

_SMALL = 1_000_000  # parameters; see choose_arithmetic
_PASS_SECONDS = 0.6  # per trial pass; on two cores 300 images for ResNet-18, or 20 with the CIFAR stem
_ROUNDS = 3
_CALM = 1.25  # largest ratio between times of equal passes in an undisturbed measurement
_DISTURBED_SECONDS = 3600  # lifetime of a disturbed measurement
_WORTH = {"bf16": 1.10, "channels_last": 1.03}  # required speed-up; timings of equal passes differ by as much


@dataclass(frozen=True)
class Arithmetic:
    """``precision``: fp32, or bf16 (torch.autocast); ``channels_last``: memory layout of images and convolutions."""

    precision: str
    channels_last: bool

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def autocast(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def __str__(self) -> str:
        return self.precision + (", channels last" if self.channels_last else "")


def described(kept: Any) -> Arithmetic | None:
    """Return the arithmetic of which a file keeps the ``asdict``, or None if the file keeps something else."""
    known = (Arithmetic(precision, last) for precision in ("fp32", "bf16") for last in (False, True))
    return next((one for one in known if asdict(one) == kept), None)


def choose_arithmetic(
    config: Config, model: nn.Module, image: Image, micro_batch: int, device: torch.device
) -> tuple[Arithmetic, str]:
    """Return the fastest arithmetic that ``config.precision`` allows, and a note on its source ("": not measured).

    A copy of ``model`` takes a few forward and backward passes of random images [n, *image] in each arithmetic, in
    turns. The result is cached with the compiled libraries, by processor or GPU, torch version, model, image and batch:
    all runs of a comparison compute alike. Runs that start at the same time measure once. A measurement that other
    processes disturbed is used for an hour.

    Networks of less than a million parameters train in seconds and aren't measured. For them, ``auto`` is fp32: results
    then agree to 1e-5 over any number of processes.
    """
    if sum(p.numel() for p in model.parameters()) < _SMALL:
        return Arithmetic("bf16" if config.precision == "bf16" else "fp32", channels_last=False), ""
    candidates = _candidates(config.precision, device)
    try:
        folder = cache_folder()
    except (OSError, RuntimeError) as error:
        seconds = measure(model, candidates, image, micro_batch, device)
        return _fastest(seconds), f"measured now; not cached: {error}"
    path = folder / f"arithmetic-{_key(config, image, micro_batch, device)}.json"
    with (folder / "arithmetic.lock").open("w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        if (found := _measured_before(path)) in candidates:
            return found, "measured before, on a machine of this kind"
        seconds = measure(model, candidates, image, micro_batch, device)
        chosen = _fastest(seconds)
        write_atomic(path, json.dumps({"arithmetic": asdict(chosen), "calm": _is_calm(seconds)}))
    return chosen, "measured now"


def _measured_before(path: Path) -> Arithmetic | None:
    """Return the kept choice, or None if there is none, it is damaged, or it was disturbed and is out of date."""
    try:
        kept = read_json(path)
    except UserError:  # damaged: a new measurement replaces it
        return None
    if kept and (kept.get("calm") or time.time() - path.stat().st_mtime < _DISTURBED_SECONDS):
        return described(kept.get("arithmetic"))
    return None


def _candidates(precision: str, device: torch.device) -> list[Arithmetic]:
    if precision == "auto":  # bf16 with channels last has always been faster than bf16 without
        bf16 = [Arithmetic("bf16", True)] if _computes_in_bf16(device) else []
        return [*_candidates("fp32", device), *bf16]
    return [Arithmetic(precision, channels_last) for channels_last in (False, True)]


def measure(
    model: nn.Module,
    candidates: list[Arithmetic],
    image: Image,
    micro_batch: int,
    device: torch.device,
) -> dict[Arithmetic, list[float]]:
    """Time forward and backward passes of equally many images in each candidate; return the seconds of each pass."""
    networks = {c: copy.deepcopy(model).to(memory_format=c.memory_format).train() for c in candidates}
    n = _affordable(networks[candidates[0]], candidates[0], image, micro_batch, device)
    seconds = {c: [_seconds(network, c, image, n, device)] for c, network in networks.items()}  # warms up
    fastest = min(first for (first,) in seconds.values())
    for _ in range(_ROUNDS):
        for c, network in networks.items():
            if seconds[c][0] < 4 * fastest:  # some processors compute in bf16 at a tenth of the speed
                seconds[c].append(_seconds(network, c, image, n, device))
    return {c: times[1:] or times for c, times in seconds.items()}


def _affordable(
    network: nn.Module, arithmetic: Arithmetic, image: Image, micro_batch: int, device: torch.device
) -> int:
    """Return the number of images, up to a micro-batch, that fit into memory and the time of a trial pass."""
    n = min(micro_batch, 8)
    _seconds(network, arithmetic, image, n, device)
    while True:
        seconds = _seconds(network, arithmetic, image, n, device)
        more = min(micro_batch, 4 * n, int(n * _PASS_SECONDS / seconds))
        if more < 1.5 * n:
            return n
        try:
            _seconds(network, arithmetic, image, more, device)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return n
        n = more


def _seconds(network: nn.Module, arithmetic: Arithmetic, image: Image, n: int, device: torch.device) -> float:
    images = trial_images(image, n, arithmetic.memory_format, device)
    synchronize(device)
    start = time.perf_counter()
    trial_pass(network, network, images, arithmetic.autocast(device))
    synchronize(device)
    return time.perf_counter() - start


def trial_images(image: Image, n: int, memory_format: torch.memory_format, device: torch.device) -> Tensor:
    """Return random images [n, *image]."""
    return torch.randn(n, *image, device=device).contiguous(memory_format=memory_format)


def trial_pass(network: Callable[[Tensor], Tensor], model: nn.Module, images: Tensor, autocast: torch.autocast) -> None:
    """Run ``network`` forward and backward in training mode; leave ``model``, which it calls, unchanged."""
    buffers = [buffer.clone() for buffer in model.buffers()]
    model.train()
    try:
        with autocast:
            loss: Tensor = network(images).float().square().mean()
        torch.autograd.backward(loss)
    finally:
        model.zero_grad(set_to_none=True)
        for buffer, before in zip(model.buffers(), buffers, strict=True):
            buffer.copy_(before)


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _fastest(seconds: dict[Arithmetic, list[float]]) -> Arithmetic:
    """Return the arithmetic with the best time, if it is faster by the factors of ``_WORTH``."""

    def handicapped(c: Arithmetic) -> float:
        bf16 = _WORTH["bf16"] if c.precision == "bf16" else 1.0
        return min(seconds[c]) * bf16 * (_WORTH["channels_last"] if c.channels_last else 1.0)

    return min(seconds, key=handicapped)


def _is_calm(seconds: dict[Arithmetic, list[float]]) -> bool:
    return all(max(times) < _CALM * min(times) for times in seconds.values())


def _computes_in_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return "bf16" in processor()  # avx512_bf16, amx_bf16; bf16 on Arm


def _key(config: Config, image: Image, micro_batch: int, device: torch.device) -> str:
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{processor()} {torch.get_num_threads()}"
    network = [asdict(config.model), asdict(config.mode)]
    parts = [where, torch.__version__, *network, config.precision, image, micro_batch]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
