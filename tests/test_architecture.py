"""The rooms of ``docs/architecture.md``: imports point down, and the table there lists each of them."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

import pytest
from conftest import ROOT

SOURCES = [ROOT / "launch.py", *sorted((ROOT / "src").rglob("*.py"))]


def room(parts: tuple[str, ...]) -> str:
    """Room of a module: the first name below ``largebatch``, or ``launch.py``."""
    return parts[1] if parts[0] == "largebatch" and len(parts) > 1 else "launch.py"


def imported(file: Path) -> set[str]:
    """Rooms that ``file`` imports from, also inside functions and under TYPE_CHECKING."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        modules: list[str] = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            modules = (
                [node.module or ""]
                if node.module != "largebatch"
                else [f"largebatch.{a.name}" for a in node.names if a.name != "__version__"]
            )
        found |= {room(tuple(module.split("."))) for module in modules if module.split(".")[0] == "largebatch"}
    return found


def arrows() -> dict[str, set[str]]:
    """Rooms that each room imports from."""
    found: dict[str, set[str]] = defaultdict(set)
    for file in SOURCES:
        parts = file.relative_to(ROOT / "src" if "src" in file.parts else ROOT).with_suffix("").parts
        if parts != ("largebatch", "__init__"):
            found[room(parts)] |= imported(file)
    return {name: rooms - {name} for name, rooms in found.items()}


def documented() -> dict[str, tuple[int, set[str]]]:
    """Floor and imports of each room, from the table in ``docs/architecture.md``."""
    rows = re.findall(r"^\| (\d+) \| `([\w.]+)` \|.*\|(.*)\|$", (ROOT / "docs/architecture.md").read_text(), re.M)
    return {name: (int(floor), set(re.findall(r"[\w.]+", imports))) for floor, name, imports in rows}


def test_the_documented_imports_are_those_of_the_code() -> None:
    assert {name: imports for name, (_, imports) in documented().items()} == arrows()


def test_imports_between_rooms_point_down() -> None:
    """Strictly down, so that there is no circle."""
    floors = {name: floor for name, (floor, _) in documented().items()}
    up = [f"{a} -> {b}" for a, rooms in arrows().items() for b in rooms if floors[b] >= floors[a]]
    assert not up


def test_documented_files_exist() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    files = {path.name for path in (ROOT / "src").rglob("*")} | {"launch.py", "test_architecture.py"}
    assert set(re.findall(r"`(?:\w+/)*(\w+\.(?:py|cpp))`", text)) <= files


@pytest.mark.parametrize("kind", ["*.py", "*.cpp"])
def test_no_file_is_over_400_lines(kind: str) -> None:
    long = {str(file): n for file in (ROOT / "src").rglob(kind) if (n := len(file.read_text().splitlines())) > 400}
    assert not long
