"""Time of Muon's step: ours beside timm's, in the same precision and with the same coefficients, and fused SGD.

`python benchmarks/muon_step.py [--device cuda] [--models resnet18] [--repeats 11] [--threads 2] [--smallest]`

The steps alternate in one process, in reversed order every other repeat; medians [quartiles]. timm's iteration is
always in bf16, which a CPU computes slowly: on CPU the benchmark gives it fp32. Parameters are the model's
convolutions and matrices but the classifier.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import timm.optim.muon
import torch
import torchvision
from shared import parsed, print_table, quartiles

from largebatch.optim import Muon

OPTIONS = {"lr": 1e-3, "weight_decay": 0.1, "momentum": 0.95, "nesterov": True}
WARM_UP = 2


def steps_of(model: str, device: str) -> dict[str, Callable[[], object]]:
    """Return a step of each optimizer, on parameters of its own with constant gradients."""
    network = getattr(torchvision.models, model)()
    weights = [p.detach() for name, p in network.named_parameters() if p.ndim > 1 and not name.startswith("fc.")]
    if device == "cpu":
        original = timm.optim.muon.zeropower_via_newtonschulz
        timm.optim.muon.zeropower_via_newtonschulz = partial(original, dtype=torch.float32)
    timms = partial(timm.optim.muon.Muon, ns_coefficients="original", **OPTIONS)
    makes = {
        "Muon": partial(Muon, **OPTIONS),
        "timm Muon": timms,
        "torch SGD, fused": partial(torch.optim.SGD, lr=1e-3, momentum=0.9, fused=True),
    }
    steps = {}
    for name, make in makes.items():
        parameters = [weight.clone().to(device).requires_grad_() for weight in weights]
        generator = torch.Generator().manual_seed(0)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(device)
        steps[name] = make(parameters).step
    return steps


def seconds(step: Callable[[], object], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads; 2 by default")
    parser.add_argument("--models", nargs="+", default=["resnet18"], help="of torchvision, with a classifier named fc")
    parser.add_argument("--repeats", type=int, default=11, help="11 by default")
    given = parsed(parser, models=["shufflenet_v2_x0_5"], repeats=1)
    torch.set_num_threads(given.threads)
    for model in given.models:
        steps = steps_of(model, given.device)
        times: dict[str, list[float]] = {name: [] for name in steps}
        for repeat in range(-WARM_UP, given.repeats):
            for name in list(steps) if repeat % 2 == 0 else reversed(steps):
                spent = seconds(steps[name], given.device)
                if repeat >= 0:
                    times[name].append(1000 * spent)
        found = {name: quartiles(values) for name, values in times.items()}
        rows = [
            [name, f"{median:.3g} [{low:.3g}-{high:.3g}]", *(f"{median / found[other][1]:.2f}" for other in found)]
            for name, (low, median, high) in found.items()
        ]
        print_table([model, "ms", *(f"x {name}" for name in found)], rows)


if __name__ == "__main__":
    main()
