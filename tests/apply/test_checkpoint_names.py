"""Wrappers around a model or its parts leave no trace in a checkpoint: what is saved from inside of one loads without it, and back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import JSON, snapshot
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from toys import Toy, images, toy_adapter

from lite3r_plugin import apply_lite3r, describe, load_lite3r, save_lite3r
from lite3r_plugin.apply.lookup import lite3r_modules
from lite3r_plugin.config import Lite3RConfig, matches, plain_name
from lite3r_plugin.errors import CheckpointError
from lite3r_plugin.testing import TEST_CONFIG

__all__ = ["toy_adapter"]  # the fixture
pytestmark = pytest.mark.usefixtures("adapter")


class Fsdp(nn.Module):
    """Named as FSDP names what is inside."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self._fsdp_wrapped_module = inside

    def forward(self, *args: Any) -> Any:
        return self._fsdp_wrapped_module(*args)


def parts(toy: Toy) -> nn.Module:
    """Each attention in a wrapper of its own, as for activation checkpointing."""
    for modules in (toy.frame, toy.cross):
        for i, module in enumerate(modules):
            modules[i] = checkpoint_wrapper(module)
    return toy


WRAPS: dict[str, Callable[[Toy], nn.Module]] = {
    "none": lambda toy: toy,
    "DataParallel": lambda toy: nn.DataParallel(toy),
    "compile": lambda toy: torch.compile(toy, backend="eager"),  # pyright: ignore[reportReturnType]
    "both": lambda toy: nn.DataParallel(torch.compile(toy, backend="eager")),  # pyright: ignore[reportArgumentType]
    "FSDP": Fsdp,
    "parts": parts,
}


def dense() -> Toy:
    torch.manual_seed(0)
    return Toy().eval()


def branches(model: nn.Module) -> nn.Module:
    for module in lite3r_modules(model).values():
        if module.sparse:
            nn.init.normal_(module.proj_lin.weight)
    return model


@pytest.mark.parametrize("target", WRAPS)
@pytest.mark.parametrize("source", WRAPS)
@pytest.mark.parametrize("precision", ["full", "fp8"])
def test_a_checkpoint_knows_no_wrapper(precision: Any, source: str, target: str, tmp_path: Path) -> None:
    model = branches(apply_lite3r(dense(), TEST_CONFIG, precision=precision, keep_ratio={"cross.1": 0.7, "cross.*": 0.3}))
    save_lite3r(WRAPS[source](model), tmp_path, whole=True)  # pyright: ignore[reportArgumentType]
    names = " ".join((*load_file(tmp_path / "lite3r.safetensors"), (tmp_path / JSON).read_text()))
    assert "module" not in names
    assert "_orig_mod" not in names
    assert "_wrapped" not in names
    other = WRAPS[target](Toy().eval())
    assert load_lite3r(other, tmp_path) is other
    ratios = {plain_name(site.fqn): site.keep_ratio for site in describe(other).sites if site.sparse}
    assert ratios == {"cross.0": 0.3, "cross.1": 0.7}
    own = {plain_name(name): tensor for name, tensor in other.state_dict().items()}
    for name, tensor in model.state_dict().items():
        assert torch.equal(own[plain_name(name)].double(), tensor.double()), name


@pytest.mark.parametrize(
    ("keep_ratio", "stored"),
    [
        ({"*.1": 0.7, "*": 0.3}, {"*.1": 0.7, "*": 0.3}),
        ({"cross.1": 0.7, "*": 0.3}, {"cross.1": 0.7, "*": 0.3}),
        ({"module.cross.1": 0.7}, {"cross.1": 0.7}),
        ({"module.cross.1": 0.7, "cross.1": 0.2, "*.0": 0.3}, {"cross.1": 0.7, "*.0": 0.3}),
        ({"mod*.1": 0.7, "*": 0.3}, {"cross.0": 0.3, "cross.1": 0.7}),
    ],
)
def test_patterns_that_were_given_to_a_wrapped_model(keep_ratio: Any, stored: dict[str, float], tmp_path: Path) -> None:
    """They stay where they say the same of plain names."""
    model = apply_lite3r(nn.DataParallel(dense()), TEST_CONFIG, keep_ratio=keep_ratio)
    ratios = {plain_name(site.fqn): site.keep_ratio for site in describe(model).sites}
    save_lite3r(model, tmp_path)
    assert list(json.loads((tmp_path / JSON).read_text())["config"]["keep_ratio"].items()) == list(stored.items())
    for target in WRAPS.values():
        loaded = load_lite3r(target(dense()), tmp_path)
        assert {plain_name(site.fqn): site.keep_ratio for site in describe(loaded).sites} == ratios


