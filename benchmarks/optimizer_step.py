"""Cost of an optimizer's step: ours beside torch's, timm's and pytorch_optimizer's, on real parameter shapes.

All steps alternate in one process, in reversed order every other repeat; medians [quartiles]; ratios last.
`python benchmarks/optimizer_step.py [--device cuda] [--models resnet18 resnet50 transformer] [--repeats 11]
[--compiled] [--out FILE.json] [--smallest]`

On a GPU, ms is the host's time to queue a step, and device ms the time of a step in a CUDA graph, with a cold cache;
the ratios are of the device's times. ``--compiled`` adds torch.compile of the foreach form. The transformer has 110
million parameters.

The byte limit is the least memory traffic of a step, at the bandwidth of an in-place addition of 1 GiB arrays, which
alternates with the optimizers. Bytes a parameter in fp32: SGD reads weight, gradient and momentum
and writes two of them (20); LARS must read weight and gradient once more, for the norms (28); AdamW has a second
moment (28); LAMB reads weight and moments again after their norms are known (40). A layer that stays in the cache
between its two passes goes below the limit.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the launcher does for a run; read when torch is loaded

import timm.optim
import torch
import torchvision
from shared import parsed, print_table, quartiles
from shared.device_time import cuda_calls, device_seconds, event_seconds
from shared.operations import operations
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from largebatch import optim

WARM_UP = 3
STATISTICS_EVERY = 20  # steps between two rows of layers.parquet, the default of tracker.layers_every
ADDITION = "in-place addition of 1 GiB arrays"  # the clock of the byte limit
ADDITION_BYTES = 12  # an element in fp32; read two, write one

BYTES = {"SGD": 20, "LARS": 28, "AdamW": 28, "LAMB": 40}  # a parameter, by family
YARDSTICK = {"SGD": "torch SGD, fused", "LARS": "torch SGD, fused", "AdamW": "torch AdamW, fused"}
YARDSTICK["LAMB"] = YARDSTICK["AdamW"]

# First fused step of each optimizer, in a process with torch warm. Prints a name and seconds a line.
FIRST_STEPS = """
import sys, time, torch, warnings
from largebatch import optim

warnings.filterwarnings("error", ".*fused=True")  # no fused step here

def step(optimizer_class):
    weight = torch.nn.Parameter(torch.ones(64, 64, device=sys.argv[1]))
    weight.grad = torch.ones_like(weight)
    started = time.perf_counter()
    optimizer_class([weight], lr=1e-3, weight_decay=5e-4, fused=True).step()
    if sys.argv[1] == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started

step(torch.optim.SGD)
for name in ("LARS", "TVLARS", "LAMB"):
    print(name, step(getattr(optim, name)))
"""

Make = Callable[..., Optimizer]  # of parameters and further options


@dataclass
class Candidate:
    """An optimizer with its own parameters. ``gradients`` are restored before each step if a step changes them."""

    family: str
    parameters: list[Parameter]
    optimizer: Any
    gradients: list[Tensor] | None = None

    def prepare(self) -> None:
        """Prepare a step; not timed."""
        if self.gradients is not None:
            for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
                parameter.grad.copy_(gradient)
        if hasattr(self.optimizer, "set_sample_norms"):  # CLARS: its norms come from the backward pass
            self.optimizer.set_sample_norms(dict.fromkeys(self.parameters, self.parameters[0].new_ones(())))


# -- what is compared


def contestants() -> dict[str, tuple[str, Make]]:
    """Return family and constructor by name. All have weight decay, else each library's defaults."""
    shared = {"lr": 1e-3, "weight_decay": 5e-4}
    momentum = {**shared, "momentum": 0.9}
    forms = {"fused": {"fused": True}, "foreach": {"foreach": True}, "for-loop": {"foreach": False}}
    made: dict[str, tuple[str, Make]] = {}

    def add(name: str, family: str, optimizer_class: Any, **options: Any) -> None:
        made[name] = family, lambda parameters, **more: optimizer_class(parameters, **options, **more)

    for form, options in forms.items():
        add(f"torch SGD, {form}", "SGD", torch.optim.SGD, **momentum, **options)
    for name in ("LARS", "TVLARS"):
        for form, options in {**forms, "default": {}}.items():
            add(f"{name}, {form}", "LARS", getattr(optim, name), **momentum, **options)
    add("CLARS (norms given), default", "LARS", optim.CLARS, **momentum)
    add("timm Lars", "LARS", timm.optim.Lars, **momentum)
    for form, options in forms.items():
        add(f"torch AdamW, {form}", "AdamW", torch.optim.AdamW, **shared, **options)
    for form, options in {**forms, "default": {}}.items():
        add(f"LAMB, {form}", "LAMB", optim.LAMB, **shared, **options)
    add("MERIT, default", "LAMB", optim.MERIT, **shared)
    add("timm Lamb", "LAMB", timm.optim.Lamb, **shared)
    if importlib.util.find_spec("pytorch_optimizer"):
        import pytorch_optimizer

        add("pytorch_optimizer LARS", "LARS", pytorch_optimizer.LARS, **momentum)
        add("pytorch_optimizer Lamb", "LAMB", pytorch_optimizer.Lamb, **shared)
    else:
        print("pytorch_optimizer isn't installed and is left out; the extra `optimizers` has it\n")
    return dict(sorted(made.items(), key=lambda item: list(BYTES).index(item[1][0])))  # by family


