"""What a killed run goes on from: one file with all that learned, whole or not there, and nothing of the frozen model."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..apply import ranks
from ..apply.seal import broken, seals
from ..errors import CheckpointError, InputError, short
from ..files import locked, replacing

STATE_NAME = "training.safetensors"
FORMAT_VERSION = 1
_KEY, _CHECKSUM = "lite3r_training", "sha256"


def check_folder(folder: Path, resume: bool) -> None:
    """Make `folder` if it is not there. Raises `InputError` unless it can be written, and is empty or to be gone on from."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        held = any(folder.iterdir())
    except OSError as error:
        raise InputError(f"the output folder {folder} cannot be used: {error.strerror}; choose another one") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InputError(f"the output folder {folder} is not writable; choose another one")
    if held and not resume:
        raise InputError(f"the output folder {folder} is not empty: pass resume=True to go on from what is in it, or choose another one")


def write_state(folder: Path, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Put `record` and `tensors` into one file in `folder`, which takes the place of the one from before when it is whole.

    Raises:
        CheckpointError: it cannot be written. What was there before is there still.
    """
    path = folder / STATE_NAME
    held = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    text = json.dumps({"format": FORMAT_VERSION, **record, "tensors": seals(held)})
    try:
        with locked(folder), replacing(path) as beside:
            save_file(held, beside, {_KEY: text, _CHECKSUM: _checksum(text)})
    except (OSError, SafetensorError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else short(error)
        before = f"that of step {step} is whole" if (step := saved_step(folder)) is not None else "there is none from before"
        raise CheckpointError(
            f"the training state of step {record['step']} cannot be written to {path}: {why}; {before}. The weights in memory are "
            f"those of step {record['step']}. Free space, then pass resume=True"
        ) from error


def read_state(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """What `write_state` wrote, or None where there is nothing.

    Raises:
        CheckpointError: the file is damaged, or of another version.
    """
    path = folder / STATE_NAME
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            text, checksum = metadata[_KEY], metadata.get(_CHECKSUM)
            record = json.loads(text)
            # Copied: what lies in the file lies at other places than what a run makes, and products round by the place of their operands.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # of a damaged header also what is no SafetensorError
        raise CheckpointError(f"{path} is damaged, or no training state ({short(error)}): start anew in another folder") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT_VERSION:
        raise CheckpointError(f"{path} is of another version of lite3r_plugin: go on with that one, or start anew in another folder")
    problem = "its record has another checksum than was saved" if checksum != _checksum(text) else broken(record.pop("tensors"), tensors)
    if problem:
        raise CheckpointError(f"{path} is damaged: {problem}; start anew in another folder")
    return record, tensors


def _checksum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def saved_step(folder: Path) -> int | None:
    """The step that the state in `folder` is of, or None where there is none that can be read."""
    try:
        with safe_open(folder / STATE_NAME, "pt") as file:
            return int(json.loads((file.metadata() or {})[_KEY])["step"])
    except (OSError, SafetensorError, KeyError, ValueError, TypeError):
        return None


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[Any, str]) -> dict[str, Tensor]:
    """What `optimizer` remembers of parameters, by kind and name; tensors as they are."""
    return {
        f"{kind}/{names[parameter]}": value
        for parameter, kept in optimizer.state.items()
        for kind, value in kept.items()
        if isinstance(value, Tensor)
    }


def fill_optimizer(optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Let `optimizer` remember what `optimizer_tensors` gave, whole tensors on the CPU."""
    for key, value in tensors.items():
        kind, _, name = key.partition("/")
        parameter = parameters[name]
        optimizer.state[parameter][kind] = value if value.dim() == 0 else like(parameter, value)


def like(parameter: Tensor, value: Tensor) -> Tensor:
    """The whole tensor `value` on the device of `parameter`, and sharded as that is."""
    value = value.to(parameter.device)
    if ranks.is_shard(parameter):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(value, parameter.device_mesh, parameter.placements)  # pyright: ignore[reportAttributeAccessIssue]
    return value
