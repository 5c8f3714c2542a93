"""Checkpoints that lie: edited, with checksums that match."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

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