def shapes_of(model: str) -> list[torch.Size]:
    with torch.device("meta"):
        if model == "transformer":
            layers = [torch.nn.TransformerEncoderLayer(768, 12, 3072) for _ in range(12)]
            network: torch.nn.Module = torch.nn.Sequential(torch.nn.Embedding(32_000, 768), *layers)
        else:
            network = getattr(torchvision.models, model)()
    return [parameter.shape for parameter in network.parameters()]


def tensors(model: str, device: str) -> list[list[Tensor]]:
    """Return random weights and gradients."""
    generator = torch.Generator(device=device).manual_seed(0)
    return [
        [torch.randn(shape, generator=generator, device=device).mul_(scale) for shape in shapes_of(model)]
        for scale in (0.05, 0.01)
    ]


def with_gradients(weights: list[Tensor], gradients: list[Tensor]) -> list[Parameter]:
    parameters = [Parameter(weight.clone()) for weight in weights]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    return parameters


def candidates(model: str, device: str) -> dict[str, Candidate]:
    """Return all contestants on the shapes of ``model`` after three steps, with state and compiled kernels."""
    weights, gradients = tensors(model, device)
    warm = {}
    for name, (family, make) in contestants().items():
        parameters = with_gradients(weights, gradients)
        candidate = Candidate(family, parameters, make(parameters))
        candidate.prepare()
        try:
            candidate.optimizer.step()
        except UserWarning as no_fused_step:  # without a compiler, for example
            print(f"{name} is left out: {no_fused_step}\n")
            continue
        if not all(torch.equal(p.grad, g) for p, g in zip(parameters, gradients, strict=True)):
            candidate.gradients = gradients
        for _ in range(WARM_UP - 1):
            candidate.prepare()
            candidate.optimizer.step()
        warm[name] = candidate
    return warm


# -- measuring


def host_seconds(action: Callable[[], object], device: str) -> float:
    """Return the seconds until the action returns: on a GPU, until its kernels are queued."""
    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    action()
    return time.perf_counter() - begin


def interleaved(warm: dict[str, Candidate], repeats: int, elements: int, device: str) -> dict[str, list[float]]:
    """Return the seconds of each step, each ``layer_stats()`` and the addition of ``elements`` fp32 numbers."""
    total, summand = torch.ones(elements, device=device), torch.ones(elements, device=device)
    actions: dict[str, Callable[[], object]] = {ADDITION: lambda: total.add_(summand)}
    actions[ADDITION]()
    for name, candidate in warm.items():
        actions[name] = candidate.optimizer.step
        if hasattr(candidate.optimizer, "layer_stats") and name.endswith("default"):
            actions[f"{name}: layer_stats()"] = candidate.optimizer.layer_stats
    times: dict[str, list[float]] = {name: [] for name in actions}
    gc.disable()
    for repeat in range(repeats):
        for name in list(actions) if repeat % 2 == 0 else reversed(actions):
            if name in warm:
                warm[name].prepare()
            on_device = name == ADDITION and device == "cuda"
            spent = event_seconds(actions[name]) if on_device else host_seconds(actions[name], device)
            times[name].append(spent)
        gc.collect()
    gc.enable()
    return times


