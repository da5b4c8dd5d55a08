"""Requests to SLURM in the keys of ``cluster``: GPUs, the time limit, options of sbatch and srun; and their checks."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from largebatch.errors import UserError

if TYPE_CHECKING:
    from largebatch.config.schema import ClusterConfig

Gpus = dict[str, int]  # number by type; the type is empty if the request names none

_GPU_OPTIONS = ("gres", "gpus", "gpus-per-node", "gpus-per-task")
_SHARED_GPUS = ("mps", "shard")  # gres that are parts of one GPU
_ELSEWHERE = "set cluster.gpus_per_node"
# Options of sbatch that the script has or can't have, and the fix.
_NOT_FREE = {
    "nodes": "set cluster.nodes",
    "partition": "set cluster.partition",
    "account": "set cluster.account",
    "qos": "set cluster.qos",
    "constraint": "set cluster.constraint",
    "cpus-per-task": "set cluster.cpus_per_node",
    "mem": "set cluster.memory_gb",
    "time": "set cluster.time_limit",
    "job-name": "set cluster.job_name",
    "signal": "set cluster.signal_seconds",
    "wait": "set cluster.wait",
    "array": "start a grid with -m, and set cluster.array_parallelism",
    "no-requeue": "set cluster.options.requeue=false",
    **dict.fromkeys(
        ("ntasks", "ntasks-per-node", "ntasks-per-core", "ntasks-per-gpu", "ntasks-per-socket"),
        "set cluster.processes_per_node; a node has one task, which starts the processes",
    ),
    **dict.fromkeys(("gpus-per-socket", "tres-per-task"), _ELSEWHERE),
    **dict.fromkeys(
        ("output", "error", "open-mode", "parsable", "quiet", "wrap", "test-only", "help", "usage", "version"),
        "leave it out",
    ),
}
# The same for srun.
_NOT_FREE_IN_SRUN = {
    "cpu-bind": "set cluster.cpu_bind",
    "cpus-per-task": "set cluster.cpus_per_node",
    "nodes": "set cluster.nodes",
    **dict.fromkeys(("ntasks", "ntasks-per-node"), "set cluster.processes_per_node"),
    **dict.fromkeys((*_GPU_OPTIONS, "gpus-per-socket", "tres-per-task"), _ELSEWHERE),
    **dict.fromkeys(("output", "error", "unbuffered", "kill-on-bad-exit"), "leave it out"),
}
_CPU_BIND = r"((quiet|verbose),)?(none|sockets|cores|threads|ldoms|(map|mask)_(cpu|ldom):[0-9A-Fa-fx*,-]+)"
_HOUR, _SIXTY = "([01]?[0-9]|2[0-3])", "([0-5]?[0-9])"
_TIMES = {  # SLURM's forms, with the seconds of their parts
    "([0-9]{1,8})": (60,),
    f"([0-9]{{1,8}}):{_SIXTY}": (60, 1),
    f"([0-9]{{1,8}}):{_SIXTY}:{_SIXTY}": (3600, 60, 1),
    f"([0-9]{{1,8}})-{_HOUR}": (86400, 3600),
    f"([0-9]{{1,8}})-{_HOUR}:{_SIXTY}": (86400, 3600, 60),
    f"([0-9]{{1,8}})-{_HOUR}:{_SIXTY}:{_SIXTY}": (86400, 3600, 60, 1),
}


def seconds_of(time_limit: int | str) -> int | None:
    """Return the seconds of a time in one of SLURM's forms; None if it has another form."""
    for form, units in _TIMES.items():
        if match := re.fullmatch(form, str(time_limit)):
            return sum(int(part) * unit for part, unit in zip(match.groups(), units, strict=True))
    return None


