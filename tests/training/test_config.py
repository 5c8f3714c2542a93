"""`DistillConfig`: wrong values are refused with what is right; files say the same."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from lite3r_plugin import DistillConfig
from lite3r_plugin.errors import ConfigError
from lite3r_plugin.training.config import DistillFields


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"trainable": "lora"}, "trainable must be one of .*'proj\\+lora'"),
        ({"mode": "global"}, "mode must be one of"),
        ({"attention_loss": "l1"}, "attention_loss must be one of"),
        ({"schedule": None}, "schedule must be one of"),
        ({"mixed_precision": "fp16"}, "mixed_precision must be one of"),
        ({"lora_scopes": "global"}, "lora_scopes is a tuple"),
        ({"lora_scopes": ("all",)}, "lora_scopes must be one of"),
        ({"trackers": ("wandb",), "output_dir": "x"}, "trackers must be one of"),
        ({"blocks": -1.0}, "blocks is the weight of a loss"),
        ({"blocks": (1.0, 2.0, 3.0)}, "blocks is the weight of a loss"),
        ({"blocks": (1.0,)}, "blocks is the weight of a loss"),
        ({"task": math.inf}, "task is the weight of a loss"),
        ({"task": True}, "task is the weight of a loss"),
        ({"blocks": 0, "cameras": 0.0, "predictions": (0, 0)}, "every loss has the weight 0"),
        ({"mode": "local", "blocks": 0, "cameras": 0}, "give attention, blocks or cameras a weight"),
        ({"steps": 0}, "steps is an integer >= 1"),
        ({"steps": 1.5}, "steps is an integer >= 1"),
        ({"accumulate": True}, "accumulate is an integer >= 1"),
        ({"lora_rank": 0}, "lora_rank is an integer"),
        ({"seed": -1}, "seed is an integer >= 0"),
        ({"seed": 2**70}, "seed is at most 2"),
        ({"warmup_steps": -1}, "warmup_steps is an integer >= 0"),
        ({"learning_rate": 0}, "learning_rate is a number > 0, got 0"),
        ({"learning_rate": None}, "learning_rate is a number > 0, got None"),
        ({"learning_rate": math.nan}, "learning_rate is a number > 0"),
        ({"ema": 1.0}, "ema is a number > 0 and < 1 or None"),
        ({"clip": 0}, "clip is a number > 0 or None"),
        ({"minutes": 0}, "minutes is a number > 0"),
        ({"final_learning_rate": 1.1}, "final_learning_rate is a number >= 0 and <= 1"),
        ({"weight_decay": math.inf}, "weight_decay is a number >= 0"),
        ({"checkpointing": 1}, "checkpointing is True or False"),
        ({"steps": 3, "minutes": 1}, "one of steps, epochs and minutes says, got steps=3 and minutes=1"),
        ({"resume": True}, "resume need output_dir"),
        ({"trackers": ("jsonl",), "save_every": 3}, "trackers and save_every need output_dir"),
        ({"output_dir": 3}, "output_dir is the name of a folder"),
        ({"stepps": 3}, r"unknown field\(s\) of DistillConfig \['stepps'\]; known are \['trainable'"),
    ],
)
def test_wrong_values_are_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        DistillConfig().replace(**fields)


def test_every_field_is_explained() -> None:
    names = [field.name for field in dataclasses.fields(DistillConfig)]
    text = DistillConfig.__doc__ or ""
    assert [name for name in names if f" {name}" not in text] == []


def test_weights_are_pairs() -> None:
    config = DistillConfig(attention=[0.1, 0.01], blocks=2)  # pyright: ignore[reportArgumentType]
    assert config.weight("attention") == (0.1, 0.01)
    assert config.weight("blocks") == (2, 2)


def test_dicts_are_read_back() -> None:
    config = DistillConfig(attention=(0.1, 0.01), output_dir="x", trackers=("jsonl",))
    assert DistillConfig().replace(**config.to_dict()) == config


def test_the_published_recipe() -> None:
    config = DistillConfig.published()
    assert (config.trainable, config.attention, config.task, config.epochs, config.warmup_steps) == ("proj", (0.1, 0.01), 1.0, 1, 30)
    assert DistillConfig.published(steps=9).epochs is None


def test_files_are_read(tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    file.write_text('steps = 20\nattention = [0.1, 0.01]\ntrainable = "proj"\n')
    assert DistillConfig.from_toml(file) == DistillConfig(steps=20, attention=(0.1, 0.01), trainable="proj")
    file.write_text("[model]\nname = 'x'\n[distill]\nsteps = 20\n")
    assert DistillConfig.from_toml(file, steps=30) == DistillConfig(steps=30)
    file.write_text("[model]\nname = 'x'\n")
    assert DistillConfig.from_toml(file) == DistillConfig()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("steps = ", "is no TOML"),
        ("stepps = 3", "stepps"),
        ("[distill]\nsteps = 'x'", "steps is an integer"),
        ("distill = 3\n[model]", "distill is a table"),
        (None, "cannot be read"),
    ],
)
def test_wrong_files_are_named(text: str | None, says: str, tmp_path: Path) -> None:
    file = tmp_path / "config.toml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=f"config.toml.*{says}"):
        DistillConfig.from_toml(file)


def test_keywords_are_the_fields_with_their_types() -> None:
    kinds = {name: kind.__forward_arg__ for name, kind in DistillFields.__annotations__.items()}
    assert kinds == {field.name: field.type for field in dataclasses.fields(DistillConfig)}
