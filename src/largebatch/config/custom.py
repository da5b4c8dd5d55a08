"""Own classes and functions of users: ``library=custom target=module:Name options={...}``.

The launcher checks target and options by the module's source, without an import. The worker imports the target and
checks again, because a source doesn't tell everything.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from inspect import Parameter, Signature
from pathlib import Path
from typing import Any, ClassVar

from omegaconf import MISSING

from largebatch.config.options import option
from largebatch.config.source import own_files, signature_of, version_of
from largebatch.errors import UserError, choices

_TARGET = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")
_BY_NAME = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)


@dataclass
class Custom:
    """Keys of every own class or function, and its call.

    ``group`` is the group of the choice. The call has ``positional`` arguments, then the ``required`` ones by name, the
    ``offered`` ones if the signature names them, the ``keys`` of the group that the user sets, and ``options``.
    """

    group: ClassVar[str]
    positional: ClassVar[tuple[str, ...]] = ()
    required: ClassVar[tuple[str, ...]] = ()
    offered: ClassVar[tuple[str, ...]] = ()
    keys: ClassVar[tuple[str, ...]] = ()

    library: str = option("custom", allowed=("custom",))
    target: str = MISSING  # module:Name
    options: dict[str, Any] = field(default_factory=dict)  # keyword arguments; others have the signature's defaults
    version: str = ""  # of the target's code; the launcher sets it

    @property
    def key(self) -> str:
        """Return the key and value of the target, for messages."""
        return f"{self.group}.target={self.target}"

    @property
    def module(self) -> str:
        return self.target.partition(":")[0]

    @property
    def files(self) -> dict[str, Path]:
        """Files to copy for a queued job, by their path below an import folder."""
        return own_files(self.module)

    def problems_in_source(self) -> list[str]:
        """Return one line for each problem that shows without an import, also if the code isn't ``version``."""
        try:
            signature = _in_source(self.key, self.target)
        except UserError as error:
            return [str(error)]
        if self.version != (found := version_of(self.module)):
            return [
                f"{self.group}.version={self.version}: the code of {self.module} has changed since; it is {found} now. "
                "Fix: restore it, or start a new run with the command line"
            ]
        return [] if signature is None else self._problems(signature)

    def call(self, *positional: Any, **arguments: Any) -> Any:
        """Import the target and return the result of its call. An exception of its own gets a note with the target.

        Args:
            arguments: values of ``required``, ``offered`` and ``keys``.

        Raises:
            UserError: there is no such target, or it doesn't have the options.
        """
        function = self._imported()
        with self.noted():
            try:
                signature = inspect.signature(function)
            except ValueError:  # some classes in C have none
                signature = Signature([Parameter(f"_{self.group}", Parameter.VAR_KEYWORD)])
            else:
                if problems := self._problems(signature):
                    raise UserError("\n".join(problems))
            given = {k: v for k, v in arguments.items() if k not in self.offered or k in signature.parameters}
            try:
                return function(*positional, **given, **self.options)
            except TypeError as error:  # of a function that passes its keyword arguments on
                unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
                if unknown and unknown[1] in self.options:
                    raise UserError(self._unknown(unknown[1], [*signature.parameters])) from error
                raise

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Add the target as a note to exceptions of the user's code."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            error.add_note(self.key)
            raise

    def _imported(self) -> Callable[..., Any]:
        module, _, name = self.target.partition(":")
        with self.noted():
            found = importlib.import_module(module)
            if not hasattr(found, name):
                public = [key for key, value in vars(found).items() if callable(value) and not key.startswith("_")]
                raise UserError(f"{self.key}: {module} has no {name}; {choices(name, public)}")
            target: Any = getattr(found, name)
        if not callable(target):
            kind = type(target).__name__
            raise UserError(f"{self.key}: is of type {kind}. Allowed: a class or a function")
        function: Callable[..., Any] = target
        return function

    def _problems(self, signature: Signature) -> list[str]:
        """Return one line for each argument that the signature doesn't have, or that it lacks."""
        parameters = list(signature.parameters.values())
        first = [one for one in parameters if one.kind in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)]
        any_position = any(one.kind == Parameter.VAR_POSITIONAL for one in parameters)
        if len(first) < len(self.positional) and not any_position:
            return [f"{self.key}: must take {', '.join(self.positional)} as its first argument"]
        taken = {one.name for one in first[: len(self.positional)]}
        named = {one.name: one for one in parameters if one.kind in _BY_NAME and one.name not in taken}
        any_name = any(one.kind == Parameter.VAR_KEYWORD for one in parameters)
        set_keys = [key for key in self.keys if getattr(self, key) not in (None, "")]
        ours = {*self.required, *self.offered, *self.keys}
        problems = [
            f"{self.key}: has no parameter {name}, which largebatch sets. Fix: add it"
            for name in self.required
            if name not in named and not any_name
        ]
        problems += [
            f"{self.group}.{key}={getattr(self, key)}: {self.key} has no parameter {key}. Fix: leave it out"
            for key in set_keys
            if key not in named and not any_name
        ]
        for name, value in self.options.items():
            if name in ours:
                fix = f"{self.group}.{name}={value}" if hasattr(self, name) else "leave it out; the data set decides it"
                problems.append(f"{self.group}.options.{name}={value}: isn't an option. Fix: {fix}")
            elif name not in named and not any_name:
                problems.append(self._unknown(name, [key for key in named if key not in ours]))
        for name, parameter in named.items():
            given = {*self.required, *self.offered, *set_keys, *self.options}
            if parameter.default is Parameter.empty and name not in given:
                key = f"{self.group}.{name}" if name in self.keys else f"{self.group}.options.{name}"
                problems.append(f"{key}: has no value, and {self.key} has no default. Fix: {key}=VALUE")
        return problems

    def _unknown(self, name: str, allowed: list[str]) -> str:
        value = self.options[name]
        return f"{self.group}.options.{name}={value}: {self.target} has no such option; {choices(name, allowed)}"


def complete(group: str, given: dict[str, Any]) -> None:
    """Add to a choice with ``library=custom`` what the target decides: name, version, and default learning rate.

    Raises:
        UserError: there is no such target. A frozen configuration, which has a version, isn't checked.
    """
    target = given.get("target")
    if not isinstance(target, str) or target == "???" or given.get("version"):
        return
    signature = _in_source(f"{group}.target={target}", target)
    module, _, name = target.partition(":")
    given["version"] = version_of(module)
    if given.get("name") == "custom":
        given["name"] = name
    if group == "optimizer" and given.get("lr", "???") == "???":
        lr = signature.parameters.get("lr") if signature else None
        if lr is not None and isinstance(lr.default, int | float):
            given["lr"] = lr.default


def _in_source(key: str, target: str) -> Signature | None:
    """Return the signature of a target by its source, or None if only an import can tell.

    Raises:
        UserError: there is no such target, or its source can't be read.
    """
    if not _TARGET.fullmatch(target):
        raise UserError(f"{key}: invalid. Allowed: module:Name, such as mypackage.mymodule:MyClass")
    module, _, name = target.partition(":")
    try:
        return signature_of(module, name)
    except SyntaxError as error:
        raise UserError(f"{key}: {error.filename}, line {error.lineno}: {error.msg}. Fix: correct the file") from None
    except (LookupError, OSError, ValueError) as error:
        raise UserError(f"{key}: {error}") from None


def custom_choices(config: Any) -> list[Custom]:
    """Return the own classes and functions of a configuration."""
    return [choice for choice in vars(config).values() if isinstance(choice, Custom)]
