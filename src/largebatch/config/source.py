"""Source files of modules, found and read without importing the modules."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
import importlib.util
import pkgutil
import sys
import sysconfig
from collections.abc import Iterable
from importlib.machinery import ModuleSpec
from inspect import Parameter, Signature
from pathlib import Path
from typing import Any

from largebatch.errors import choices

UNKNOWN = ...  # default of a parameter that isn't a literal
_FOLLOWED = 8  # re-exports and base classes, one after the other
_DIGITS = 16

Bindings = dict[str, ast.stmt | None]  # top-level names of a module; None: bound in a way that only an import can tell


@functools.cache
def find(module: str) -> ModuleSpec | None:
    """Return the specification of a module, or None if there is no such module."""
    spec: ModuleSpec | None = None
    parts = module.split(".")
    for count in range(1, len(parts) + 1):
        name = ".".join(parts[:count])
        if count == 1:
            found = (finder.find_spec(name, None) for finder in sys.meta_path)
            spec = next((each for each in found if each is not None), None)
        else:
            assert spec is not None
            spec = _find_below(name, spec.submodule_search_locations or [])
        if spec is None:
            return None
    return spec


def _find_below(name: str, folders: Iterable[str]) -> ModuleSpec | None:
    """Return the specification of a module in its package's ``folders``. Importlib would import the package first."""
    portions: list[str] = []
    for folder in folders:
        finder: Any = pkgutil.get_importer(folder)
        spec: ModuleSpec | None = finder.find_spec(name) if finder is not None else None
        if spec is not None and spec.loader is not None:
            return spec
        portions += (spec.submodule_search_locations or []) if spec is not None else []
    if not portions:
        return None
    namespace = ModuleSpec(name, None, is_package=True)
    namespace.submodule_search_locations = portions
    return namespace


@functools.cache
def files_of(module: str) -> dict[str, Path]:
    """Return the files of the top-level module or package of ``module``, by their path below its import folder.

    A package has all its ``.py`` files. Empty if the module is built in, or isn't there.
    """
    spec = find(module.partition(".")[0])
    if spec is None:
        return {}
    if spec.submodule_search_locations is None:
        return {Path(spec.origin).name: Path(spec.origin)} if spec.origin and Path(spec.origin).is_file() else {}
    roots = [Path(folder) for folder in spec.submodule_search_locations]
    return {path.relative_to(root.parent).as_posix(): path for root in roots for path in sorted(root.rglob("*.py"))}


@functools.cache
def version_of(module: str) -> str:
    """Return the version of an installed distribution, of Python for its library, or else a hash of ``files_of``.

    Empty if the module isn't there.
    """
    top = module.partition(".")[0]
    if find(top) is None:
        return ""
    files = files_of(top)
    if any(_is_installed(path) for path in files.values()):
        for name in importlib.metadata.packages_distributions().get(top, []):
            return f"{name} {importlib.metadata.version(name).partition('+')[0]}"  # +cpu and +cu130 are one version
    elif top in sys.stdlib_module_names:
        return f"python {sys.version_info.major}.{sys.version_info.minor}"
    digest = hashlib.sha256()
    for name, path in sorted(files.items()):
        content = path.read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return f"sha-{digest.hexdigest()[:_DIGITS]}"  # never a number in YAML


def own_files(module: str) -> dict[str, Path]:
    """Return ``files_of`` a module that belongs to no distribution, to Python or to this package; else nothing."""
    top = module.partition(".")[0]
    is_own = " " not in version_of(module) and top != __name__.partition(".")[0]
    return files_of(top) if is_own else {}


def _is_installed(path: Path) -> bool:
    folders = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    return any(path.is_relative_to(folder) for folder in folders) or "site-packages" in path.parts


@functools.cache
def signature_of(module: str, name: str, followed: int = 0) -> Signature | None:
    """Return the signature of a class or function, by the module's source. None if only an import can tell.

    A default that isn't a literal is ``UNKNOWN``. Re-exports and base classes by name are followed.

    Raises:
        LookupError: there is no such module or name; the message names the nearest.
        SyntaxError, OSError: the source can't be read.
    """
    spec = find(module)
    if spec is None:
        raise LookupError(_missing(module))
    if spec.origin is None:
        names = [each.name for each in pkgutil.iter_modules(spec.submodule_search_locations)]
        raise LookupError(f"{module} is a folder of modules; {choices(name, names)}")
    if not spec.origin.endswith(".py") or followed > _FOLLOWED:
        return None
    bindings = _bindings(ast.parse(Path(spec.origin).read_bytes(), spec.origin).body)
    if name not in bindings:
        if bindings.keys() & {"*", "__getattr__"}:
            return None
        named = [key for key, node in bindings.items() if node is not None and not key.startswith("_")]
        raise LookupError(f"{module} ({spec.origin}) has no {name}; {choices(name, named)}")
    return _resolved(spec, bindings, name, followed)


