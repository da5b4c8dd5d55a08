"""``largebatch export``: a run's weights as one file for other programs."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from largebatch.config.identity import identity
from largebatch.errors import UserError, require
from largebatch.results.run import LoadedRun
from largebatch.runs.folder import replace_file

ENDINGS = {"safetensors": ".safetensors", "torch": ".pt", "onnx": ".onnx"}


def export(run: LoadedRun, format_: str, out: Path, *, backbone: bool) -> None:
    """Write the network's weights with the metadata of ``described``; for ONNX, the network itself too.

    The formats:
        safetensors: the state dict, and in its metadata each value as JSON.
        torch: ``{"state_dict": ..., "metadata": ...}``, for ``torch.load(file, weights_only=True)``.
        onnx: a graph from ``images`` [batch, C, H, W] to ``logits`` or ``features`` [batch, N], and the metadata in its
            ``metadata_props`` as JSON.

    Args:
        backbone: leave out the classifier. In mode ``bt`` it is always left out.

    Raises:
        UserError: a package is missing, the network can't be exported, or the file can't be written.
    """
    backbone = backbone or run.config.mode.name == "bt"
    network = run.backbone() if backbone else run.model()
    metadata = described(run, "features" if backbone else "logits")
    texts = {key: json.dumps(value) for key, value in metadata.items()}
    # Copies, because safetensors refuses tensors that share memory.
    state = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in network.state_dict().items()}
    if format_ == "safetensors":
        write = partial(save_file, state, metadata=texts)
    elif format_ == "torch":
        write = partial(torch.save, {"state_dict": state, "metadata": metadata})
    else:
        write = partial(_onnx(run, network, metadata["output"], texts).save, external_data=False)
    try:
        replace_file(out, write)
    except OSError as error:
        raise UserError(f"--out {out}: can't be written ({error.strerror or error})") from error


def described(run: LoadedRun, output: str) -> dict[str, Any]:
    """Return the values that go with the weights: preprocessing, classes, and the run they are from.

    ``image`` is channels, height and width. Pixels in 0..1 are normalised by ``mean`` and ``std``.
    """
    return {
        "model": run.config.model.name,
        "output": output,
        "image": list(run.shape),
        "mean": list(run.mean),
        "std": list(run.std),
        "classes": list(run.classes),
        "run": run.folder.path.absolute().name,
        "identity": identity(run.config),
        "step": run.step,
        "git_commit": run.summary.get("git_commit"),
    }


def _onnx(run: LoadedRun, network: nn.Module, output: str, texts: dict[str, str]) -> Any:
    """Return torch's ONNX program of the network, for any number of images.

    Raises:
        UserError: a package is missing, or torch can't express the network in ONNX.
    """
    require("export")
    try:
        program: Any = torch.onnx.export(
            network, (torch.zeros(2, *run.shape),), input_names=["images"], output_names=[output],
            dynamic_shapes=({0: torch.export.Dim("batch")},), dynamo=True, verbose=False,
        )  # fmt: skip
    except Exception as error:  # any model can be given
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"--to onnx: torch can't export model.name={run.config.model.name} ({reason})") from error
    program.model.metadata_props.update(texts)
    return program
