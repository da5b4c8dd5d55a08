"""The folder of the presets, and the command that composes them."""

from __future__ import annotations

import sys
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent.parent


def presets() -> Path:
    """Return ``conf/`` of the checkout with this code or of the working directory, else the copy in the package."""
    for root in (_PACKAGE.parents[1], Path.cwd()):
        if (root / "src" / "largebatch").is_dir() and (root / "conf" / "config.yaml").is_file():
            return root / "conf"
    return _PACKAGE / "conf"


def program() -> str:
    """Return the command of this process that starts runs, for help and hints."""
    return "python launch.py" if Path(sys.argv[0]).name == "launch.py" else "largebatch run"
