"""Entry point of training: compose the configurations with Hydra, plan the runs, run them.

python launch.py optimizer=tvlars batch_size=1024
python launch.py -m optimizer=lars,lamb,tvlars seed=0,1,2
"""

import os
import sys

# The working directory and this file's folder come last, so that a random.py there doesn't replace Python's.
sys.path.append(os.getcwd())
sys.path.sort(key=("", os.path.dirname(os.path.abspath(__file__)), os.getcwd()).__contains__)

# The imports below take a second. A person who waits sees that the program has started.
if __name__ == "__main__" and sys.stderr.isatty() and not {"-sc", "--shell-completion"} & set(sys.argv):
    print("composing the configurations ...", file=sys.stderr, flush=True)

import argparse
import signal
import tempfile
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError

from largebatch.config.schema import REFUSED, defaults, from_composed
from largebatch.errors import UserError
from largebatch.launch import sweep_agent
from largebatch.launch.composition import Composed, by_force, compose_grid, composition_error, plain
from largebatch.launch.grid import carry_out_plan, show_plan
from largebatch.launch.plan import make_plan
from largebatch.terminal import exit_code_of, outlive_terminal, restart_in_utf8
from largebatch.tracking.wandb_arguments import agent_run_id

CONF = Path(__file__).resolve().parent / "conf"
_MULTIRUN = ("-m", "--multirun")

_job: list[Composed] = []


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def compose(tree: DictConfig) -> None:
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
    ConfigStore.instance().store(name="schema", node=OmegaConf.create(defaults(with_options=completes)))
    # Hydra copies its store for each listed group and each composed job, which takes half of --help's time.
    ConfigStore.__deepcopy__ = lambda store, memo: store  # type: ignore[attr-defined]
    wants_traceback = "HYDRA_FULL_ERROR" in os.environ
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises errors instead of printing them
    overrides = [argument for argument in arguments if argument not in _MULTIRUN]
    flags = [override for override in overrides if override.startswith("-")]
    try:
        if len(overrides) < len(arguments) and not flags:
            return compose_grid(overrides, CONF)
        if not completes:
            sys.argv[1:] = [a if a.startswith("-") or "=" not in a else by_force([a], CONF)[0] for a in arguments]
        with tempfile.TemporaryDirectory(prefix="largebatch-") as scratch:
            os.environ["LARGEBATCH_SCRATCH"] = scratch  # for Hydra's own files
            compose()
        if _job and len(overrides) < len(arguments):
            raise UserError(
                f"{' '.join(flags)}: not allowed with -m. Fix: add presets with 'hydra.searchpath=[FOLDER]'"
            )
    except (HydraException, *REFUSED, YAMLError, ValueError) as error:
        if wants_traceback:
            raise
        raise UserError(composition_error(error)) from error
    return _job


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
    try:
        tempfile.gettempdir()
    except FileNotFoundError as error:
        raise UserError(f"TMPDIR: {error.strerror}. Fix: TMPDIR=FOLDER with a folder that can be written") from None
    if agent_run_id():
        sys.argv[1:] = sweep_agent.overrides(sys.argv[1:])
    if show_configuration(sys.argv[1:]) or not (jobs := composed_jobs(sys.argv[1:])):
        return 0
    plan = make_plan(jobs)
    code = show_plan(plan) if plan[0].config.dry_run else carry_out_plan(plan)
    if code == 128 + signal.SIGUSR2 and agent_run_id():
        sweep_agent.give_back(plan[0])
    return code


def main() -> int:
    restart_in_utf8()
    outlive_terminal()
    code = exit_code_of(launch)
    if code in (128 + signal.SIGTERM, 128 + signal.SIGUSR2, 128 + signal.SIGHUP):
        signal.raise_signal(code - 128)  # the runs are saved; the parent process sees the signal
    return code


if __name__ == "__main__":
    sys.exit(main())