def device_times(model: str, repeats: int, compiled: bool) -> dict[str, list[float]]:
    """Return the quartiles of a step's device time for our and torch's optimizers, except the slow forms for-loop.

    Other libraries copy numbers to the device in a step, which a CUDA graph can't capture. Default forms are the fused
    forms, and the only form of CLARS and of MERIT.
    """
    weights, gradients = tensors(model, "cuda")
    times = {}
    for name, (family, make) in contestants().items():
        own = name.startswith(("LARS", "TVLARS", "CLARS", "LAMB", "MERIT"))
        again = name.endswith("for-loop") or name.replace("default", "fused") in times
        if again or not (own or name.startswith("torch ")):
            continue
        options = {"capturable": True} if own or "AdamW" in name else {}
        candidate = Candidate(family, [], None)
        candidate.parameters = with_gradients(weights, gradients)
        candidate.optimizer = make(candidate.parameters, **options)
        steps = {name: candidate.optimizer.step}
        if compiled and own and "foreach" in name:
            torch._dynamo.reset()
            steps[name.replace("foreach", "compiled")] = torch.compile(candidate.optimizer.step)
        for form, step in steps.items():
            if found := device_seconds(lambda prepare=candidate.prepare, step=step: (prepare(), step()), repeats):
                times[form] = quartiles(found)
    return times