def gpus_per_node(cluster: ClusterConfig) -> Gpus:
    """Return the GPUs that the job requests on each node, by type.

    Raises:
        UserError: if a request can't be read, two keys request GPUs, or the nodes can't have equally many.
    """
    requests = gpu_requests(cluster)
    if len(requests) > 1:
        both = " and ".join(f"{key}={value}" for key, value in requests.items())
        raise UserError(f"{both}: each sets the number of GPUs. Fix: keep one of them")
    found: Gpus = {}
    for key, value in requests.items():
        option = _option(key.rpartition(".")[2])
        nodes = max(1, cluster.nodes) if option == "gpus" else 1  # --gpus is for the whole job
        for part in _gpu_parts(option, value):
            match = re.fullmatch(r"(?:([\w.+-]+)[:=])?([0-9]{1,6})|([A-Za-z_][\w.+-]*)", part, re.ASCII)
            if match is None or isinstance(value, bool):
                allowed = "gpu:4, gpu:a100:4" if option == "gres" else "4, a100:4"
                raise UserError(f"{key}={value}: unknown request for GPUs. Allowed: {allowed}, or several after commas")
            kind, number = match[1] or match[3] or "", int(match[2] or 1)
            if number % nodes:
                fix = "set cluster.gpus_per_node"
                raise UserError(f"{key}={value}: can't be divided over cluster.nodes={nodes}. Fix: {fix}")
            found[kind] = found.get(kind, 0) + number // nodes
    return {kind: number for kind, number in found.items() if number}


def gpu_requests(cluster: ClusterConfig) -> dict[str, Any]:
    """Return the keys that request GPUs, with their values. A ``gres`` without GPUs isn't among them."""
    given = {"cluster.gpus_per_node": cluster.gpus_per_node}
    given |= {f"cluster.options.{key}": value for key, value in cluster.options.items() if _option(key) in _GPU_OPTIONS}
    return {
        key: value
        for key, value in given.items()
        if value is not None and value is not False and _gpu_parts(_option(key.rpartition(".")[2]), value)
    }


def _gpu_parts(option: str, value: Any) -> list[str]:
    """Return the parts of a request that are for GPUs, each as ``4``, ``a100:4`` or ``a100``."""
    parts = str(value).split(",")
    if option != "gres":
        return parts
    named = [re.split("[:=]", re.sub("^gres[/:]", "", part), maxsplit=1) for part in parts]
    return [
        "".join(count) or "1" if name.lower() == "gpu" else "1"
        for name, *count in named
        if name.lower() in ("gpu", *_SHARED_GPUS)
    ]


def gpus_in_words(gpus: Gpus) -> str:
    """Return the GPUs as SLURM's option has them: ``4``, ``a100:4`` or ``a100:2,v100:2``."""
    return ",".join(f"{kind}:{number}" if kind else str(number) for kind, number in gpus.items())


def sbatch_options(cluster: ClusterConfig) -> dict[str, Any]:
    """Return the script's options that have no key of their own, GPUs included.

    ``gres`` stays as it is, because some sites accept no other request. Other requests become ``gpus-per-node``: each
    node of the job has one task, and ``gpus`` alone could give the nodes different numbers of GPUs.
    """
    options = {
        key: value
        for key, value in ({"requeue": True} | cluster.options).items()
        if value is not None and value is not False and _option(key) not in _GPU_OPTIONS[1:]
    }
    gpus = gpus_in_words(gpus_per_node(cluster))
    if gpus and not any(_option(key.rpartition(".")[2]) == "gres" for key in gpu_requests(cluster)):
        options["gpus-per-node"] = gpus
    return options


