"""Own classes by ``target``: checks by the source, without an import, and the part of a run's identity."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import configuration

from largebatch.config import source
from largebatch.config.checks import validate
from largebatch.config.identity import identity, run_name
from largebatch.config.optimizer_libraries import structure
from largebatch.config.schema import Config
from largebatch.errors import UserError

NUMBERS = itertools.count()
NOT_TO_IMPORT = "raise SystemExit('imported')\n"

Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Return a function that writes a new module and returns its name; nothing may import it."""
    monkeypatch.syspath_prepend(tmp_path)

    def module(text: str, name: str = "", first: str = NOT_TO_IMPORT) -> str:
        name = name or f"own_{next(NUMBERS)}"
        (tmp_path / f"{name}.py").write_text(first + text)
        forget()
        return name

    yield module
    forget()


def forget() -> None:
    """Forget all files, as a new process does."""
    importlib.invalidate_caches()
    for function in (source.find, source.files_of, source.version_of, source.signature_of):
        function.cache_clear()


def checked(group: str, *overrides: str) -> Config:
    config = configuration(f"{group}=custom", *overrides)
    validate(config)
    return config


OPTIMIZER = """
class Own(Base):
    def __init__(self, params, lr=0.5, beta=0.9, *, decay=None): ...
def build(parameters, lr, **more): ...
class Inherits(Own):
    pass
class WithoutRate(Base):
    def __init__(self, params, beta=0.9): ...
class Needs(Base):
    def __init__(self, params, lr, needed): ...
class Empty:
    pass
number = 3
"""


@pytest.mark.parametrize(
    ("target", "overrides", "message"),
    [
        ("Own", ["options.bta=1"], "optimizer.options.bta=1: NAME:Own has no such option; allowed: beta, decay; did "),
        ("Inherits", ["options.bta=1"], "optimizer.options.bta=1: NAME:Inherits has no such option; allowed: beta"),
        ("Own", ["options.lr=1"], "optimizer.options.lr=1: isn't an option. Fix: optimizer.lr=1"),
        ("Own", ["weight_decay=0.1"], "optimizer.weight_decay=0.1: optimizer.target=NAME:Own has no parameter weight_"),
        ("Own", ["beta=1"], "optimizer.beta=1: Own has no such option; allowed: .*options"),
        ("Needs", ["lr=1"], "optimizer.options.needed: has no value, and optimizer.target=NAME:Needs has no default"),
        ("WithoutRate", ["lr=1"], "optimizer.target=NAME:WithoutRate: has no parameter lr"),
        ("Empty", ["lr=1"], "optimizer.target=NAME:Empty: must take params as its first argument"),
        ("Needs", ["options.needed=1"], "optimizer.lr has no value"),
        ("Onw", [], r"optimizer.target=NAME:Onw: NAME \(.*\) has no Onw; allowed: Own, .*; did you mean Own\?"),
        ("number.Own", [], "optimizer.target=NAME:number.Own: invalid. Allowed: module:Name"),
    ],
)
def test_a_wrong_target_or_option_is_one_message(write: Write, target: str, overrides: list[str], message: str) -> None:
    name = write(OPTIMIZER)
    with pytest.raises(UserError, match=message.replace("NAME", name)) as refused:
        checked("optimizer", f"optimizer.target={name}:{target}", *(f"optimizer.{one}" for one in overrides))
    assert str(refused.value).count("\n") == 0


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("mylba.optimizer:SignMomentum", r"there is no module mylba; allowed: .* names; did you mean mylab\?"),
        ("mylab.optimiser:SignMomentum", r"there is no module optimiser in mylab; allowed: .*; did you mean optimizer"),
        ("mylab.optimizer.deeper:Any", "there is no module deeper in mylab.optimizer"),
        ("mylab:SignMomentum", "has no SignMomentum; allowed: "),
        ("mylab.optimizer.SignMomentum", "invalid. Allowed: module:Name"),
    ],
)
def test_a_missing_module_is_one_message_with_the_nearest(target: str, message: str) -> None:
    with pytest.raises(UserError, match=f"^optimizer.target={target}: .*{message}"):
        checked("optimizer", f"optimizer.target={target}")


def test_a_file_that_isn_t_python_is_named_with_its_line(write: Write, tmp_path: Path) -> None:
    name = write("class Own(:\n")
    with pytest.raises(UserError, match=f"{tmp_path / name}.py, line 2: invalid syntax. Fix: correct the file"):
        checked("optimizer", f"optimizer.target={name}:Own")


@pytest.mark.parametrize(
    ("group", "target", "override", "message"),
    [
        ("model", "def net(classes): ...", "", "has no parameter num_classes"),
        ("model", "def net(num_classes, width=3): ...", "options.widht=3", "no such option; allowed: width; did you"),
        ("model", "def net(num_classes): ...", "options.num_classes=3", "Fix: leave it out; the data set decides it"),
        ("dataset", "def net(noise=1): ...", "root=x", "dataset.root=.*x: dataset.target=.* has no parameter root"),
        ("dataset", "def net(root): ...", "", "dataset.root: has no value, .* Fix: dataset.root=VALUE"),
        ("schedule", "def net(): ...", "", "must take progress as its first argument"),
        ("schedule", "def net(s): ...", "warmup_steps=2 warmup_epochs=1", "exactly one must be set"),
    ],
)
def test_each_group_checks_its_call(write: Write, group: str, target: str, override: str, message: str) -> None:
    more = [f"{group}.{one}" for one in override.split()]
    with pytest.raises(UserError, match=message):
        checked(group, f"{group}.target={write(target)}:net", *more)


