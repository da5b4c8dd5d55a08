"""A cluster's programs and their Debian packages."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
INSTALL = "python tests/tools/private_slurm/cluster.py install"

_PACKAGES = {"munged": "munge", "slurmctld": "slurmctld", "slurmd": "slurmd", "sbatch": "slurm-client"}
_ACCOUNTING_PACKAGES = {
    "slurmdbd": "slurmdbd", "mariadb-install-db": "mariadb-server-core", "my_print_defaults": "mariadb-client-core",
}  # fmt: skip
# Debian runs this file before a package starts its services; exit code 101 forbids it.
_POLICY = Path("/usr/sbin/policy-rc.d")


class ClusterError(Exception):
    """A cluster can't run; one line with the reason and the fix."""


def missing_programs(accounting: bool = True) -> str:
    """Return one line with the missing packages and their installation; empty if all are there."""
    needed = _PACKAGES | (_ACCOUNTING_PACKAGES if accounting else {})
    missing = [package for program, package in needed.items() if shutil.which(program, path=PATH) is None]
    return f"SLURM isn't installed, {' '.join(missing)} missing. Fix: run {INSTALL}" if missing else ""


def install() -> None:
    """Install the Debian packages without starting their services.

    Raises:
        ClusterError: not root, no apt-get, or apt-get failed; with apt-get's last line.
    """
    if os.geteuid() != 0:
        raise ClusterError("installing packages needs root")
    if shutil.which("apt-get", path=PATH) is None:
        raise ClusterError(
            f"no apt-get here. Fix: install {' '.join((_PACKAGES | _ACCOUNTING_PACKAGES).values())} by hand"
        )
    no_policy = not _POLICY.exists()
    if no_policy:
        _POLICY.write_text("#!/bin/sh\nexit 101\n")
        _POLICY.chmod(0o755)
    try:
        packages = (_PACKAGES | _ACCOUNTING_PACKAGES).values()
        _apt_get("update", "-qq")
        _apt_get("install", "-qq", "--yes", "--no-install-recommends", *packages)
    finally:
        if no_policy:
            _POLICY.unlink()


def _apt_get(*arguments: str) -> None:
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    result = subprocess.run(
        ["apt-get", *arguments], env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if result.returncode != 0:
        last = (result.stderr.strip() or result.stdout.strip()).splitlines()[-1:]
        raise ClusterError(f"apt-get {arguments[0]} failed: {' '.join(last)}")
