"""The words and ranges that options of the operators take."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

from ..errors import ConfigError, shown

Backend = Literal["auto", "triton", "naive"]
FeatureMap = Literal["softmax", "elu"]
BlockChoice = Literal["mean", "error"]
ConfigBlockChoice = Literal["auto", "mean", "error"]
LinearBranch = Literal["all", "marginal", "none"]


def check_ratio(name: str, value: Any) -> None:
    """Raise `ConfigError` unless `value` is a ratio in (0, 1]."""
    if not is_number(value) or not 0 < value <= 1:
        raise ConfigError(f"{name} must be in (0, 1], got {shown(value)}; 0.1 keeps a tenth of the key blocks, 1 is dense")


def check_share(name: str, value: Any) -> None:
    """Raise `ConfigError` unless `value` is a share in [0, 1]."""
    if not is_number(value) or not 0 <= value <= 1:
        raise ConfigError(f"{name} must be in [0, 1], got {shown(value)}; 0.1 leaves out the last tenth of the key blocks")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise `ConfigError` unless `value` is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise ConfigError(f"{name} must be one of {choices}, got {shown(value)}")


def check_block_choice(choice: Any, block_means: bool, negligible_ratio: float) -> None:
    """Raise `ConfigError` unless key blocks can be chosen by `choice` where these are the other options."""
    check_choice("block_choice", choice, get_args(BlockChoice))
    if choice == "error" and not block_means:
        raise ConfigError('block_choice="error" keeps the blocks that their means would stand for worst: it needs block_means=True')
    if choice == "error" and negligible_ratio:
        raise ConfigError(
            f'block_choice="error" says nothing of which blocks count for little, and negligible_ratio is {shown(negligible_ratio)}: leave '
            'it at 0, or take block_choice="mean"'
        )


def check_rope_base(value: Any) -> None:
    """Raise `ConfigError` unless `value` can be the base of rotary frequencies, or is None."""
    if value is not None and (not is_number(value) or not 0 < value < math.inf):
        raise ConfigError(f"rope_base is a positive number, got {shown(value)}; 100 is usual")


def is_number(value: Any) -> bool:
    """Whether `value` is a plain number, which NaN and infinities are too."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_int(value: Any) -> bool:
    """Whether `value` is a plain integer."""
    return isinstance(value, int) and not isinstance(value, bool)
