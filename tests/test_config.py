"""Lite3RConfig: defaults, validation with messages, JSON round trip."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lite3r_plugin import Lite3RConfig
from lite3r_plugin.config import WHOLE_MODEL_FIELDS, Lite3RFields, WholeModel, WholeModelFields
from lite3r_plugin.errors import ConfigError, Lite3RError


class Unhashable:
    """A filter that can change: no part of a frozen configuration."""

    __hash__ = None  # type: ignore[assignment]

    def __call__(self, module: nn.Module, fqn: str) -> bool:
        return True


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"keep_ratio": 0}, "keep_ratio must be in (0, 1], got 0"),
        ({"keep_ratio": 1.01}, "got 1.01"),
        ({"keep_ratio": float("nan")}, "got nan"),
        ({"keep_ratio": True}, "got True"),
        ({"keep_ratio": "0.5"}, "got '0.5'"),
        ({"keep_ratio": "a.json"}, "keep_ratio must be in (0, 1], or 'auto', or what KeepRatioProfile.load(file) gives, got 'a.json'"),
        ({"keep_ratio": Path("a.json")}, "or what KeepRatioProfile.load(file) gives, got"),
        ({"keep_ratio": {"a.b": 2}}, "keep_ratio['a.b'] must be in (0, 1], got 2"),
        ({"keep_ratio": {1: 0.1}}, "maps patterns of site names to ratios, got the pattern 1"),
        ({"keep_ratio": {}}, "keep_ratio is an empty mapping"),
        ({"keep_ratio": [0.1]}, "keep_ratio must be in (0, 1], got [0.1]"),
        ({"negligible_ratio": -0.1}, "negligible_ratio must be in [0, 1], got -0.1"),
        ({"negligible_ratio": 1.5}, "got 1.5"),
        ({"negligible_ratio": float("nan")}, "got nan"),
        ({"negligible_ratio": False}, "got False"),
        ({"negligible_ratio": None}, "got None"),
        ({"scopes": "global"}, "scopes is 'auto' or a tuple"),
        ({"scopes": ()}, "scopes is 'auto' or a tuple"),
        ({"scopes": ("global", "cross")}, "scopes must be one of ('global', 'frame', 'encoder', 'camera'), got 'cross'"),
        ({"linear_branch": "some"}, "linear_branch must be one of ('all', 'marginal', 'none'), got 'some'"),
        ({"feature_map": "relu"}, "feature_map must be one of"),
        ({"attention_backend": "cuda"}, "attention_backend must be one of"),
        ({"block_means": 1}, "block_means is True or False, got 1"),
        ({"block_choice": "means"}, "block_choice must be one of"),
        ({"block_choice": "error", "block_means": False}, "needs block_means=True"),
        ({"block_choice": "error", "negligible_ratio": 0.1}, "negligible_ratio is 0.1: leave it at 0"),
        ({"pin": True}, "pin must be one of ('none', 'special', 'reference_keys', 'reference'), got True"),
        ({"fp8_filter": (1,)}, "fp8_filter holds patterns of names of Linears"),
        ({"fp8_filter": 3}, 'fp8_filter is a tuple of patterns, "inner" or a function'),
        ({"fp8_filter": "*.mlp.*"}, 'fp8_filter is a tuple of patterns, "inner" or a function'),
        ({"preset": "fastest"}, "preset must be one of ('fast', 'small'), got 'fastest'"),
        ({"weights": "fp16"}, "weights must be one of ('host', 'bf16', 'bf16_everywhere'), got 'fp16'"),
        ({"weights": True}, "weights must be one of"),
        ({"dense_attention": "cudnn"}, "dense_attention must be one of ('host', 'fastest'), got 'cudnn'"),
        ({"compile_blocks": 1}, "compile_blocks is True, False or None (as the preset has it), got 1"),
        ({"cuda_graphs": "yes"}, "cuda_graphs is True, False or None"),
        ({"keep_originals": None}, "keep_originals is True or False, got None"),
        ({"graph_shapes": 0}, "graph_shapes is a number from 1 to 1000, got 0"),
        ({"graph_shapes": 10**5000}, "graph_shapes is a number from 1 to 1000"),
        ({"preset": "fast", "precision": "fp8_qat"}, 'precision="fp8_qat" trains, for which weights in BF16 are too coarse'),
        ({"dense_below": -1}, "dense_below is a number of tokens >= 0 or None, got -1"),
        ({"dense_below": 1.5}, "got 1.5"),
        ({"block_q": 100}, "block_q is a power of two from 16 to 128, got 100"),
        ({"block_k": 8}, "block_k is a power of two from 16 to 128, got 8"),
        ({"block_q": 256}, "got 256"),
        ({"dense_below": 2**63}, "dense_below is a number of tokens >= 0 or None, got 9223372036854775808"),
        ({"dense_below": 10**5000}, "dense_below is a number of tokens >= 0 or None, got int that cannot be printed"),
        ({"keep_ratio": 10**5000}, "keep_ratio must be in (0, 1], got int that cannot be printed"),
        ({"keep_ratio": {"a": -(10**5000)}}, "keep_ratio['a'] must be in (0, 1]"),
        ({"keep_ratio": np.array([0.5, 0.5])}, "keep_ratio must be in (0, 1], got array([0.5, 0.5])"),
        ({"keep_ratio": torch.tensor(0.5)}, "keep_ratio must be in (0, 1], got tensor(0.5000)"),
        ({"negligible_ratio": np.zeros(3)}, "negligible_ratio must be in"),
        ({"scopes": np.array(["global", "frame"])}, "scopes is 'auto' or a tuple"),
        ({"scopes": (["global"],)}, "scopes must be one of"),
        ({"scopes": ("global", "global")}, "scopes names a scope twice, got ('global', 'global')"),
        ({"pin": np.array(["none", "special"])}, "pin must be one of"),
        ({"linear_branch": torch.ones(2)}, "linear_branch must be one of"),
        ({"feature_map": ["elu"]}, "feature_map must be one of"),
        ({"fuse": np.bool_(True)}, "fuse is True or False"),
        ({"block_q": 10**5000}, "block_q is a power of two from 16 to 128"),
        ({"block_k": np.ones(2)}, "block_k is a power of two from 16 to 128"),
        ({"fp8_filter": np.array(["*"])}, 'fp8_filter is a tuple of patterns, "inner" or a function'),
        ({"fp8_filter": Unhashable()}, 'fp8_filter is a tuple of patterns, "inner" or a function'),
        ({"preset": np.zeros(2)}, "preset must be one of"),
        ({"keep_ratio": "x" * 10_000}, "x..."),
        ({"block_q": 32, "block_k": 64}, "block_q must be a multiple of block_k, got 32 and 64"),
    ],
)
def test_wrong_values_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        Lite3RConfig(**fields)


def test_fields_come_on_top_of_a_preset() -> None:
    assert Lite3RConfig().whole_model == WholeModel("host", False, "host", False)
    fast = Lite3RConfig(preset="fast")
    assert fast.whole_model == WholeModel("bf16", True, "fastest", True)
    assert fast.replace(cuda_graphs=False, weights="host").whole_model == WholeModel("host", True, "fastest", False)
    assert Lite3RConfig(cuda_graphs=True).whole_model == WholeModel(cuda_graphs=True)
    assert fast.replace(preset=None).whole_model == WholeModel()
    assert Lite3RConfig.from_dict(fast.to_dict()) == fast


def test_blocks_are_chosen_by_error_where_they_can_be() -> None:
    assert Lite3RConfig().chosen_by == Lite3RConfig(block_choice="error").chosen_by == "error"
    for other in (Lite3RConfig(block_means=False), Lite3RConfig(negligible_ratio=0.1), Lite3RConfig(block_choice="mean")):
        assert other.chosen_by == "mean"
        assert other.settled == other.replace(block_choice="mean")
    assert Lite3RConfig().settled == Lite3RConfig(block_choice="error") != Lite3RConfig()
    assert Lite3RConfig.from_dict(Lite3RConfig().to_dict()).block_choice == "auto"


def test_a_config_error_is_a_value_error_too() -> None:
    assert issubclass(ConfigError, ValueError)
    assert issubclass(ConfigError, Lite3RError)


def test_replace_changes_fields_and_names_unknown_ones() -> None:
    config = Lite3RConfig()
    assert config.replace(keep_ratio=0.5) == Lite3RConfig(keep_ratio=0.5)
    assert config == Lite3RConfig()
    with pytest.raises(ConfigError, match=r"keep_rate.*keep_ratio"):
        config.replace(keep_rate=0.5)


def test_it_is_frozen_and_keeps_no_reference_to_what_it_was_given() -> None:
    ratios = {"a": 0.5}
    config = Lite3RConfig(keep_ratio=ratios, scopes=["frame"])  # type: ignore[arg-type]
    ratios["a"] = 7.0
    assert config.keep_ratio_of("a") == 0.5
    assert config.keep_ratio_of("b") == Lite3RConfig.keep_ratio
    assert hash(config) == hash(Lite3RConfig(keep_ratio={"a": 0.5}, scopes=("frame",)))
    assert config.scopes == ("frame",)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.keep_ratio = 0.5  # type: ignore[misc]


@pytest.mark.parametrize(
    "config",
    [
        Lite3RConfig(),
        Lite3RConfig(
            keep_ratio={"a.0": 0.3, "*": 0.1}, negligible_ratio=0.2, scopes=("global", "frame"), linear_branch="marginal",
            feature_map="elu", block_means=False, pin="special", dense_below=0, fuse=False,
            attention_backend="naive", block_q=64, block_k=32, fp8_filter=("*.mlp.*",),
        ),
    ],
)  # fmt: skip
def test_json_round_trip(config: Lite3RConfig) -> None:
    assert Lite3RConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_dicts_of_before_a_field_still_load() -> None:
    fields = Lite3RConfig(keep_ratio=0.1).to_dict()
    del fields["negligible_ratio"]
    assert Lite3RConfig.from_dict(fields) == Lite3RConfig(keep_ratio=0.1, negligible_ratio=0.0)


def test_every_field_is_in_the_dict() -> None:
    assert set(Lite3RConfig().to_dict()) == {f.name for f in dataclasses.fields(Lite3RConfig)} | {"version"}


@pytest.mark.parametrize(
    ("change", "message"),
    [({"version": 99}, "version 99 is not 1"), ({"version": None}, "version None"), ({"new": 1}, "new"), ({"keep_ratio": 3}, "keep_ratio")],
)
def test_foreign_dicts_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Lite3RConfig.from_dict(Lite3RConfig().to_dict() | change)


@pytest.mark.parametrize("fields", [[], None, {5: 1}, {("a",): 1}, {"version": True}, {"version": np.ones(2)}, {"version": 10**5000}])
def test_what_is_no_configuration_is_refused(fields: Any) -> None:
    with pytest.raises(ConfigError, match="configuration"):
        Lite3RConfig.from_dict(fields)


def test_numbers_of_numpy_become_plain() -> None:
    config = Lite3RConfig(keep_ratio={"a": np.float64(0.5)}, negligible_ratio=np.float64(0.25))
    assert type(config.keep_ratio_of("a")) is type(config.negligible_ratio) is float
    assert "np" not in repr(config)


def test_of_several_patterns_the_first_that_matches_counts() -> None:
    config = Lite3RConfig(keep_ratio={"blocks.0.*": 1.0, "blocks.*": 0.1, "blocks.1.attn": 0.5})
    assert [config.keep_ratio_of(f"{name}.attn") for name in ("blocks.0", "blocks.1", "frame.0")] == [1.0, 0.1, 0.25]
    assert config != Lite3RConfig(keep_ratio=dict(reversed(list(config.keep_ratio.items()))))  # type: ignore[union-attr]


def test_a_filter_is_patterns_or_a_function() -> None:
    module = nn.Linear(1, 1)
    assert Lite3RConfig(fp8_filter=("*",)).takes_fp8(module, "blocks.0.mlp.fc1")
    config = Lite3RConfig(fp8_filter=("*.mlp.*",))
    assert [config.takes_fp8(module, f"blocks.0.{name}") for name in ("mlp.fc1", "attn.qkv")] == [True, False]
    config = Lite3RConfig(fp8_filter=lambda module, fqn: module.in_features == 1 and fqn == "a")  # type: ignore[arg-type]
    assert [config.takes_fp8(module, name) for name in ("a", "b")] == [True, False]
    with pytest.raises(ConfigError, match="fp8_filter is a function, which no file can hold"):
        config.to_dict()


def test_keywords_are_the_fields_with_their_types() -> None:
    """As editors complete them; tests/typing/keywords.py has the rest."""
    kinds = {name: kind.__forward_arg__ for name, kind in Lite3RFields.__annotations__.items()}
    assert kinds == {field.name: field.type for field in dataclasses.fields(Lite3RConfig)}
    assert {field.name for field in dataclasses.fields(WholeModel)} < set(WholeModelFields.__annotations__) == WHOLE_MODEL_FIELDS
