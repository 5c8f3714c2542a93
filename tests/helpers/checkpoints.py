"""Checkpoints that lie: edited, with checksums that match."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lite3r_plugin.apply.seal import metadata_of, seals

JSON, WEIGHTS = "lite3r_config.json", "lite3r.safetensors"


def edit(
    folder: Path, *, weights: Callable[[dict[str, Tensor]], Any] | None = None, record: Callable[[dict[str, Any]], Any] | None = None
) -> None:
    """Change the tensors or the record in place, and make the checksums right again."""
    fields, tensors = (
        json.loads((folder / JSON).read_text()),
        {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()},
    )
    if weights is not None:
        weights(tensors)
        fields["tensors"] = seals(tensors)
    if record is not None:
        record(fields)
    seal(folder, fields, tensors)


def seal(folder: Path, record: Any, tensors: dict[str, Tensor]) -> None:
    """Write both files, tied to each other."""
    save_file(tensors, folder / WEIGHTS, metadata_of(record))
    (folder / JSON).write_text(json.dumps(record))


def snapshot(model: nn.Module) -> tuple[Any, ...]:
    """All that loading might change: which modules, tables, hooks and tensors there are, what learns, and every value to the bit."""
    modules = {
        name: (id(module), {key: _frozen(value) for key, value in vars(module).items() if key in vars(nn.Module())})
        for name, module in model.named_modules(remove_duplicate=False)
    }
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}
    values = {name: None if t.is_meta else t.detach().contiguous().reshape(-1).view(torch.uint8).tolist() for name, t in tensors.items()}
    return modules, {name: (id(t), t.requires_grad, t.dtype) for name, t in tensors.items()}, values


def _frozen(value: Any) -> Any:
    if isinstance(value, dict):
        return id(value), [(key, id(item)) for key, item in value.items()]
    return frozenset(value) if isinstance(value, set) else value