def slurm_problems(cluster: ClusterConfig) -> list[str]:
    """Return one line for each key of ``cluster`` that SLURM or the script can't take."""
    problems = [*_control_characters(cluster), *_options(cluster), *_srun_args(cluster)]
    try:
        gpus_per_node(cluster)
    except UserError as error:
        problems.append(str(error))
    problems += [
        f"cluster.setup={line!r}: sbatch would read it as an option. Fix: set cluster.options"
        for line in cluster.setup
        if str(line).lstrip().startswith("#SBATCH")
    ]
    if cluster.cpu_bind is not None and not re.fullmatch(_CPU_BIND, cluster.cpu_bind):
        problems.append(
            f"cluster.cpu_bind={cluster.cpu_bind}: unknown. Allowed: none, sockets, cores, threads, ldoms, "
            "map_cpu:LIST, mask_cpu:LIST, map_ldom:LIST, mask_ldom:LIST, with verbose, or quiet, before"
        )
    limit = cluster.time_limit
    seconds = None if limit is None else seconds_of(limit)
    if limit is not None and not seconds:
        forms = "minutes, mm:ss, h:mm:ss, d-h, d-h:mm, d-h:mm:ss, above zero"
        problems.append(f"cluster.time_limit={limit}: unknown time. Allowed: {forms}")
    if seconds and cluster.signal_seconds >= seconds:
        problems.append(
            f"cluster.signal_seconds={cluster.signal_seconds}: must be shorter than cluster.time_limit={limit} "
            f"({seconds} s), else SLURM stops a run as soon as it starts. Fix: shorten it"
        )
    return problems


def _option(key: str) -> str:
    """Return a key as sbatch spells its option."""
    return str(key).replace("_", "-")


def _control_characters(cluster: ClusterConfig) -> Iterator[str]:
    texts = {key: value for key, value in vars(cluster).items() if isinstance(value, str)}
    texts |= {key: "".join(map(str, value)) for key, value in vars(cluster).items() if isinstance(value, list)}
    texts["options"] = "".join(f"{key}{value}" for key, value in cluster.options.items())
    for key, text in texts.items():
        if has_control_character(text):
            yield (
                f"cluster.{key}={text!r}: has a line break or another control character, which would end its line of "
                "the script. Fix: remove it, or put more commands into cluster.setup as further elements"
            )


def has_control_character(text: str) -> bool:
    return any(unicodedata.category(character) == "Cc" for character in text)


def _options(cluster: ClusterConfig) -> Iterator[str]:
    """Yield a line for each option that isn't one of sbatch's, is in the script already, or is there twice."""
    names = [_option(key) for key in cluster.options]
    for name, (key, value) in zip(names, cluster.options.items(), strict=True):
        if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", str(key)) or not isinstance(value, str | int | float | None):
            yield (
                f"cluster.options.{key}={value}: invalid. Allowed: sbatch's long options without dashes, with a text, "
                "number, true, false or null"
            )
        elif names.count(name) > 1:
            yield f"cluster.options.{key}={value}: cluster.options has {name} twice. Fix: keep one of them"
        else:
            yield from _not_free(f"cluster.options.{key}={value}", name, _NOT_FREE, _GPU_OPTIONS)


def _srun_args(cluster: ClusterConfig) -> Iterator[str]:
    names = [str(argument).partition("=")[0].removeprefix("--") for argument in cluster.srun_args]
    for name, argument in zip(names, cluster.srun_args, strict=True):
        key = f"cluster.srun_args={argument}"
        if not re.fullmatch("--[a-z][a-z0-9-]*", f"--{name}") or not str(argument).startswith("--"):
            yield f"{key}: invalid. Allowed: srun's long options, each as one element --NAME or --NAME=VALUE"
        elif names.count(name) > 1:
            yield f"{key}: cluster.srun_args has {name} twice. Fix: keep one of them"
        else:
            yield from _not_free(key, name, _NOT_FREE_IN_SRUN)


def _not_free(given: str, name: str, taken: dict[str, str], also: tuple[str, ...] = ()) -> Iterator[str]:
    """Yield a problem if ``name`` is taken, or the beginning of such an option, which SLURM would complete."""
    if name in taken:
        yield f"{given}: not allowed here. Fix: {taken[name]}"
    elif name not in also and (full := [option for option in (*also, *taken) if option.startswith(name)]):
        yield f"{given}: SLURM could complete it to {' or '.join(full)}. Fix: write the option in full"
