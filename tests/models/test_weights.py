"""Weights that a model starts from: heads, mismatches, files, pre-trained weights, and frozen models."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import configuration
from safetensors.torch import save_file
from torch import Tensor, nn

from largebatch.config.checks import validate
from largebatch.config.models import ModelConfig
from largebatch.errors import UserError
from largebatch.models.build import build_backbone, build_model
from largebatch.models.weights import Source, freeze, load_source, load_weights, read_weights

SMALL = ("model=smallcnn", "model.norm=batch")
RESNET = ("model=resnet18",)
TIMM = ("model=timm", "model.name=resnet10t")


def model_config(*overrides: str) -> ModelConfig:
    return configuration(*overrides).model


def built(config: ModelConfig, classes: int, seed: int = 0, channels: int = 1) -> nn.Module:
    torch.manual_seed(seed)
    return build_model(config, classes, channels)


def copied(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def loaded(network: nn.Module, classes: str, source: Source, config: ModelConfig) -> tuple[list[str], set[str]]:
    """Load the source. Return the log, and the names of the tensors that don't equal the source's."""
    said: list[str] = []
    load_source(config, network, tuple(classes), source, said.append)
    state = network.state_dict()
    return said, {n for n in state if n not in source.state or not torch.equal(state[n], source.state[n])}


def test_the_head_is_loaded_only_for_classes_of_the_same_names() -> None:
    config = model_config(*SMALL)
    state = copied(built(config, 3, seed=1))
    head = {"head.weight", "head.bias"}
    for classes, known, kept in (
        ("abc", "abc", True),
        ("abc", None, True),
        ("abd", "abc", False),
        ("abcd", "abc", False),
    ):
        source = Source("model.weights=X", state, None if known is None else tuple(known))
        said, others = loaded(built(config, len(classes)), classes, source, config)
        assert others == (set() if kept else head)
        assert ("the head (head.weight, head.bias) starts anew" in said[0]) != kept


@pytest.mark.parametrize("overrides", [SMALL, TIMM], ids=["smallcnn", "timm"])
def test_a_backbone_and_a_classifier_exchange_weights(overrides: tuple[str, ...]) -> None:
    config = model_config(*overrides)
    backbone, _ = build_backbone(config, (1, 32, 32))
    classifier = built(config, 5, seed=1)
    wanted = copied(classifier)
    loaded(backbone, "", Source("model.weights=X", wanted), config)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in backbone.state_dict().items())
    fresh = built(config, 5, seed=2)
    _, others = loaded(fresh, "abcde", Source("model.weights=X", copied(backbone)), config)
    assert others == fresh.state_dict().keys() - backbone.state_dict().keys()


def test_a_mismatch_is_one_message_that_names_tensors() -> None:
    config = model_config(*SMALL)
    state = copied(built(config, 3))
    first, second, *_ = state
    state[first] = state[first][:, :, :1]
    state["extra"] = state.pop(second)
    with pytest.raises(UserError) as error:
        load_source(config, built(config, 3), tuple("abc"), Source("model.weights=X", state), print)
    message = str(error.value)
    assert message.startswith(f"model.weights=X: doesn't fit model.name=smallcnn: {first} has the shape [")
    assert f"it lacks {second}; unknown are extra. Fix: " in message


def test_weights_are_read_from_files_of_torch_and_safetensors(tmp_path: Path) -> None:
    network = nn.Linear(2, 3)
    save_file(network.state_dict(), tmp_path / "a.safetensors", metadata={"classes": '["a", "b", "c"]'})
    torch.save(network.state_dict(), tmp_path / "b.pt")
    torch.save({"state_dict": network.state_dict(), "metadata": {"classes": ["a"]}}, tmp_path / "c.pth")
    found = [read_weights(path) for path in sorted(tmp_path.iterdir())]
    assert [source.classes for source in found] == [("a", "b", "c"), None, ("a",)]
    for source in found:
        assert all(torch.equal(source.state[name], tensor) for name, tensor in network.state_dict().items())


def test_a_file_without_weights_is_named(tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "a.pt")
    torch.save([1], tmp_path / "b.pt")
    (tmp_path / "c.pt").write_bytes(b"damaged")
    (tmp_path / "d.safetensors").write_bytes(b"damaged")
    for path, problem in zip(
        sorted(tmp_path.iterdir()),
        (
            "holds no state dict (its entries: epoch)",
            "holds a list",
            "can't be read as weights",
            "can't be read as weights",
        ),
        strict=True,
    ):
        with pytest.raises(UserError) as error:
            read_weights(path)
        assert str(error.value).startswith(f"model.weights={path}: {problem}")


@pytest.mark.parametrize("overrides", [SMALL, TIMM], ids=["smallcnn", "timm"])
def test_a_frozen_model_trains_its_head_alone(overrides: tuple[str, ...]) -> None:
    config = model_config(*overrides)
    network = built(config, 4)
    trained = freeze(config, network)
    before = copied(network)
    network.eval()
    network.train()
    network(torch.randn(6, 1, 32, 32)).square().mean().backward()
    assert [name for name, p in network.named_parameters() if p.grad is not None] == trained
    assert [name for name, p in network.named_parameters() if p.requires_grad] == trained
    assert len(trained) == 2
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())  # batch norm too


def test_options_that_contradict_each_other_are_named() -> None:
    for overrides, problem in (
        (("model=tinycnn", "model.pretrained=true"), "model.pretrained=true: tinycnn has no pre-trained weights"),
        (("model.freeze=true",), "model.freeze=true: the frozen weights would be random"),
        (("model.freeze=true", "model.weights=x", "mode=bt"), "model.freeze=true: mode=bt trains the backbone"),
        (("model=resnet18", "model.weights=x", "model.pretrained=true"), "only one may be set"),
        ((*TIMM, "+model.options.pretrained=true"), "model.options.pretrained=True: not allowed. Fix: model.pre"),
    ):
        with pytest.raises(UserError) as error:
            validate(configuration(*overrides))
        assert problem in str(error.value)


def test_torchvision_s_weights_come_from_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (cache := tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    config = model_config(*RESNET, "model.pretrained=true")
    state = copied(built(config, 1000, seed=1, channels=3))
    torch.save(state, cache / "resnet18-f37072fd.pth")
    network = built(config, 7, channels=3)
    said: list[str] = []
    load_weights(config, network, tuple("abcdefg"), 3, said.append)
    found = network.state_dict()
    assert {name for name in found if not torch.equal(found[name], state[name])} == {"fc.weight", "fc.bias"}
    assert said == [
        "model.pretrained=true: model.name=resnet18: loaded 120 tensors; the head (fc.weight, fc.bias) starts anew"
    ]
    with pytest.raises(UserError, match=r"conv1.weight has the shape \[64, 3, 7, 7\] instead of \[64, 1, 7, 7\]"):
        load_weights(config, built(config, 7), tuple("abcdefg"), 1, said.append)


def test_timm_s_weights_come_from_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config = model_config(*TIMM, "model.pretrained=true")
    state = copied(built(config, 1000, seed=1, channels=3))
    commit, repository = "0123456789abcdef0123456789abcdef01234567", tmp_path / "models--timm--resnet10t.c3_in1k"
    for folder in (snapshot := repository / "snapshots" / commit, repository / "refs"):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, snapshot / "model.safetensors")
    network = built(config, 7)
    load_weights(config, network, tuple("abcdefg"), 1, print)
    found = network.state_dict()
    adapted = "conv1.0.weight"  # timm sums it over the three colours
    torch.testing.assert_close(found[adapted], state[adapted].sum(1, keepdim=True))
    assert {n for n in found if not torch.equal(found[n], state[n])} == {"fc.weight", "fc.bias", adapted}


@pytest.mark.parametrize(
    ("overrides", "cache"), [(RESNET, "TORCH_HOME"), (TIMM, "HF_HOME")], ids=["torchvision", "timm"]
)
def test_weights_without_a_network_are_one_sentence(
    overrides: tuple[str, ...], cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # a closed port
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config = model_config(*overrides, "model.pretrained=true")
    with pytest.raises(UserError) as error:
        load_weights(config, built(config, 7, channels=3), tuple("abcdefg"), 3, print)
    message = str(error.value)
    assert message.startswith(f"model.pretrained=true: model.name={config.name}: the weights can't be loaded (")
    assert f"start it once on a machine with a network; or copy the cache in {cache} (" in message
    assert "\n" not in message