@pytest.mark.parametrize(
    ("fp8_filter", "stored"),
    [
        (("*.qkv",), ["*.qkv"]),
        (("module.frame.*", "*.proj"), ["frame.*", "*.proj"]),
        (("mod*frame.0.qkv",), ["frame.0.qkv"]),
        (lambda module, fqn: fqn == "module.cross.1.qkv", ["cross.1.qkv"]),
    ],
)
@pytest.mark.parametrize("precision", ["fp8", "fp8_qat"])
def test_filters_that_were_given_to_a_wrapped_model(precision: Any, fp8_filter: Any, stored: list[str], tmp_path: Path) -> None:
    model = apply_lite3r(nn.DataParallel(dense()), TEST_CONFIG, precision=precision, fp8_filter=fp8_filter)
    save_lite3r(model, tmp_path)
    assert json.loads((tmp_path / JSON).read_text())["config"]["fp8_filter"] == stored
    for target in ("none", "DataParallel", "parts"):
        assert describe(load_lite3r(WRAPS[target](dense()), tmp_path)).linears == describe(model).linears


def test_a_part_that_was_given_to_apply_and_the_whole_to_save(tmp_path: Path) -> None:
    """Patterns were of names inside the part."""

    def whole() -> nn.ModuleDict:
        return nn.ModuleDict({"backbone": dense()})

    model = whole()
    branches(apply_lite3r(model["backbone"], TEST_CONFIG, keep_ratio={"cross.1": 0.7, "*": 0.3}))
    save_lite3r(model, tmp_path)
    loaded = load_lite3r(whole(), tmp_path)
    assert torch.equal(loaded["backbone"](images()), model["backbone"](images()))


def test_two_modules_that_become_one_name(tmp_path: Path) -> None:
    def ambiguous() -> Toy:
        toy = dense()
        toy.module = nn.ModuleDict({"head": nn.Linear(2, 2)})
        return toy

    model = apply_lite3r(ambiguous(), TEST_CONFIG)
    with pytest.raises(CheckpointError, match=r"'head\.weight' and 'module\.head\.weight' are both 'head\.weight' without the names"):
        save_lite3r(model, tmp_path, whole=True)
    save_lite3r(model, tmp_path)  # it is not among the branches
    load_lite3r(ambiguous(), tmp_path)
    save_lite3r(apply_lite3r(dense(), TEST_CONFIG), tmp_path, whole=True)
    other = ambiguous()
    before = snapshot(other)
    with pytest.raises(CheckpointError, match=r"are both 'head\.weight'"):
        load_lite3r(other, tmp_path)
    assert snapshot(other) == before


@pytest.mark.parametrize(
    ("fqn", "plain"),
    [
        ("module.blocks.0", "blocks.0"),
        ("module._orig_mod.blocks.0._checkpoint_wrapped_module.attn", "blocks.0.attn"),
        ("module", ""),
        ("modules.0._fsdp_wrapped_module.x", "modules.0.x"),
        ("my_module.module_list", "my_module.module_list"),
    ],
)
def test_plain_names(fqn: str, plain: str) -> None:
    assert plain_name(fqn) == plain
    assert matches(plain, fqn)
    assert matches(fqn, fqn)


def test_patterns_take_wrapped_models_as_they_take_plain_ones() -> None:
    config = Lite3RConfig(keep_ratio={"blocks.0.attn": 0.5, "*": 0.1})
    assert config.keep_ratio_of("module._orig_mod.blocks.0.attn") == 0.5
    assert config.keep_ratio_of("module.blocks.1.attn") == 0.1