def first_steps(device: str, threads: int) -> dict[str, dict[str, float]]:
    """Return the seconds of the fused forms' first step in a fresh process, with an empty and a filled cache."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            "LARGEBATCH_CACHE": folder,
            "TRITON_CACHE_DIR": folder,
            "OMP_NUM_THREADS": str(threads),
        }
        found: dict[str, dict[str, float]] = {}
        for cache in ("empty", "filled"):
            command = [sys.executable, "-c", FIRST_STEPS, device]
            process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            if process.returncode:
                print("the first fused steps can't be timed:", process.stderr.strip().splitlines()[-1], "\n")
                return {}
            found[cache] = {name: float(time) for name, time in map(str.split, process.stdout.splitlines())}
    return found


# -- reporting


def measure(model: str, device: str, repeats: int, elements: int, compiled: bool) -> dict[str, Any]:
    warm = candidates(model, device)
    times = {name: quartiles(values) for name, values in interleaved(warm, repeats, elements, device).items()}
    bandwidth = ADDITION_BYTES * elements / times[ADDITION][1]
    weights = next(iter(warm.values())).parameters
    count = sum(weight.numel() for weight in weights)
    families = {name: candidate.family for name, candidate in warm.items()}
    counted = {}
    for name, candidate in warm.items():
        candidate.prepare()
        counted[name] = operations(candidate.optimizer.step)
    alone = times  # of the device, where host and device work at the same time
    if device == "cuda":
        for name, candidate in warm.items():
            candidate.prepare()
            counted[name] |= cuda_calls(candidate.optimizer.step)
        alone = device_times(model, repeats, compiled)
        families |= {name: families[name.replace("compiled", "foreach")] for name in alone}
    rows = []
    for name in sorted(families, key=lambda name: list(BYTES).index(families[name])):
        family = families[name]
        row = {"optimizer": name, "family": family, "against": YARDSTICK[family], **counted.get(name, {})}
        row["seconds"] = times.get(name)
        if name in alone:
            row["device_seconds"] = alone[name]
            row["ratio"] = alone[name][1] / alone[YARDSTICK[family]][1]
            row["byte_limit_ratio"] = alone[name][1] * bandwidth / (BYTES[family] * count)
        rows.append(row)
    statistics_rows = [
        {
            "optimizer": name,
            "seconds": times[f"{name}: layer_stats()"],
            "part_of_steps": times[f"{name}: layer_stats()"][1] / (STATISTICS_EVERY * times[name][1]),
        }
        for name in warm
        if f"{name}: layer_stats()" in times
    ]
    altering = [name for name, candidate in warm.items() if candidate.gradients is not None]
    return {
        "tensors": len(weights),
        "parameters": count,
        "bytes_per_second": bandwidth,
        "rows": rows,
        "layer_statistics": statistics_rows,
        "altering": altering,
    }


def ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def milliseconds(times: list[float] | None) -> str:
    if times is None:
        return ""
    low, median, high = (f"{1000 * value:.0f}" if value >= 0.1 else f"{1000 * value:.3g}" for value in times)
    return f"{median} [{low}-{high}]"


def show(model: str, result: dict[str, Any], device: str) -> None:
    print(f"{model}: {result['parameters']:,} parameters in {result['tensors']} tensors; ", end="")
    print(f"bandwidth {result['bytes_per_second'] / 1e9:.1f} GB/s\n")
    on_gpu = ["device ms"] if device == "cuda" else []
    counts = ["operations", "scalar reads", *(["launches", "synchronisations"] if on_gpu else [])]
    headers = ["optimizer", "ms", *on_gpu, "x SGD fused", "x AdamW fused", "x byte limit", *counts]
    table = [
        [
            row["optimizer"],
            milliseconds(row["seconds"]),
            *(milliseconds(row.get("device_seconds")) for _ in on_gpu),
            *(ratio(row.get("ratio")) if row["against"] == YARDSTICK[family] else "" for family in ("SGD", "AdamW")),
            ratio(row.get("byte_limit_ratio")),
            *(row.get(key.replace(" ", "_"), "") for key in counts),
        ]
        for row in result["rows"]
    ]
    print_table(headers, table, left=2)
    if result["altering"]:
        print(f"Gradients altered by a step, and restored before it, untimed: {', '.join(result['altering'])}\n")
    table = [
        [row["optimizer"], milliseconds(row["seconds"]), f"{100 * row['part_of_steps']:.2f} %"]
        for row in result["layer_statistics"]
    ]
    print_table(["layer_stats() of", "ms", f"of the steps, once every {STATISTICS_EVERY}"], table, left=2)


def show_first_steps(found: dict[str, dict[str, float]]) -> None:
    table = [[f"{cache} cache", *(f"{time:.2f}" for time in times.values())] for cache, times in found.items()]
    print_table(["first fused step, fresh process, s", *next(iter(found.values()))], table)


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads; 2 by default")
    parser.add_argument("--models", nargs="+", help="of torchvision, or transformer; by default ResNet-18 and -50")
    parser.add_argument("--repeats", type=int, default=11, help="11 by default")
    parser.add_argument("--out", type=Path, help="JSON file for the numbers")
    parser.add_argument("--elements", type=int, default=1 << 28, help="elements of each added array; 2^28 by default")
    parser.add_argument("--compiled", action="store_true", help="on a GPU, compile the foreach forms too (minutes)")
    given = parsed(parser, models=["squeezenet1_1"], repeats=1, elements=1 << 16)
    warnings.filterwarnings("ignore")
    warnings.filterwarnings("error", ".*fused=True")  # our optimizers warn when they take another step
    torch.set_num_threads(given.threads)
    about = {"device": device_name(given.device), "threads": given.threads, "python": platform.python_version()}
    about |= {"torch": torch.__version__, "date": str(date.today()), "repeats": given.repeats}
    print(", ".join(f"{key} {value}" for key, value in about.items()), "\n")
    found = {**about, "first_steps": first_steps(given.device, given.threads), "models": {}}
    if found["first_steps"]:
        show_first_steps(found["first_steps"])
    for model in given.models or ["resnet18", "resnet50", *(["transformer"] if given.device == "cuda" else [])]:
        found["models"][model] = measure(model, given.device, given.repeats, given.elements, given.compiled)
        show(model, found["models"][model], given.device)
    if given.out:
        given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
