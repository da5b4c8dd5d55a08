"""``largebatch run``: compose the configurations with Hydra, plan the runs, run them.

largebatch run optimizer=tvlars batch_size=1024
largebatch run -m optimizer=lars,lamb,tvlars seed=0,1,2
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError

from largebatch.config.typed import REFUSED, from_composed
from largebatch.errors import UserError, require
from largebatch.launch import sweep_agent
from largebatch.launch.composition import Composed, by_force, compose_grid, composition_error, plain, store_defaults
from largebatch.launch.grid import carry_out_plan, show_plan
from largebatch.launch.plan import make_plan
from largebatch.launch.presets import presets, program
from largebatch.terminal import exit_code_of, outlive_terminal, restart_in_utf8
from largebatch.tracking.wandb_arguments import agent_run_id

_MULTIRUN = ("-m", "--multirun")
_MANY = 20  # runs whose planning is announced

_job: list[Composed] = []


def _collect(tree: DictConfig) -> None:
    """Collect a run's configuration; Hydra calls this function in this process."""
    job = HydraConfig.get()
    overrides = tuple(override.removeprefix("++") for override in job.overrides.task)
    _job.append(Composed(overrides, plain(tree), job.runtime.choices.get("sweeps"), multirun=False))


def composed_jobs(arguments: list[str]) -> list[Composed]:
    """Return the configurations of the command line; empty after ``--help`` and similar flags.

    Raises:
        UserError: Hydra can't compose the command line.
    """
    completes = bool({"-sc", "--shell-completion"} & set(arguments))
    store_defaults(with_options=completes)
    # Python 3.14 checks each help text as it is added, and refuses one of Hydra's, which isn't a string.
    argparse.ArgumentParser._check_help = lambda parser, action: None  # type: ignore[attr-defined]
    conf = presets()
    wants_traceback = "HYDRA_FULL_ERROR" in os.environ
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises errors instead of printing them
    overrides = [argument for argument in arguments if argument not in _MULTIRUN]
    flags = [override for override in overrides if override.startswith("-")]
    try:
        if len(overrides) < len(arguments) and not flags:
            return compose_grid(overrides, conf)
        if not completes:
            sys.argv[1:] = [a if a.startswith("-") or "=" not in a else by_force([a], conf)[0] for a in arguments]
        with tempfile.TemporaryDirectory(prefix="largebatch-") as scratch:
            os.environ["LARGEBATCH_SCRATCH"] = scratch  # for Hydra's own files
            with _help_names(conf) if {"-h", "--help"} & set(arguments) else contextlib.nullcontext():
                hydra.main(version_base="1.3", config_path=str(conf), config_name="config")(_collect)()
        if _job and len(overrides) < len(arguments):
            raise UserError(
                f"{' '.join(flags)}: not allowed with -m. Fix: add presets with 'hydra.searchpath=[FOLDER]'"
            )
    except (HydraException, *REFUSED, YAMLError, ValueError) as error:
        if wants_traceback:
            raise
        raise UserError(composition_error(error)) from error
    return _job


@contextlib.contextmanager
def _help_names(conf: Path) -> Iterator[None]:
    """Insert this process's command and the folder of the presets into the printed text of ``conf/config.yaml``.

    An interpolation in that text would take a thirtieth of the time of ``--help``.
    """
    try:
        with contextlib.redirect_stdout(io.StringIO()) as text:
            yield
    finally:  # Hydra exits after its help
        print(text.getvalue().replace("largebatch run", program()).replace("CONF", str(conf)), end="")


def completions(overrides: list[str], beginning: str) -> list[str]:
    """Return the overrides that may follow ``overrides`` and have this beginning, for a shell."""
    os.environ["COMP_LINE"] = " ".join(["largebatch", *overrides, beginning])  # Hydra reads it there
    sys.argv[1:] = ["-sc", "query=bash"]
    with contextlib.redirect_stdout(io.StringIO()) as found:
        composed_jobs(sys.argv[1:])
    return found.getvalue().split()


def show_configuration(arguments: list[str]) -> bool:
    """Print a run's configuration, with exactly the keys of its choices, and return True if ``--cfg job`` asks for it.

    Hydra's own ``--cfg`` prints only the presets, without options that keep their defaults.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--cfg", "-c")
    parser.add_argument("--package", "-p", default="")
    parser.add_argument("--resolve", action="store_true")  # accepted; values are always resolved
    given, others = parser.parse_known_args(arguments)
    if given.cfg != "job" or set(_MULTIRUN) & set(others):
        return False
    sys.argv[1:] = others
    for job in composed_jobs(others):
        shown = OmegaConf.structured(from_composed(job.tree))
        print(OmegaConf.to_yaml(OmegaConf.select(shown, given.package) if given.package else shown), end="")
    return True


def launch() -> int:
    """Run the command line in ``sys.argv``."""
    try:
        tempfile.gettempdir()
    except FileNotFoundError as error:
        raise UserError(f"TMPDIR: {error.strerror}. Fix: TMPDIR=FOLDER with a folder that can be written") from None
    if agent_run_id():
        sys.argv[1:] = sweep_agent.overrides(sys.argv[1:])
    if show_configuration(sys.argv[1:]) or not (jobs := composed_jobs(sys.argv[1:])):
        return 0
    require("train")  # a worker needs more than this process
    if len(jobs) > _MANY:  # planning takes a few seconds
        print(f"planning {len(jobs)} runs", flush=True)
    plan = make_plan(jobs)
    code = show_plan(plan) if plan[0].config.dry_run else carry_out_plan(plan)
    if code == 128 + signal.SIGUSR2 and agent_run_id():
        sweep_agent.give_back(plan[0])
    return code


def main(arguments: list[str]) -> int:
    """Run the command line ``arguments`` and return the exit code. A stop signal ends this process."""
    restart_in_utf8()
    sys.argv[1:] = arguments  # Hydra reads them there
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last, so that a random.py there doesn't replace Python's
    outlive_terminal()
    code = exit_code_of(launch)
    if code in (128 + signal.SIGTERM, 128 + signal.SIGUSR2, 128 + signal.SIGHUP):
        signal.raise_signal(code - 128)  # the runs are saved; the parent process sees the signal
    return code
