"""Help in groups, completion in a shell, and Python 3.14's argparse."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, environment

from largebatch import arguments, cli

COMMAND = (sys.executable, "-m", "largebatch")


def test_help_shows_each_command_once_in_a_group(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    shown = capsys.readouterr().out
    assert re.findall(r"^(\w[\w &]+):$", shown, re.M) == ["options", *arguments._GROUPS]
    commands = re.findall(r"^  ([a-z][a-z-]*)  ", shown, re.M)
    assert sorted(commands) == sorted(name for names in arguments._GROUPS.values() for name in names)


def completed(line: str, cwd: Path) -> list[str]:
    """Return what argcomplete offers at the end of ``line``."""
    found = cwd / "found"
    variables = {
        "_ARGCOMPLETE": "1", "_ARGCOMPLETE_IFS": "\n", "_ARGCOMPLETE_STDOUT_FILENAME": str(found),
        "_ARGCOMPLETE_SUPPRESS_SPACE": "1", "_ARGCOMPLETE_COMP_WORDBREAKS": " \t\n\"'><;|&(:",
        "COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_TYPE": "9",
    }  # fmt: skip
    subprocess.run(COMMAND, cwd=cwd, env=environment() | variables, timeout=60, check=True, capture_output=True)
    return found.read_text().split("\n")


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("largebatch re", ["report", "replay"]),
        ("largebatch run optimizer=tvl", ["optimizer=tvlars", "optimizer=tvlars_published"]),
        ("largebatch run -m seed=0,1 sweeps=de", ["sweeps=demo"]),
        ("largebatch run optimizer=tvlars optimizer.lmbda_", ["optimizer.lmbda_relative="]),
    ],
)
def test_a_shell_completes_commands_presets_and_keys(tmp_path: Path, line: str, offered: list[str]) -> None:
    assert sorted(found.strip() for found in completed(line, tmp_path)) == sorted(offered)


def test_the_documented_command_makes_bash_complete_largebatch(tmp_path: Path) -> None:
    path = f"{Path(sys.executable).parent}:{environment()['PATH']}"
    if shutil.which("register-python-argcomplete", path=path) is None:
        pytest.skip("no register-python-argcomplete here")
    command = 'eval "$(register-python-argcomplete largebatch)"'
    assert command in (ROOT / "docs" / "commands.md").read_text()
    shell = subprocess.run(
        ["bash", "-c", f"{command}; complete -p largebatch"], cwd=tmp_path, env=environment() | {"PATH": path},
        text=True, capture_output=True, check=True,
    )  # fmt: skip
    assert shell.stdout.strip().endswith("-F _python_argcomplete largebatch")


# As argparse of Python 3.14: each added option's help must be text.
CHECKING = """
import argparse

add = argparse._ActionsContainer.add_argument


def check(self, action):
    if action.help and hasattr(self, "_get_formatter"):
        "%" in action.help


def add_argument(self, *args, **kwargs):
    action = add(self, *args, **kwargs)
    self._check_help(action)
    return action


argparse._ActionsContainer._check_help = check
argparse._ActionsContainer.add_argument = add_argument
"""


def test_the_launcher_works_with_python_3_14_s_argparse(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(CHECKING)
    env = environment()
    env["PYTHONPATH"] = f"{tmp_path}:{env.get('PYTHONPATH', '')}"
    shown = subprocess.run(
        [*COMMAND, "run", "--help"], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )
    assert shown.returncode == 0, shown.stderr
    assert "Groups and their presets" in shown.stdout
