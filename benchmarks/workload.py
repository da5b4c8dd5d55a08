"""The built-in workload: the deformed digits' making and difficulty, and images per second of the small networks.

Linear classifiers are ridge regression on all training images. Distances are Euclidean, of pixels in 0..1, from an
image to the nearest training image of another source. Rates are of forward and backward passes of 512 images on one
thread, interleaved, in seconds of processor time; medians. `python benchmarks/workload.py [--repeats 11] [--smallest]`
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time

import torch
from shared import parsed, print_table
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from largebatch.config.datasets import DATASETS, DatasetConfig, DeformedDigits, Digits
from largebatch.config.models import ModelConfig, ResNet, SmallCnn, TinyCnn
from largebatch.data import load_data
from largebatch.data.load import Data
from largebatch.models.build import build_model

NETWORKS: dict[str, ModelConfig] = {
    "tinycnn": TinyCnn(name="tinycnn"),
    "smallcnn": SmallCnn(name="smallcnn"),
    "resnet18, CIFAR stem": ResNet(name="resnet18", stem="cifar"),
}


def rows_of(images: Tensor) -> Tensor:
    return images.flatten(1).float() / 255


def linear_accuracy(data: Data) -> float:
    def inputs(images: Tensor) -> Tensor:
        return torch.cat([rows_of(images) - 0.5, torch.ones(len(images), 1)], 1).double()

    training = inputs(data.train.images.pixels)
    targets = one_hot(data.train.labels).double()
    squares = training.T @ training + torch.eye(training.shape[1], dtype=torch.float64)
    scores = inputs(data.test.images.pixels) @ torch.linalg.solve(squares, training.T @ targets)
    return (scores.argmax(1) == data.test.labels).double().mean().item()


def distances(data: Data, copies: int) -> tuple[Tensor, Tensor]:
    """Return the nearest distances of test images, and of training images to those of other sources."""
    train, test = rows_of(data.train.images.pixels), rows_of(data.test.images.pixels)
    sources = torch.arange(len(train)) // copies
    chosen = torch.arange(0, len(train), max(len(train) // 1000, 1))
    among = torch.cdist(train[chosen], train).masked_fill_(sources[chosen, None] == sources, torch.inf)
    return torch.cdist(test[:: max(len(test) // 1000, 1)], train).amin(1), among.amin(1)


def seconds(network: torch.nn.Module, images: Tensor, labels: Tensor, passes: int = 3) -> float:
    cross_entropy(network(images), labels).backward()  # not counted
    started = time.process_time()
    for _ in range(passes):
        cross_entropy(network(images), labels).backward()
    return (time.process_time() - started) / passes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--images", type=int, default=512)
    given = parsed(parser, repeats=1, images=8)
    torch.set_num_threads(1)

    described = []
    with tempfile.TemporaryDirectory() as root:
        options: list[DatasetConfig] = [
            Digits(name="digits"),
            DeformedDigits(name="deformed_digits", root=root),
        ]
        for option in options:
            started = time.perf_counter()
            data = load_data(option, 0)
            took = time.perf_counter() - started
            test, among = distances(data, DATASETS[option.name].copies)
            described.append(
                [
                    option.name, f"{len(data.train):,} + {len(data.test):,}", f"{took:.1f}",
                    f"{100 * linear_accuracy(data):.1f}",
                    f"{test.min():.2f}, {test.median():.2f}", f"{among.min():.2f}, {among.median():.2f}",
                ]
            )  # fmt: skip
    print_table(
        ["data set", "images", "made in [s]", "linear classifier [%]", "test to training: least, median",
         "training to other sources: least, median"],
        described,
    )  # fmt: skip

    images, labels = torch.randn(given.images, 1, 16, 16), torch.randint(10, (given.images,))
    networks = {name: build_model(config, 10, 1) for name, config in NETWORKS.items()}
    found: dict[str, list[float]] = {name: [] for name in networks}
    for _ in range(given.repeats):
        for name, network in networks.items():
            found[name].append(given.images / seconds(network, images, labels, 1 if "resnet" in name else 3))
    parameters = {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()}
    print_table(
        ["network, images of 16x16", "parameters", "images per second"],
        [[name, f"{parameters[name]:,}", f"{statistics.median(rates):,.0f}"] for name, rates in found.items()],
    )


if __name__ == "__main__":
    main()
