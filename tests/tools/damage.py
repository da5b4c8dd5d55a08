"""Random damage to the bytes of a file, and to the values of a JSON file."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

ODD = (None, True, -1, 0, 10**30, 1e308, 1e-320, "", "x", "\x1b[0m\n", "${seed}", [], [1], {}, {"x": 1})


def flip(content: bytes, draw: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(draw.randrange(1, 4)):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def truncate(content: bytes, draw: random.Random) -> bytes:
    return content[: draw.randrange(len(content))]


def clear(content: bytes, draw: random.Random) -> bytes:
    """Clear a part, as a disk that lost a page does."""
    first = draw.randrange(len(content))
    last = min(len(content), first + draw.randrange(1, 4096))
    return content[:first] + bytes(last - first) + content[last:]


def duplicate(content: bytes, draw: random.Random) -> bytes:
    first = draw.randrange(len(content))
    return content[:first] + content[first : first + draw.randrange(1, 512)] + content[first:]


def random_bytes(content: bytes, draw: random.Random) -> bytes:
    return draw.randbytes(draw.randrange(300))


def change_values(content: bytes, draw: random.Random) -> bytes:
    """Replace or remove one value, at any depth, in each of up to three lines or in a whole JSON file."""
    try:
        return (json.dumps(_changed(json.loads(content), draw)) + "\n").encode()
    except ValueError:
        pass
    lines = content.split(b"\n")
    for _ in range(draw.randrange(1, 4)):
        at = draw.randrange(len(lines))
        try:
            lines[at] = json.dumps(_changed(json.loads(lines[at]), draw)).encode()
        except ValueError:  # not JSON: YAML or a log
            key, colon, value = lines[at].partition(b":")
            lines[at] = key + colon + b" " + json.dumps(draw.choice(ODD)).encode() if value else b""
    return b"\n".join(lines)


def _changed(value: Any, draw: random.Random) -> Any:
    places: list[tuple[Any, Any]] = []  # container and key

    def collect(node: Any) -> None:
        for key in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            places.append((node, key))
            collect(node[key])

    collect(value)
    if not places:
        return draw.choice(ODD)
    node, key = draw.choice(places)
    if draw.randrange(4):
        node[key] = draw.choice(ODD)
    else:
        del node[key]
    return value


Damage = Callable[[bytes, random.Random], bytes]
DAMAGES: tuple[Damage, ...] = (
    flip, truncate, clear, duplicate, random_bytes, change_values
)  # fmt: skip
