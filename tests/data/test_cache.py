"""The second start equals the first, without decoding, and never uses a stale file."""

import errno
import hashlib
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from datafiles import make_cifar10, make_imagefolder, make_tinyimagenet, save_image

from largebatch.config.datasets import DatasetConfig
from largebatch.data import cifar, load_data
from largebatch.data.cache import kept
from largebatch.errors import UserError


def folder_config(root, **options):
    return DatasetConfig(name="imagefolder", root=str(root), **{"image_size": 16, "workers": 0, **options})


def tiny_config(root):
    return DatasetConfig(name="tinyimagenet", root=str(root), download=False)


def cifar_config(root, **options):
    return DatasetConfig(name="cifar10", root=str(root), **{"download": False, "verify": False, **options})


MAKERS = {
    "imagefolder": (make_imagefolder, folder_config),
    "tinyimagenet": (make_tinyimagenet, tiny_config),
    "cifar10": (make_cifar10, cifar_config),
}


def start(config):
    lines = []
    return load_data(config, 0, say=lines.append), lines


def content(data):
    splits = [(split.images.pixels.clone(), split.labels.clone()) for split in (data.train, data.test)]
    return [*splits[0], *splits[1]], data.classes, data.mean


def same(first, second):
    return all(map(torch.equal, first[0], second[0])) and first[1:] == second[1:]


def spoil(path):
    """Change the content but not size and time, so that only a reader of the content notices."""
    stat = path.stat()
    path.write_bytes(bytes(stat.st_size))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def cache_of(root):
    (path,) = (root / ".largebatch").glob("*.pixels")
    return path


@pytest.mark.parametrize("name", MAKERS)
def test_the_second_start_equals_the_first_and_reads_no_source(tmp_path, name):
    make, config = MAKERS[name]
    make(tmp_path)
    first, lines = start(config(tmp_path))
    first = content(first)
    assert len(lines) == 1
    assert str(cache_of(tmp_path)) in lines[0]
    sources = {".png", ".JPEG", ""}
    for path in tmp_path.rglob("*"):
        if path.is_file() and path.suffix in sources and ".largebatch" not in path.parts:
            spoil(path)
    second, lines = start(config(tmp_path))
    assert same(first, content(second))
    assert lines == []


def test_writes_to_mapped_pixels_do_not_change_the_file(tmp_path):
    make_imagefolder(tmp_path)
    start(folder_config(tmp_path))
    pixels = start(folder_config(tmp_path))[0].train.images.pixels
    assert pixels.is_contiguous()
    before = pixels.clone()
    pixels.zero_()  # changes nothing in the file
    assert torch.equal(start(folder_config(tmp_path))[0].train.images.pixels, before)


def change(root):
    save_image(root / "train" / "cat" / "0.png", np.zeros((3, 28, 28), np.uint8))


def touch(root):
    os.utime(root / "train" / "cat" / "0.png", ns=(1, 1))


def add(root):
    save_image(root / "test" / "eel" / "new.png", np.zeros((3, 28, 28), np.uint8))


def remove(root):
    (root / "train" / "dog" / "5.png").unlink()


def rename(root):
    (root / "train" / "dog" / "5.png").rename(root / "train" / "dog" / "50.png")


def move_to_another_class(root):
    (root / "train" / "dog" / "5.png").rename(root / "train" / "cat" / "6.png")


def add_a_class(root):
    shutil.copytree(root / "train" / "dog", root / "train" / "cow")


@pytest.mark.parametrize("alter", [change, touch, add, remove, rename, move_to_another_class, add_a_class])
def test_a_changed_source_is_decoded_again(tmp_path, alter):
    root = make_imagefolder(tmp_path / "images")
    start(folder_config(root))
    alter(root)
    again, lines = start(folder_config(root))
    assert any("was made from other files or settings: it is written again" in line for line in lines)
    fresh = shutil.copytree(root, tmp_path / "fresh", ignore=shutil.ignore_patterns(".largebatch"))
    assert same(content(again), content(start(folder_config(fresh))[0]))
    assert start(folder_config(root))[1] == []


