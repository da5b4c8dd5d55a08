"""Decoding processes hand images over without shared memory, and never leave training waiting."""

import _multiprocessing
import errno
import os
import signal

import pytest
import torch
from datafiles import decoded, make_imagefolder

from largebatch.data import stream as module
from largebatch.data.images import FileImages
from largebatch.data.stream import stream
from largebatch.errors import UserError


@pytest.fixture
def images(tmp_path):
    make_imagefolder(tmp_path)
    return FileImages(tuple(map(str, sorted(tmp_path.glob("train/*/*.png")))), 3, 16)


def pixels(images):
    return torch.cat(list(stream(images, torch.arange(len(images)).split(6), batch=6, workers=2)))


@pytest.mark.timeout(60)
def test_images_go_through_a_pipe_when_shared_memory_is_full(images, monkeypatch):
    def full(tensor):
        raise RuntimeError("unable to allocate shared memory(shm) for file: No space left on device (28)")

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    assert torch.equal(pixels(images), decoded(images))


@pytest.mark.timeout(60)
def test_a_result_that_cannot_be_handed_over_ends_with_an_error(images, monkeypatch):
    monkeypatch.setattr(module._Decoder, "__getitem__", lambda decoder, indices: lambda: None)  # can't be pickled
    with pytest.raises(RuntimeError, match=r"dataset\.workers=2: a decoding process failed.*Fix: "):
        pixels(images)


@pytest.mark.timeout(60)
def test_a_killed_decoding_process_ends_with_an_error(images, monkeypatch):
    monkeypatch.setattr(module, "decode", lambda *arguments: signal.raise_signal(signal.SIGKILL))
    with pytest.raises(RuntimeError, match=r"dataset\.workers=2: a decoding process failed.*Fix: "):
        pixels(images)


def test_without_semaphores_the_message_names_shared_memory(images, monkeypatch):
    """They are files in /dev/shm, which may be missing or read-only."""

    def refuse(*arguments):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))

    monkeypatch.setattr(_multiprocessing, "SemLock", refuse)
    with pytest.raises(UserError, match=r"dataset\.workers=2: .* can't start .*/dev/shm.* Fix: dataset\.workers=0"):
        pixels(images)
