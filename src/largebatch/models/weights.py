"""Weights that a model starts from: another run's, a file's, or the library's pre-trained ones; and frozen models."""

from __future__ import annotations

import functools
import json
import pickle
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from largebatch.config.models import ModelConfig, TimmModel
from largebatch.errors import UserError
from largebatch.models.build import head_names

_NAMED = 3  # tensors that a message names
_PREFIX = "backbone."  # of the backbone in a checkpoint of mode bt


@dataclass(frozen=True)
class Source:
    """Weights of a network by name, without those of a projector.

    Attributes:
        key: key and value of the configuration that name the weights, for messages.
        classes: names of the classes of its head. None: unknown.
    """

    key: str
    state: dict[str, Tensor]
    classes: tuple[str, ...] | None = None


def load_weights(
    config: ModelConfig, network: nn.Module, classes: tuple[str, ...], channels: int, say: Callable[[str], None]
) -> None:
    """Replace the weights of ``network`` if ``model.weights`` or ``model.pretrained`` is set.

    The head is loaded too if it fits and its classes have the same names. Otherwise it keeps its initial weights.

    Args:
        network: a classifier, or a backbone without a head.
        classes: names of the classes.
        channels: of an image.
        say: called with a line about the loaded weights.

    Raises:
        UserError: the weights can't be read or downloaded, or don't fit the network.
    """
    if config.pretrained:
        load_source(config, network, classes, published(config, channels), say)
    elif config.weights is not None:
        load_source(config, network, classes, read_weights(Path(config.weights)), say)


def load_source(
    config: ModelConfig, network: nn.Module, classes: tuple[str, ...], source: Source, say: Callable[[str], None]
) -> None:
    """Replace the weights of ``network`` by those of ``source``, as ``load_weights`` describes."""
    heads = tuple(f"{name}." for name in head_names(config, network))
    wanted, given = network.state_dict(), source.state
    head, its_head = ({n: t for n, t in one.items() if n.startswith(heads)} for one in (wanted, given))
    same = source.classes in (None, classes) and _shapes(head) == _shapes(its_head)
    if not same:
        wanted, given = ({n: t for n, t in one.items() if not n.startswith(heads)} for one in (wanted, given))
    problems = [
        f"{name} has the shape {list(given[name].shape)} instead of {list(wanted[name].shape)}"
        for name in wanted
        if name in given and given[name].shape != wanted[name].shape
    ]
    problems = [_listed("", problems)] if problems else []
    problems += [_listed("it lacks ", missing)] if (missing := [name for name in wanted if name not in given]) else []
    problems += (
        [_listed("unknown are ", unknown)] if (unknown := [name for name in given if name not in wanted]) else []
    )
    if problems:
        raise UserError(
            f"{source.key}: doesn't fit model.name={config.name}: {'; '.join(problems)}. Fix: choose the model, its "
            "options and dataset.channels as in the source"
        )
    network.load_state_dict(given, strict=False)
    left_out = f"; the head ({', '.join(head)}) starts anew" if head and not same else ""
    say(f"{source.key}: loaded {len(wanted)} tensors{left_out}")


def read_weights(path: Path) -> Source:
    """Return the weights in a file: a checkpoint of a run, an export, or a state dict of torch or safetensors.

    The backbone of a checkpoint of mode ``bt`` is taken without its projector, and averaged weights if there are any.

    Raises:
        UserError: the file can't be read, or holds no state dict.
    """
    key = f"model.weights={path}"
    try:
        if path.suffix == ".safetensors":
            from safetensors import safe_open
            from safetensors.torch import load_file

            with safe_open(path, "pt") as file:
                texts = file.metadata() or {}
            content: Any = {
                "state_dict": load_file(path),
                "metadata": {"classes": json.loads(texts.get("classes", "null"))},
            }
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # libraries raise errors of many types for a damaged file
        reason = "not a file of tensors" if isinstance(error, pickle.UnpicklingError) else _first_line(error)
        raise UserError(
            f"{key}: can't be read as weights ({reason}). Allowed: a checkpoint of a run, or a state dict of torch or "
            "safetensors"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{key}: holds a {type(content).__name__}, not a state dict")
    state = next(
        (content[name] for name in ("averaged", "model", "state_dict") if isinstance(content.get(name), dict)), content
    )
    if not state or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise UserError(f"{key}: holds no state dict (its entries: {_listed('', map(str, content))})")
    classes = content.get("metadata", {}).get("classes")
    if "data" in content:  # of a run's checkpoint
        classes = [name for name, *_ in content["data"]["classes"]]
    if any(name.startswith(_PREFIX) for name in state):
        state = {name.removeprefix(_PREFIX): tensor for name, tensor in state.items() if name.startswith(_PREFIX)}
    return Source(key, state, None if classes is None else tuple(classes))


def published(config: ModelConfig, channels: int) -> Source:
    """Return the pre-trained weights of timm or torchvision, from their cache or the network.

    timm adapts the first convolution to ``channels``.

    Raises:
        UserError: there are none, or they are neither in the cache nor can be downloaded.
    """
    key = f"model.pretrained=true: model.name={config.name}"
    cache = "TORCH_HOME (~/.cache/torch)"
    try:
        if isinstance(config, TimmModel):
            import timm

            cache = "HF_HOME (~/.cache/huggingface)"
            found = timm.get_pretrained_cfg(config.name)
            if found is None or not found.has_weights:
                raise UserError(f"{key}: timm has no pre-trained weights. Fix: model.pretrained=false")
            model = timm.create_model(config.name, pretrained=True, in_chans=channels, **config.options)
            return Source(key, model.state_dict())
        from torchvision.models import get_model_weights

        weights: Any = get_model_weights({"effb0": "efficientnet_b0"}.get(config.name, config.name)).DEFAULT
        return Source(key, weights.get_state_dict(progress=False, check_hash=True))
    except UserError:
        raise
    except Exception as error:  # of the library's download, or of its model
        raise UserError(
            f"{key}: the weights can't be loaded ({_first_line(error)}). Fix: start it once on a machine with a "
            f"network; or copy the cache in {cache} from there"
        ) from error


def freeze(config: ModelConfig, network: nn.Module) -> list[str]:
    """Freeze all of ``network`` but its head. Return the names of the parameters that train.

    Frozen parameters need no gradient. Frozen modules stay in evaluation mode, so their batch norm uses its running
    statistics and doesn't change them, and their dropout is off.

    Raises:
        UserError: the model's head is unknown.
    """
    heads = head_names(config, network)
    trained = [name for name, _ in network.named_parameters() if name.startswith(tuple(f"{head}." for head in heads))]
    if not trained:
        raise UserError(f"model.freeze=true: the head of model.name={config.name} is unknown. Fix: model.freeze=false")
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name in trained)
    for name, module in network.named_modules():
        above = not name or any(f"{head}.".startswith(f"{name}.") for head in heads)
        if not above and not name.startswith(tuple(f"{head}." for head in heads)):
            module.eval()
            module.train = functools.partial(_stay, module)
    return trained


def is_frozen(module: nn.Module) -> bool:
    """Return True if ``freeze`` keeps the module in evaluation mode."""
    return "train" in vars(module)


def _stay(module: nn.Module, mode: bool = True) -> nn.Module:
    return module


def _shapes(state: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in state.items()}


def _listed(before: str, names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - _NAMED:,} more" if len(listed) > _NAMED else ""
    return before + ", ".join(listed[:_NAMED]) + more


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
