"""Decoding and resizing of image files, compared with torchvision and PIL."""

import os

import numpy as np
import pytest
from datafiles import decoded, pictures, save_image
from PIL import Image, ImageFile

from largebatch.data.images import FileImages, decode
from largebatch.errors import UserError


def picture(height, width, channels=3):
    side = max(height, width)
    return pictures(np.random.default_rng(0), np.array([0]), channels, side, 0)[0, :, :height, :width]


@pytest.mark.parametrize("shape", [(40, 70), (70, 40), (9, 31), (64, 64), (33, 64), (500, 333)])
def test_resize_and_centre_crop_are_torchvisions(tmp_path, shape):
    from torchvision.transforms import CenterCrop, Resize

    path = tmp_path / "image.png"
    save_image(path, picture(*shape))
    expected = np.asarray(CenterCrop(32)(Resize(32)(Image.open(path)))).transpose(2, 0, 1)
    assert np.array_equal(decode(str(path), 3, 32), expected)


def test_an_image_of_the_right_size_is_not_changed(tmp_path):
    pixels = picture(32, 32)
    save_image(tmp_path / "image.png", pixels)
    assert np.array_equal(decode(str(tmp_path / "image.png"), 3, 32), pixels)


def test_modes(tmp_path):
    """Colour from grey, grey from colour, and all other modes of files."""
    grey = picture(8, 8, channels=1)
    save_image(tmp_path / "grey.png", grey)
    assert np.array_equal(decode(str(tmp_path / "grey.png"), 3, 8), grey.repeat(3, axis=0))
    assert np.array_equal(decode(str(tmp_path / "grey.png"), 1, 8), grey)

    colour = picture(8, 8)
    save_image(tmp_path / "colour.png", colour)
    expected = np.asarray(Image.open(tmp_path / "colour.png").convert("L"))
    assert np.array_equal(decode(str(tmp_path / "colour.png"), 1, 8)[0], expected)

    opaque = np.concatenate([colour, np.full((1, 8, 8), 255, np.uint8)])
    Image.fromarray(opaque.transpose(1, 2, 0), "RGBA").save(tmp_path / "rgba.png")
    assert np.array_equal(decode(str(tmp_path / "rgba.png"), 3, 8), colour)

    Image.fromarray(grey[0].astype(np.uint16) * 256 + 77).save(tmp_path / "deep.png")
    assert np.array_equal(decode(str(tmp_path / "deep.png"), 1, 8), grey)

    palette = Image.open(tmp_path / "colour.png").quantize(16)
    palette.save(tmp_path / "palette.png", transparency=bytes([0, 255, 9]))
    assert np.array_equal(
        decode(str(tmp_path / "palette.png"), 3, 8), np.asarray(palette.convert("RGB")).transpose(2, 0, 1)
    )
    Image.fromarray(grey[0] > 128).save(tmp_path / "bits.png")
    assert np.array_equal(decode(str(tmp_path / "bits.png"), 1, 8), (grey > 128) * np.uint8(255))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("extension", ["png", "jpg", "bmp", "webp", "ppm", "tiff"])
def test_unreadable_files_raise_with_their_name(tmp_path, extension):
    """Truncated, empty, other content, or missing."""
    whole = tmp_path / f"whole.{extension}"
    save_image(whole, picture(48, 48))
    decode(str(whole), 3, 32)
    content = whole.read_bytes()
    for bad in (b"", b"hello", content[:20], content[: len(content) // 2], content[: len(content) * 9 // 10]):
        path = tmp_path / f"bad.{extension}"
        path.write_bytes(bad)
        with pytest.raises(UserError, match=rf"bad\.{extension} can't be read as an image"):
            decode(str(path), 3, 32)
    with pytest.raises(UserError, match="gone"):
        decode(str(tmp_path / "gone"), 3, 32)


def test_decoding_all_at_once_keeps_the_order(tmp_path):
    """There are more files than one thread takes at a time."""
    paths = []
    for i in range(150):
        paths.append(str(tmp_path / f"{i}.png"))
        save_image(tmp_path / f"{i}.png", np.full((1, 4, 4), i, np.uint8))
    pixels = decoded(FileImages(tuple(paths), 1, 4))
    assert pixels[:, 0, 0, 0].tolist() == list(range(150))


@pytest.mark.parametrize(
    ("kind", "scale"), [(np.int32, 1), (np.float32, 1), (np.float32, 1 / 255), (np.int32, 1000), (np.uint16, 257)]
)
def test_grey_of_more_than_eight_bits_keeps_its_steps(tmp_path, kind, scale):
    steps = np.tile(np.linspace(0, 255, 16), (16, 1))
    Image.fromarray((steps * scale).astype(kind)).save(tmp_path / "grey.tif")
    assert decode(str(tmp_path / "grey.tif"), 1, 16)[0, 0].tolist() == steps[0].tolist()


def test_sixteen_bit_pgm_keeps_its_upper_byte(tmp_path):
    grey = np.array([[0, 256], [512, 65535]], ">u2")
    (tmp_path / "grey.pgm").write_bytes(b"P5 2 2 65535\n" + grey.tobytes())
    assert decode(str(tmp_path / "grey.pgm"), 1, 2)[0].tolist() == [[0, 1], [2, 255]]


def test_undefined_grey_raises_with_the_file_s_name(tmp_path):
    Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(tmp_path / "grey.tif")
    with pytest.raises(UserError, match=r"grey\.tif can't be read as an image \(it has infinite or undefined"):
        decode(str(tmp_path / "grey.tif"), 1, 4)


@pytest.mark.timeout(20)
def test_a_pipe_with_the_name_of_an_image_raises_instead_of_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(UserError, match=r"pipe\.jpg can't be read as an image \(it is a pipe"):
        decode(str(tmp_path / "pipe.jpg"), 3, 4)


@pytest.mark.parametrize("error", [RuntimeError("no image item"), MemoryError(), ZeroDivisionError("division by zero")])
def test_any_error_of_a_decoder_has_the_file_s_name(tmp_path, monkeypatch, error):
    class Broken(ImageFile.ImageFile):
        format = "BROKEN"

        def _open(self):
            raise error

    monkeypatch.setattr(Image, "ID", ["BROKEN"])
    monkeypatch.setattr(Image, "OPEN", {"BROKEN": (Broken, lambda prefix: True)})
    (tmp_path / "image.png").write_bytes(b"anything")
    with pytest.raises(UserError, match=r"image\.png can't be read as an image \(.+\)"):
        decode(str(tmp_path / "image.png"), 3, 4)
