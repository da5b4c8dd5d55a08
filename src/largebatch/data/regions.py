"""Decoding of a part of a JPEG by nvImageCodec (the extra ``decode``) on the CPU, with the pixels of PIL's decoder.

nvImageCodec calls libjpeg-turbo, which skips the rows above and below a part and the columns beside it. PIL decodes the
whole file.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

_END = b"\xff\xd9"  # of a JPEG
_NARROWEST = 16  # columns: at the edge of an image, a part of one column differs from PIL's pixels

Box = tuple[int, int, int, int]  # left, top, right and bottom in pixels
_Region = Callable[[bytes, Box], Any]


def decoded_region(data: bytes, box: Box) -> NDArray[np.uint8] | None:
    """Return the pixels of ``box``, uint8 [H, W, 3], from the bytes of a JPEG that PIL calls RGB or L.

    None if nvImageCodec isn't installed or can't decode the file, and for a file that is cut short: PIL then decodes
    the file or has the error.
    """
    decode = _decoder()
    if decode is None or box[2] - box[0] < _NARROWEST or not data.endswith(_END):
        return None
    try:
        image = decode(data, box)
        pixels: NDArray[np.uint8] = np.asarray(image)
    except Exception:  # damaged files make decoders raise anything; PIL reads the same file next
        return None
    return pixels if pixels.shape == (box[3] - box[1], box[2] - box[0], 3) and pixels.dtype == np.uint8 else None


@functools.cache
def _decoder() -> _Region | None:
    """Return a function from a JPEG's bytes and a box to its image, or to None."""
    os.environ.setdefault("PYNVIMGCODEC_VERBOSITY", "0")  # PIL names the error of a damaged file
    try:
        with _quiet():  # the import names every missing library of GPUs
            import nvidia.nvimgcodec as codec

            decoder = codec.Decoder(
                device_id=codec.NVIMGCODEC_DEVICE_CPU_ONLY,
                backends=[codec.Backend(codec.CPU_ONLY)],
                max_num_cpu_threads=1,
            )
    except ModuleNotFoundError:
        return None
    except Exception as error:
        print(f"nvImageCodec can't be used ({error}), so PIL decodes whole files", file=sys.stderr, flush=True)
        return None
    params = codec.DecodeParams(apply_exif_orientation=False)  # PIL doesn't apply it either

    def decode(data: bytes, box: Box) -> Any:
        left, top, right, bottom = box
        region = codec.Region([top, left], [bottom, right])
        return decoder.decode(codec.CodeStream(data).get_sub_code_stream(0, region=region), params=params)

    return decode


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Discard what libraries write to file descriptor 2 meanwhile."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