def test_a_moved_data_set_keeps_its_pixels(tmp_path):
    root = make_imagefolder(tmp_path / "here")
    start(folder_config(root))
    assert start(folder_config(root.rename(tmp_path / "there")))[1] == []


def test_each_size_and_number_of_channels_has_its_own_file(tmp_path):
    make_imagefolder(tmp_path)
    configs = [folder_config(tmp_path, image_size=size, channels=c) for size, c in ((16, 3), (16, 1), (8, 3))]
    first = [content(start(config)[0]) for config in configs]
    for config, expected in zip(configs, first, strict=True):
        data, lines = start(config)
        assert lines == []
        assert same(content(data), expected)


def cut(path, at):
    path.write_bytes(path.read_bytes()[:at])


def flip_bit(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "few bytes": lambda path: cut(path, 10),
    "cut in the middle": lambda path: cut(path, path.stat().st_size // 2),
    "cut by a byte": lambda path: cut(path, -1),
    "garbage": lambda path: path.write_bytes(np.random.default_rng(0).bytes(path.stat().st_size)),
    "first pixel": lambda path: flip_bit(path, 0),
    "other pixel": lambda path: flip_bit(path, 5000),
    "other description": lambda path: flip_bit(path, -30),
    "other length": lambda path: flip_bit(path, -14),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_written_again(tmp_path, damage):
    make_imagefolder(tmp_path)
    first = content(start(folder_config(tmp_path))[0])
    DAMAGES[damage](cache_of(tmp_path))
    second, lines = start(folder_config(tmp_path))
    assert any("it is written again" in line for line in lines)
    assert same(first, content(second))
    assert start(folder_config(tmp_path))[1] == []


def test_a_damaged_list_of_unreadable_images_is_written_again(tmp_path, monkeypatch):
    monkeypatch.setattr("largebatch.data.load.host_memory", lambda: 1000)
    make_imagefolder(tmp_path)
    start(folder_config(tmp_path))
    whole = cache_of(tmp_path).read_bytes()
    for damaged in (b"", b"[1]", whole[:40], whole.replace(b"[]", b"7"), b"\xff\xfe"):
        cache_of(tmp_path).write_bytes(damaged)
        assert any("it is written again" in line for line in start(folder_config(tmp_path))[1])


@pytest.mark.parametrize("name", MAKERS)
def test_one_line_reports_that_nothing_can_be_kept(tmp_path, name):
    make, config = MAKERS[name]
    make(tmp_path / "kept")
    expected = content(start(config(tmp_path / "kept"))[0])
    make(tmp_path / "not")
    (tmp_path / "not" / ".largebatch").write_text("in the way")
    for _ in range(2):
        data, lines = start(config(tmp_path / "not"))
        assert same(content(data), expected)
        assert len(lines) == 1
        assert "at every start, because it can't be kept in" in lines[0]


def test_a_full_disk_is_reported_and_memory_is_used(tmp_path):
    """The disk becomes full during the first write."""
    written, lines = [], []

    def write(file):
        file.write(b"first half ")
        written.append(file)
        if len(written) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        file.write(b"second half")

    def read(file):
        file.seek(0)
        return file.read()

    assert kept(tmp_path / "folder" / "file", read, write, "counting", lines.append) == b"first half second half"
    assert [path.suffix for path in (tmp_path / "folder").iterdir()] == [".lock"]
    assert "counting at every start" in lines[-1]
    assert "No space left" in lines[-1]


def test_temporary_files_of_a_killed_process_are_removed(tmp_path):
    make_imagefolder(tmp_path)
    start(folder_config(tmp_path))
    cache = cache_of(tmp_path)
    cache.unlink()
    (cache.parent / f".{cache.name}.somewhere.123.tmp").write_bytes(b"half a file")
    start(folder_config(tmp_path))
    assert {path.name for path in cache.parent.iterdir()} == {cache.name, f"{cache.name}.lock"}


def test_an_error_leaves_no_temporary_file(tmp_path):
    folder = make_cifar10(tmp_path)
    (folder / "data_batch_3").write_bytes(b"damaged")
    with pytest.raises(UserError, match="data_batch_3"):
        start(cifar_config(tmp_path))
    assert [path.suffix for path in (tmp_path / ".largebatch").iterdir()] == [".lock"]


# Starts a process for each line of input, so that torch is imported only once.
STARTER = """
import hashlib, os, sys
from largebatch.config.datasets import DatasetConfig
from largebatch.data import load_data

def say(line):
    os.write(1, f"{os.getpid()} {line}\\n".encode())

for _ in iter(sys.stdin.readline, ""):
    if os.fork() == 0:
        data = load_data(DatasetConfig(name="imagefolder", root=sys.argv[1], image_size=96, workers=0), 0, say=say)
        say("sha256 " + hashlib.sha256(data.train.images.pixels.numpy().tobytes()).hexdigest())
        os._exit(0)
while True:
    try:
        os.wait()
    except ChildProcessError:
        break
"""


def make_slow_images(root):
    """Make 27 images, and 60 more that take about 30 ms each."""
    make_imagefolder(root)
    large = root / "train" / "cat" / "large0.png"
    save_image(large, np.zeros((3, 2000, 2000), np.uint8))
    for i in range(1, 60):
        large.with_name(f"large{i}.png").hardlink_to(large)
    return root


def starter(root):
    command = [sys.executable, "-c", STARTER, str(root)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def start_one(process):
    """Start one process and wait for its first line; return its pid and the line."""
    process.stdin.write("\n")
    process.stdin.flush()
    pid, line = process.stdout.readline().split(maxsplit=1)
    return int(pid), line


@pytest.mark.slow
def test_one_of_several_concurrent_processes_decodes(tmp_path):
    root = make_slow_images(tmp_path)
    lines = starter(root).communicate("\n\n\n", timeout=60)[0].splitlines()
    assert sum("decoding 87 images" in line for line in lines) == 1
    data = load_data(DatasetConfig(name="imagefolder", root=str(root), image_size=96), 0)
    expected = hashlib.sha256(data.train.images.pixels.numpy().tobytes()).hexdigest()
    assert [line.split()[-1] for line in lines if "sha256" in line] == [expected] * 3


def test_a_killed_process_releases_the_lock(tmp_path):
    root = make_slow_images(tmp_path)
    process = starter(root)
    first, line = start_one(process)
    assert line.startswith("decoding 87 images")
    second, line = start_one(process)
    assert line.startswith("waiting for the process that is writing")
    os.kill(first, signal.SIGKILL)
    lines = process.communicate(timeout=60)[0].splitlines()
    assert [line.split()[:2] for line in lines] == [[str(second), "decoding"], [str(second), "sha256"]]
    assert not list((root / ".largebatch").glob(".*.tmp"))


def test_only_changed_files_are_verified_again(tmp_path, monkeypatch):
    folder = make_cifar10(tmp_path)
    published = cifar.ARCHIVES["cifar10"]

    def md5s(names):
        return {name: hashlib.md5((folder / name).read_bytes()).hexdigest() for name in names}

    start(cifar_config(tmp_path, verify=False))
    with pytest.raises(UserError, match="isn't the published file"):  # pixels kept without verification don't count
        start(cifar_config(tmp_path, verify=True))
    of_these = replace(published, train=md5s(published.train), test=md5s(published.test), meta=md5s(published.meta))
    monkeypatch.setitem(cifar.ARCHIVES, "cifar10", of_these)
    first = content(start(cifar_config(tmp_path, verify=True))[0])
    spoil(folder / "data_batch_1")
    assert same(content(start(cifar_config(tmp_path, verify=True))[0]), first)
    os.utime(folder / "data_batch_1")
    with pytest.raises(UserError, match=r"data_batch_1 isn't the published file"):
        start(cifar_config(tmp_path, verify=True))
