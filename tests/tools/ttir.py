"""Runs a compiled Triton kernel on the CPU: its first stage (TTIR, text) with NumPy, program after program.

Triton's interpreter runs the Python source of a kernel, and so misses faults of the compiler's front end. Each value is
an array of all lanes; addresses are places in one array of bytes. Only the operations of the kernels here are known.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

_TYPES = {"i1": np.bool_, "i8": np.uint8, "i32": np.int32, "i64": np.int64, "f32": np.float32, "f64": np.float64}
_COMPARED = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip
_ALIGN = 64  # bytes


class _Operation(NamedTuple):
    line: str
    regions: list[list[_Operation]]


def run(text: str, programs: int, arguments: Sequence[Any]) -> None:
    """Run programs 0 to ``programs - 1`` of a kernel with arrays, which are changed in place, and whole numbers."""
    names, operations = _parsed(text)
    memory, addresses = np.zeros(_ALIGN, np.uint8), []
    for argument in arguments:
        addresses.append(np.int64(len(memory)) if isinstance(argument, np.ndarray) else np.int32(argument))
        if isinstance(argument, np.ndarray):
            content = argument.reshape(-1).view(np.uint8)
            memory = np.concatenate([memory, content, np.zeros(-len(content) % _ALIGN, np.uint8)])
    for program in range(programs):
        _Program(memory, program).block(operations, dict(zip(names, addresses, strict=True)))
    for argument, address in zip(arguments, addresses, strict=True):
        if isinstance(argument, np.ndarray):
            argument.reshape(-1).view(np.uint8)[:] = memory[address : address + argument.nbytes]


def _parsed(text: str) -> tuple[list[str], list[_Operation]]:
    """Return the names of a kernel's arguments, and its operations."""
    text = re.sub(r" loc\((?:[^()]|\([^()]*\))*\)", "", text)
    lines = iter([line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#loc")])

    def block() -> tuple[list[_Operation], str]:
        operations = []
        for line in lines:
            if line.startswith("}"):
                return operations, line
            regions, end = [], line
            while end.endswith("{"):
                region, end = block()
                regions.append(region)
            operations.append(_Operation(line, regions))
        raise AssertionError("a block has no end")

    head = next(line for line in lines if "tt.func" in line)
    return re.findall(r"%(\w+): ", head), block()[0]


def _element(of_type: str) -> tuple[int | None, str]:
    """Return the number of lanes (None for a scalar) and the element's type."""
    found = re.search(r"tensor<(\d+)x(!tt\.ptr<\w+>|\w+)>", of_type)
    return (int(found[1]), found[2]) if found else (None, of_type.strip())


def _unsigned(values: Any) -> Any:
    values = np.asarray(values)
    return values.view(f"u{values.itemsize}")


def _quotient(a: Any, b: Any) -> Any:
    """Divide whole numbers towards 0, as C does."""
    return np.abs(a) // np.abs(b) * np.sign(a) * np.sign(b)


_ARITHMETIC = {
    "addi": np.add, "addf": np.add, "subi": np.subtract, "subf": np.subtract, "muli": np.multiply,
    "mulf": np.multiply, "divf": np.divide, "precise_divf": np.divide, "divsi": _quotient,
    "remsi": lambda a, b: a - _quotient(a, b) * b, "minsi": np.minimum, "maxsi": np.maximum, "minnumf": np.fmin,
    "maxnumf": np.fmax, "andi": np.bitwise_and, "ori": np.bitwise_or, "shrsi": np.right_shift,
    "shrui": lambda a, b: _unsigned(a) >> _unsigned(b), "sqrt": np.sqrt, "floor": np.floor, "select": np.where,
    "extui": _unsigned, "extsi": np.asarray, "trunci": np.asarray, "extf": np.asarray, "truncf": np.asarray,
    "sitofp": np.asarray, "fptosi": np.trunc, "fptoui": np.trunc, "splat": np.asarray, "reshape": np.asarray,
}  # fmt: skip


class _Program:
    def __init__(self, memory: Any, number: int) -> None:
        self.memory, self.number = memory, number

    def block(self, operations: list[_Operation], values: dict[str, Any]) -> list[Any]:
        """Run operations; return the values that the last one yields."""
        for line, regions in operations:
            target, name, body = re.match(r'(?:%(\w+)(?::\d+)? = )?"?([\w.]+)"?(.*)$', line).groups()  # type: ignore[union-attr]
            if name in ("scf.yield", "tt.reduce.return", "tt.return"):
                return self.named(body.split(" : ")[0], values)
            results = self.operation(name, body, regions, values)
            if target:
                values[target] = results[0]
                values.update({f"{target}#{i}": result for i, result in enumerate(results)})
        return []

    def named(self, text: str, values: dict[str, Any]) -> list[Any]:
        return [values[name] for name in re.findall(r"%([\w#]+)", text)]

    def operation(self, name: str, body: str, regions: list[list[_Operation]], values: dict[str, Any]) -> list[Any]:
        if name == "scf.for":
            bounds, _, carried = body.split(" : ")[0].split("->")[0].partition("iter_args")
            index, *span = re.findall(r"%([\w#]+)", bounds)
            pairs = re.findall(r"%(\w+) = (%[\w#]+)", carried)
            results = self.named(" ".join(first for _, first in pairs), values)
            for i in range(*(int(values[name]) for name in span)):
                inner = dict(zip((name for name, _ in pairs), results, strict=True))
                results = self.block(regions[0], {**values, **inner, index: np.int32(i)})
            return results
        text, _, of_type = body.rpartition(" : ") if " : " in body else (body, "", "")
        given = self.named(text.split("->")[0] if name.startswith("scf") else text, values)
        if name == "scf.if":
            condition = self.named(body.split("->")[0], values)[0]
            chosen = regions[:1] if condition else regions[1:]
            return self.block(chosen[0], dict(values)) if chosen else []
        if name == "tt.reduce":
            assert any("arith.addi" in operation.line for operation in regions[0])
            (summed,) = self.named(body.split(")")[0], values)
            return [summed.sum(dtype=summed.dtype)]
        return [] if "barrier" in name else [self.value(name, text, of_type, given)]

    def value(self, name: str, text: str, of_type: str, given: list[Any]) -> Any:
        if name == "tt.get_program_id":
            return np.int32(self.number)
        if name == "tt.make_range":
            return np.arange(_element(of_type)[0], dtype=np.int32)
        if name == "tt.addptr":
            size = np.dtype(_TYPES[re.search(r"ptr<(\w+)>", of_type)[1]]).itemsize  # type: ignore[index]
            return given[0] + given[1].astype(np.int64) * size
        if name in ("tt.load", "tt.store"):
            return self.access(name == "tt.load", re.search(r"ptr<(\w+)>", of_type)[1], given)  # type: ignore[index]
        lanes, element = _element(re.split("->| to ", of_type)[-1].split(", ")[-1])
        if name == "arith.constant":
            result = _constant(re.search(r"dense<(.*?)>|(\S+)", text)[0].removeprefix("dense<").rstrip(">"), element)  # type: ignore[index]
        elif name in ("arith.cmpi", "arith.cmpf"):
            predicate = text.split(",")[0].strip()
            assert name == "arith.cmpf" or predicate[0] != "u"
            return _COMPARED[predicate[-2:]](*given)
        else:
            with np.errstate(all="ignore"):  # also the branch that a choice doesn't take
                result = _ARITHMETIC[name.split(".")[1]](*given)
        kind = np.int64 if "ptr" in element else _TYPES[element]
        if name == "arith.fptoui":
            result = np.asarray(result).astype(np.uint32)
        result = np.asarray(result).astype(kind)
        return np.broadcast_to(result, lanes) if lanes else result[()]

    def access(self, loads: bool, element: str, given: list[Any]) -> Any:
        """Load from addresses, with a mask and a value for masked lanes, or store to them, with a mask."""
        kind, addresses = np.dtype(_TYPES[element]), np.atleast_1d(given[0])
        masks = given[1:2] if loads else given[2:]
        mask = np.broadcast_to(masks[0], addresses.shape) if masks else np.ones(len(addresses), bool)
        places = addresses[mask][:, None] + np.arange(kind.itemsize)
        assert ((places >= _ALIGN) & (places < len(self.memory))).all(), "an access outside of the arguments"
        if not loads:
            stored = np.broadcast_to(given[1], addresses.shape)[mask].astype(kind)
            self.memory[places] = stored.view(np.uint8).reshape(places.shape)
            return None
        result = np.broadcast_to(given[2] if len(given) > 2 else 0, addresses.shape).astype(kind)
        result[mask] = self.memory[places].reshape(-1).view(kind)
        return result if np.ndim(given[0]) else result[0]


def _constant(text: str, element: str) -> Any:
    if text in ("true", "false"):
        return text == "true"
    if text.startswith("0x"):  # the bits of a float
        return np.array(int(text, 16)).astype(f"u{np.dtype(_TYPES[element]).itemsize}").view(_TYPES[element])[()]
    return float(text) if element.startswith("f") else int(text)
