"""Download of an archive from a local server."""

import hashlib
import multiprocessing
import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from datafiles import make_cifar10, make_tinyimagenet

from largebatch.config.datasets import DatasetConfig
from largebatch.data.download import find_or_download
from largebatch.errors import UserError

NEEDED = ("data_batch_1", "test_batch", "batches.meta")
FOLDER = "cifar-10-batches-py"


@pytest.fixture
def server(tmp_path):
    """A web server for ``tmp_path/served``: its address, and the paths of all requests."""
    requested = []

    class Handler(SimpleHTTPRequestHandler):
        def log_request(self, code="-", size="-"):
            requested.append(self.path)

        def log_message(self, *args):
            pass

    served = tmp_path / "served"
    served.mkdir()
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(served)))
    thread = threading.Thread(target=httpd.serve_forever, args=(0.02,))
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_port}", requested
    httpd.shutdown()
    httpd.server_close()
    thread.join()


@pytest.fixture
def archive(tmp_path):
    """Name of the archive ``served/cifar.tar.gz``, and its md5."""
    make_cifar10(tmp_path / "made")
    path = shutil.make_archive(str(tmp_path / "served" / "cifar"), "gztar", tmp_path / "made")
    return "cifar.tar.gz", hashlib.md5(Path(path).read_bytes()).hexdigest()


def find(root, url, md5, **options):
    return find_or_download(DatasetConfig(name="cifar10", root=str(root), **options), FOLDER, NEEDED, url, md5)


def leftovers(root):
    return sorted(path.name for path in root.iterdir() if not path.name.endswith(".lock"))


def test_one_download_leaves_only_the_data(server, archive, tmp_path):
    (address, requested), (name, md5) = server, archive
    root = tmp_path / "new" / "root"
    place = find(root, f"{address}/{name}", md5)
    assert place == root / FOLDER
    assert (place / "data_batch_1").read_bytes() == (tmp_path / "made" / FOLDER / "data_batch_1").read_bytes()
    assert find(root, f"{address}/{name}", md5) == place
    assert find(root / FOLDER, f"{address}/{name}", md5) == place
    assert len(requested) == 1
    assert leftovers(root) == [FOLDER]


def test_zip(server, tmp_path):
    make_tinyimagenet(tmp_path / "made")
    path = shutil.make_archive(str(tmp_path / "served" / "tiny"), "zip", tmp_path / "made")
    md5 = hashlib.md5(Path(path).read_bytes()).hexdigest()
    config = DatasetConfig(name="tinyimagenet", root=str(tmp_path / "root"))
    place = find_or_download(config, "tiny-imagenet-200", ("train", "wnids.txt"), f"{server[0]}/tiny.zip", md5)
    assert (place / "wnids.txt").is_file()


def test_several_processes_download_once(server, archive, tmp_path):
    (address, requested), (name, md5) = server, archive
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=find, args=(tmp_path / "root", f"{address}/{name}", md5)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert len(requested) == 1


def test_a_changed_archive_raises_and_is_removed(server, archive, tmp_path):
    (address, _), (name, _) = server, archive
    (tmp_path / "root").mkdir()
    with pytest.raises(UserError, match="is damaged or changed"):
        find(tmp_path / "root", f"{address}/{name}", "0" * 32)
    assert leftovers(tmp_path / "root") == []


def test_a_failed_download_names_the_keys(tmp_path):
    (tmp_path / "root").mkdir()
    with pytest.raises(
        UserError, match=r"couldn't be downloaded.*dataset\.root=.*missing: data_batch_1.*dataset\.download"
    ):
        find(tmp_path / "root", "http://127.0.0.1:9/cifar.tar.gz", "0" * 32)
    assert leftovers(tmp_path / "root") == []


def test_an_existing_archive_is_used(server, archive, tmp_path):
    name, md5 = archive
    root = tmp_path / "root"
    root.mkdir()
    shutil.copy(tmp_path / "served" / name, root)
    assert find(root, f"http://127.0.0.1:9/{name}", md5) == root / FOLDER
    assert leftovers(root) == [FOLDER, name]


def test_files_of_a_killed_download_are_removed(server, archive, tmp_path):
    (address, _), (name, md5) = server, archive
    stale = tmp_path / "root" / f".{FOLDER}.download" / "unpacked"
    stale.mkdir(parents=True)
    (stale / "half").write_text("")
    find(tmp_path / "root", f"{address}/{name}", md5)
    assert leftovers(tmp_path / "root") == [FOLDER]


def test_an_incomplete_folder_is_not_overwritten(server, archive, tmp_path):
    (address, requested), (name, md5) = server, archive
    folder = make_cifar10(tmp_path / "root")
    (folder / "test_batch").unlink()
    with pytest.raises(UserError, match=r"is incomplete.*missing: test_batch"):
        find(tmp_path / "root", f"{address}/{name}", md5)
    assert (folder / "data_batch_1").is_file()
    assert not requested


def test_a_root_that_cannot_be_created_raises(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"dataset\.root=.*file/below"):
        find(tmp_path / "file" / "below", "http://127.0.0.1:9/cifar.tar.gz", "0" * 32)


def test_a_failed_download_removes_the_empty_root(tmp_path):
    with pytest.raises(UserError, match=r"dataset\.root"):
        find(tmp_path / "root", "http://127.0.0.1:9/cifar.tar.gz", "0" * 32)
    assert not (tmp_path / "root").exists()
