"""Ranges and allowed values of configuration fields, and the check of a configuration against them."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from largebatch.errors import choices

_INTEGERS = 2**63  # libraries and files hold smaller integers


@dataclass(frozen=True)
class Limits:
    """Allowed values of a field. Each element of a list is checked; None is always allowed.

    Attributes:
        least, most: smallest and largest allowed number.
        above, below: the same, without the bound itself.
        length: number of elements of a list; None: one or more.
        allowed: allowed values, instead of a range.
        words: names that are allowed besides numbers.
    """

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    length: int | None = None
    allowed: tuple[Any, ...] = ()
    words: tuple[str, ...] = ()

    def problem(self, value: Any) -> str:
        """Return the problem of ``value``, or an empty string."""
        if self.allowed:
            names = [str(name).lower() for name in self.allowed]
            return "" if value in self.allowed else choices(str(value), names)
        if not isinstance(value, list):
            if value in self.words if isinstance(value, str) else self._holds(value):
                return ""
            kind = "a finite number" if isinstance(value, float) else "an integer"
            kind += " below 2**63" * (isinstance(value, int) and abs(value) >= _INTEGERS)
            return f"must be {kind} {self._range()}" + "".join(f", or {word}" for word in self.words)
        if (len(value) == self.length if self.length else value) and all(map(self._holds, value)):
            return ""
        count = "one or more" if self.length is None else self.length
        return f"must be {count} numbers {self._range()}"

    def _holds(self, value: Any) -> bool:
        return (
            isinstance(value, int | float)
            and (abs(value) < _INTEGERS if isinstance(value, int) else math.isfinite(value))
            and (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        )

    def _range(self) -> str:
        if self.least is not None and self.most is not None:
            return f"from {self.least:g} to {self.most:g}"
        bounds = {"of at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        return " and ".join(f"{words} {bound:g}" for words, bound in bounds.items() if bound is not None)


def option(default: Any, *, switch: bool = False, **limits: Any) -> Any:
    """Return a dataclass field with ``Limits``. Each instance gets its own copy of a default list.

    Args:
        default: value of the field if the user sets none.
        switch: None turns something off, and any number makes another algorithm.
        limits: arguments of ``Limits``.
    """
    metadata = {"limits": Limits(**limits), "switch": switch}
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def problems_of(node: Any, prefix: str = "") -> list[str]:
    """Return one line for each field of the dataclass ``node``, at any depth, that is outside its limits."""
    problems = []
    for field in dataclasses.fields(node):
        value, key = getattr(node, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(value):
            problems += problems_of(value, f"{key}.")
        elif isinstance(value, list) and "list" not in str(field.type):
            problems.append(f"{key}={value}: must be a single value")
        elif isinstance(value, list) and any(isinstance(element, list | dict) for element in value):
            problems.append(f"{key}={value}: must be a list of plain values")
        elif "limits" in field.metadata and value is not None:
            problem = field.metadata["limits"].problem(value)
            problems += [f"{key}={value}: {problem}"] if problem else []
    return problems