@pytest.mark.parametrize(
    "text",
    [
        "from other import Own", "from other import *", "def __getattr__(name): ...", "Own = make()",
        "if True:\n    class Own: ...", "@wrapped\nclass Own: ...", "class Own(other.Base): ...",
        "class Own:\n    def __new__(cls): ...", "class Own(Base, metaclass=Meta): ...", "class Own(Own): ...",
        "from . import Own", "class Own(A, B): ...", "class Own:\n    __init__ = made",
    ],
)  # fmt: skip
def test_an_import_decides_if_the_source_can_t(write: Write, text: str) -> None:
    checked("optimizer", f"optimizer.target={write(text)}:Own", "optimizer.lr=1", "optimizer.options.any=1")


def test_the_signature_in_the_source_is_the_signature_of_the_class(write: Write) -> None:
    text = """
def function(a, /, b, c=[1, "x"], *more, d, e=None, **options): ...
def plain(): ...
class Base:
    def __init__(self, a, b=-1.5): ...
class Inherits(Base):
    size = 3
class Empty:
    pass
"""
    name = write(text, first="")
    imported = importlib.import_module(name)
    for target in ("function", "plain", "Base", "Inherits", "Empty"):
        assert source.signature_of(name, target) == inspect.signature(getattr(imported, target))


def test_re_exports_are_followed(write: Write) -> None:
    original = write("class Own:\n    def __init__(self, params, lr=0.25): ...\n")
    name = write(f"from {original} import Own as Renamed\n")
    config = checked("optimizer", f"optimizer.target={name}:Renamed")
    assert (config.optimizer.name, config.optimizer.lr) == ("Renamed", 0.25)
    nadam = checked("optimizer", "optimizer.target=torch.optim:NAdam", "optimizer.options.momentum_decay=0.1")
    assert nadam.optimizer.lr == 0.002


def test_folders_without_init_files_are_packages(tmp_path: Path, write: Write) -> None:
    folder = tmp_path / "lab_without_init" / "deep"
    folder.mkdir(parents=True)
    (folder / "own.py").write_text(f"{NOT_TO_IMPORT}class Own:\n    def __init__(self, params, lr=1): ...\n")
    config = checked("optimizer", "optimizer.target=lab_without_init.deep.own:Own")
    assert source.own_files("lab_without_init.deep.own").keys() == {"lab_without_init/deep/own.py"}
    assert config.optimizer.lr == 1


# -- identity


def test_a_report_tells_targets_and_versions_of_one_name_apart() -> None:
    own = {
        "name": "Own",
        "library": "custom",
        "target": "a:Own",
        "version": "sha-1",
        "options": {"beta": 1, "fast": True},
    }
    assert structure(own) == {"target": "a:Own", "version": "sha-1", "fast": "true"}


def test_target_options_and_code_are_part_of_the_identity(write: Write, tmp_path: Path) -> None:
    name = write("def one(params, lr=1, beta=1): ...\ndef two(params, lr=1, beta=1): ...\n")

    def named(target: str, *more: str) -> str:
        return identity(checked("optimizer", f"optimizer.target={name}:{target}", "optimizer.name=same", *more))

    first = named("one")
    assert first == named("one")
    assert len({first, named("two"), named("one", "optimizer.options.beta=2")}) == 3
    write("def one(params, lr=1, beta=2): ...\n", name)
    assert named("one") != first


def test_every_python_file_of_a_package_is_part_of_its_version(tmp_path: Path, write: Write) -> None:
    package = tmp_path / "own_lab"
    (package / "deep").mkdir(parents=True)
    for name in ("__init__.py", "own.py", "deep/more.py"):
        (package / name).write_text("")
    (package / "notes.txt").write_text("")
    forget()
    files = source.own_files("own_lab.own")
    assert files == {f"own_lab/{name}": package / name for name in ("__init__.py", "own.py", "deep/more.py")}
    before = source.version_of("own_lab.own")
    (package / "deep" / "more.py").write_text("x = 1\n")
    forget()
    assert source.version_of("own_lab.own") != before


def test_an_installed_distribution_has_its_version_and_no_files_to_copy() -> None:
    torch = importlib.metadata.version("torch").partition("+")[0]
    assert source.version_of("torch.optim") == f"torch {torch}"
    assert source.own_files("torch.optim") == {}
    assert source.own_files("largebatch.optim.lars") == {}  # a job has its copy of the package
    assert source.version_of("random").startswith("python 3.")
    assert source.own_files("random") == {}


def test_a_changed_file_is_refused_for_a_frozen_configuration(write: Write) -> None:
    name = write("def one(params, lr=1): ...\n")
    config = checked("optimizer", f"optimizer.target={name}:one")
    write("def one(params, lr=2): ...\n", name)
    with pytest.raises(UserError, match=r"optimizer.version=sha-\w+: the code of .* has changed since; it is sha-"):
        validate(config)


def test_the_folder_decides_only_if_it_is_given(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = write("def data(root=None): ...\n")
    names = []
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        target = f"dataset.target={name}:data"
        names.append([run_name(checked("dataset", target, *more)) for more in ((), ("dataset.root=images",))])
    assert names[0][0] == names[1][0]
    assert names[0][1] != names[1][1]
    assert all(each.startswith("data-") for pair in names for each in pair)


def test_a_declared_space_may_have_options(write: Write) -> None:
    target = f"optimizer.target={write('def one(params, lr=1, beta=1): ...')}:one"
    space = "space={optimizer.options.beta:[0.1,2]}"
    checked("optimizer", target, "optimizer.options.beta=1", space)
    with pytest.raises(UserError, match=r"optimizer.options.beta=3: outside of its declared space"):
        checked("optimizer", target, "optimizer.options.beta=3", space)
