"""Noisy stripes and checks, made offline."""

import torch


def stripes(train_size=1024, test_size=256, noise=0.5, size=12):
    """Return training data, test data and class names. The images are grey floats from 0 to 1."""
    generator = torch.Generator().manual_seed(0)  # the same images in every process and every run
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    wide, high = rows // 2 % 2, columns // 2 % 2
    patterns = torch.stack([wide, high, wide ^ high])

    def split(count):
        labels = torch.arange(count) % len(patterns)
        flipped = torch.randint(2, (count, 1, 1), generator=generator)
        noises = torch.rand(count, size, size, generator=generator)
        return (patterns[labels] ^ flipped).float().lerp(noises, noise), labels

    return split(train_size), split(test_size), ["horizontal", "vertical", "checks"]