def _missing(module: str) -> str:
    """Return a message about the first part of ``module`` that isn't there."""
    parts = module.split(".")
    known = next(count for count in reversed(range(len(parts))) if count == 0 or find(".".join(parts[:count])))
    parent = find(".".join(parts[:known])) if known else None
    names = [each.name for each in pkgutil.iter_modules(parent.submodule_search_locations if parent else None)]
    where = f" in {parent.name}" if parent else ""
    return f"there is no module {parts[known]}{where}; {choices(parts[known], names)}"


def _bindings(body: Iterable[ast.stmt]) -> Bindings:
    """Return the names that statements bind. A class, a function or ``from module import`` has its statement."""
    found: Bindings = {}
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found[node.name] = node
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name: node for alias in node.names}
        else:
            found |= dict.fromkeys(_names(node))
    return found


def _names(node: ast.stmt) -> set[str]:
    """Return all names that a statement may bind, at any depth."""
    found = set()
    for inner in ast.walk(node):
        if isinstance(inner, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(inner.name)
        elif isinstance(inner, ast.alias):
            found.add(inner.asname or inner.name.partition(".")[0])
        elif isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store):
            found.add(inner.id)
    return found


def _resolved(spec: ModuleSpec, bindings: Bindings, name: str, followed: int) -> Signature | None:
    node = bindings.get(name)
    if isinstance(node, ast.ImportFrom):
        package = spec.name if spec.submodule_search_locations is not None else spec.name.rpartition(".")[0]
        original = next(alias.name for alias in node.names if (alias.asname or alias.name) == name)
        try:
            module = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            return signature_of(module, original, followed + 1)
        except (ImportError, LookupError):  # for example a submodule; the import tells
            return None
    if isinstance(node, ast.FunctionDef):
        return None if node.decorator_list else _signature(node.args)
    if not isinstance(node, ast.ClassDef) or node.decorator_list or node.keywords or followed > _FOLLOWED:
        return None
    methods = _bindings(node.body)
    if "__new__" in methods:
        return None
    if "__init__" in methods:
        method = methods["__init__"]
        return _resolved_method(method) if isinstance(method, ast.FunctionDef) else None
    bases = [base.id if isinstance(base, ast.Name) else "" for base in node.bases]
    if not bases:
        return Signature()
    return _resolved(spec, bindings, bases[0], followed + 1) if len(bases) == 1 else None


def _resolved_method(method: ast.FunctionDef) -> Signature | None:
    return None if method.decorator_list else _signature(method.args, skipped=1)


def _signature(arguments: ast.arguments, skipped: int = 0) -> Signature:
    """Return the signature of a definition, without its first ``skipped`` parameters."""
    names = [*arguments.posonlyargs, *arguments.args]
    defaults: list[ast.expr | None] = [*[None] * (len(names) - len(arguments.defaults)), *arguments.defaults]
    found = [
        Parameter(
            argument.arg,
            Parameter.POSITIONAL_ONLY if number < len(arguments.posonlyargs) else Parameter.POSITIONAL_OR_KEYWORD,
            default=_value(default),
        )
        for number, (argument, default) in enumerate(zip(names, defaults, strict=True))
    ][skipped:]
    if arguments.vararg:
        found.append(Parameter(arguments.vararg.arg, Parameter.VAR_POSITIONAL))
    found += [
        Parameter(argument.arg, Parameter.KEYWORD_ONLY, default=_value(default))
        for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    ]
    if arguments.kwarg:
        found.append(Parameter(arguments.kwarg.arg, Parameter.VAR_KEYWORD))
    return Signature(found)


def _value(default: ast.expr | None) -> Any:
    if default is None:
        return Parameter.empty
    try:
        return ast.literal_eval(default)
    except ValueError:
        return UNKNOWN
