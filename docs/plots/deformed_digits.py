"""Write a picture of the deformed digits: for each class, one test image of each of 20 sources.

`python docs/plots/deformed_digits.py [FILE]` writes FILE, by default deformed_digits.png beside this script.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from PIL import Image

from largebatch.config.datasets import DeformedDigits
from largebatch.data import load_data
from largebatch.data.images import MemoryImages

SOURCES, SCALE = 20, 3


def main() -> None:
    with tempfile.TemporaryDirectory() as root:
        images = load_data(DeformedDigits(name="deformed_digits", root=root), 0).test.images
        assert isinstance(images, MemoryImages)
        by_class = images.pixels.view(10, -1, DeformedDigits.copies, 16, 16)[:, :SOURCES, 0]
    rows = by_class.transpose(1, 2).reshape(10 * 16, SOURCES * 16).numpy()
    file = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".png")
    size = (SCALE * rows.shape[1], SCALE * rows.shape[0])
    Image.fromarray(rows).resize(size, Image.Resampling.NEAREST).save(file)


if __name__ == "__main__":
    main()
