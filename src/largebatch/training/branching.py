"""Start of a run from a checkpoint of another run (``start_from``)."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from largebatch.errors import UserError
from largebatch.runs.folder import RunFolder, checkpoint_path
from largebatch.training.checkpoint import DamagedError, load_checkpoint
from largebatch.training.state import Run, Training


def branch(run: Run, training: Training) -> None:
    """Load weights, running statistics and the optimizer's state, such as momentum and step count, in every process.

    Averaged weights (``ema_decay``) begin as the other run's, or else as the loaded weights. All else is the run's own
    from its step 0 on: batch size, learning rate and other options, schedule, order of the images.

    Raises:
        UserError: if the checkpoint is missing or damaged, or of another data set, network or optimizer.
    """
    start = run.config.start_from
    assert start is not None
    name, _, step = start.rpartition("@")
    path = checkpoint_path(RunFolder(run.folder.path.parent / name).checkpoints, int(step))
    try:
        saved, trailer = load_checkpoint(path, run.device)
    except (OSError, DamagedError) as error:
        problem = f"{path} {error}" if isinstance(error, DamagedError) else f"{path}: {error.strerror}"
        fix = f"run {name} again with checkpoint.keep_at=[{step}] rerun=true"
        raise UserError(f"start_from={start}: {problem}. Fix: {fix}") from error
    if trailer["run"] != name.rpartition("-")[2]:
        raise UserError(
            f"start_from={start}: {path} belongs to another run ({trailer['run']}). Fix: give run folders their own "
            "names again"
        )
    if difference := run.data.content.difference(saved["data"]):
        raise UserError(
            f"start_from={start}: began with another data set. Now: {difference}. Fix: restore the data set"
        )
    optimizer = training.optimizer
    try:
        training.model.load_state_dict(saved["model"])
        optimizer.load_state_dict(with_own_options(optimizer, saved["optimizer"]))
        if training.averaged:
            training.averaged.model.load_state_dict(saved.get("averaged", saved["model"]))
    except (RuntimeError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"start_from={start}: has another network or optimizer ({reason}). Fix: the options of model and optimizer "
            "in that run's config.yaml"
        ) from error
    training.loss_scale.load(saved["loss_scale"])


def with_own_options(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
    """Return a saved state of an optimizer with the present options of ``optimizer``, such as learning rates.

    Options are the arguments of its class and of the base classes. All else in a group is state, such as a counter.
    """
    options = {"initial_lr"}
    for kind in type(optimizer).__mro__:
        options |= inspect.signature(vars(kind).get("__init__", object.__init__)).parameters.keys()
    pairs = zip(saved["param_groups"], optimizer.state_dict()["param_groups"], strict=False)  # torch names a difference
    groups = [
        {**theirs, **{key: value for key, value in own.items() if key in options or key not in theirs}}
        for theirs, own in pairs
    ]
    return {"state": saved["state"], "param_groups": groups}
