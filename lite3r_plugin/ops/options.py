"""The words and ranges that options of the operators take."""

from __future__ import annotations

from typing import Any, Literal

from ..errors import ConfigError

Backend = Literal["auto", "triton", "naive"]
FeatureMap = Literal["softmax", "elu"]
LinearBranch = Literal["all", "marginal", "none"]


def check_ratio(name: str, value: Any) -> None:
    """Raise `ConfigError` unless `value` is a ratio in (0, 1]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise ConfigError(f"{name} must be in (0, 1], got {value!r}; 0.1 keeps a tenth of the key blocks, 1 is dense")


def check_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Raise `ConfigError` unless `value` is one of `choices`."""
    if value not in choices:
        raise ConfigError(f"{name} must be one of {choices}, got {value!r}")
