"""Save and load what Lite3R adds to a model: the linear branches in safetensors and a versioned JSON configuration."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .apply import apply_lite3r, lite3r_modules, remove_lite3r, require_lite3r
from .config import Lite3RConfig
from .errors import CheckpointError, ConfigError, NoSitesError
from .files import replacing

Model = TypeVar("Model", bound=nn.Module)

WEIGHTS_NAME = "lite3r.safetensors"
CONFIG_NAME = "lite3r_config.json"
FORMAT_VERSION = 1


def save_lite3r(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Write the configuration and the linear branches of `model` to `directory`, each file atomically.

    Raises:
        NotAppliedError: the model carries no Lite3R.
    """
    modules = require_lite3r(model)
    state = next(iter(modules.values())).state
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    record = {
        "format": FORMAT_VERSION,
        "adapter": state.adapter,
        "config": state.config.to_dict(),
        "sites": {fqn: {"head_dim": m.site.head_dim, "sparse": m.sparse} for fqn, m in modules.items()},
    }
    with replacing(directory / WEIGHTS_NAME) as path:
        save_file(_branches(model), path)
    with replacing(directory / CONFIG_NAME) as path:
        path.write_text(json.dumps(record, indent=2) + "\n")


def load_lite3r(model: Model, directory: str | os.PathLike[str]) -> Model:
    """Apply the stored configuration to the dense `model` and load the linear branches, in place.

    Everything is checked before the model keeps any change: after an error it is the dense model again.

    Raises:
        CheckpointError: files are missing or damaged, of another version, or belong to another model.
        AlreadyAppliedError: the model carries Lite3R already.
        UnknownModelError: no adapter knows the model.
    """
    directory = Path(directory)
    record, weights = _read(directory)
    try:
        apply_lite3r(model, Lite3RConfig.from_dict(record["config"]))
    except (ConfigError, NoSitesError) as error:
        raise CheckpointError(f"{directory / CONFIG_NAME} does not fit this {type(model).__name__}: {error}") from error
    try:
        _check(model, record, weights, directory)
    except CheckpointError:
        remove_lite3r(model)
        raise
    model.load_state_dict(weights, strict=False)
    return model


def _branches(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{fqn}.proj_lin.weight": module.proj_lin.weight.detach().contiguous()
        for fqn, module in lite3r_modules(model).items()
        if "proj_lin" in module._modules
    }


def _read(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (directory / name).is_file():
            raise CheckpointError(f"{directory} holds no {name}; load_lite3r takes a directory written by save_lite3r")
    try:
        record = json.loads((directory / CONFIG_NAME).read_text())
        weights = load_file(directory / WEIGHTS_NAME)
    except (json.JSONDecodeError, UnicodeDecodeError, SafetensorError) as error:
        raise CheckpointError(f"{directory} is damaged: {error}; save it again with save_lite3r") from error
    version = record.get("format") if isinstance(record, dict) else None
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{directory / CONFIG_NAME} has format {version!r}, this release reads {FORMAT_VERSION}")
    if missing := {"adapter", "config", "sites"} - set(record):
        raise CheckpointError(f"{directory / CONFIG_NAME} lacks {sorted(missing)}; save it again with save_lite3r")
    if wrong := [name for name in ("config", "sites") if not isinstance(record[name], dict)]:
        raise CheckpointError(f"{directory / CONFIG_NAME} is damaged: {wrong[0]!r} is no JSON object; save it again with save_lite3r")
    return record, weights


def _check(model: nn.Module, record: dict[str, Any], weights: dict[str, Tensor], directory: Path) -> None:
    modules = lite3r_modules(model)
    found = {fqn: {"head_dim": m.site.head_dim, "sparse": m.sparse} for fqn, m in modules.items()}
    if found != record["sites"]:
        other = sorted(set(record["sites"]) ^ set(found)) or sorted(f for f in found if found[f] != record["sites"][f])
        raise CheckpointError(
            f"{directory} belongs to another model: it was saved for {len(record['sites'])} sites of adapter {record['adapter']!r}, this "
            f"{type(model).__name__} has {len(found)}; the first that differs is {other[0]!r}"
        )
    expected = {name: tuple(tensor.shape) for name, tensor in _branches(model).items()}
    stored = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    if expected != stored:
        other = sorted(dict(expected.items() ^ stored.items()))
        raise CheckpointError(
            f"{directory / WEIGHTS_NAME} does not fit its configuration: {other[0]!r} is missing, extra or of another shape"
        )
