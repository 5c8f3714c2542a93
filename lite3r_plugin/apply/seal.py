"""The two files of a checkpoint: whether each is what was written, and whether they were written together.

The record is a JSON object. It stands in a file of its own, and once more in the metadata of the weights; it holds a checksum of each
tensor. So no bit of either file can change unseen, and the files of two saves do not fit each other.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from ..errors import CheckpointError, short
from ..files import locked
from ..version import __version__

WEIGHTS_NAME = "lite3r.safetensors"
CONFIG_NAME = "lite3r_config.json"
METADATA_KEY = "lite3r"
FORMAT_VERSION = 1
MAX_RECORD_BYTES = 64 * 2**20
AGAIN = "save it again with save_lite3r"

_TYPES: dict[str, type] = {
    "model": str,
    "adapter": str,
    "config": dict,
    "sites": dict,
    "fp8": dict,
    "fp8_biases": list,
    "tensors": dict,
    "whole": bool,
    "changed": list,
}


def seals(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """dtype, shape and SHA-256 of the bytes of each tensor, which are of any dtype and on any device."""
    return {name: _seal(tensor) for name, tensor in tensors.items()}


def metadata_of(record: Mapping[str, Any]) -> dict[str, str]:
    """What ties the weights to `record`: the metadata of their file."""
    return {METADATA_KEY: same_text(record)}


def same_text(value: Any) -> str:
    """JSON that is equal for equal values of equal types: 1, 1.0 and true are three."""
    return json.dumps(value, sort_keys=True)


def fingerprint(directory: Path) -> str:
    """SHA-256 of the record of a checkpoint, which holds checksums of its tensors: equal for equal checkpoints, and for no others.

    Raises:
        CheckpointError: there is no record, or it cannot be read.
    """
    try:
        return hashlib.sha256((directory / CONFIG_NAME).read_bytes()).hexdigest()
    except OSError as error:
        raise CheckpointError(f"{directory} holds no {CONFIG_NAME} that can be read: {short(error)}") from error


def holds_dense_model(directory: Path) -> bool:
    """Whether a model that took this checkpoint, which was read before, has the weights of the dense model in it as they were."""
    record = json.loads(_read_text(directory / CONFIG_NAME))
    return not record["whole"] and not record["fp8"]


def read_sealed(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The record, its fields of the right types, and the tensors, which lie in the file, not in memory of their own.

    Raises:
        CheckpointError: a file is missing, damaged or of another version, or the two are of two saves.
    """
    for name, other in ((CONFIG_NAME, WEIGHTS_NAME), (WEIGHTS_NAME, CONFIG_NAME)):
        if not (directory / name).is_file():
            alone = f": of {other} alone docs/checkpoints.md says what can be done" if (directory / other).is_file() else ""
            raise CheckpointError(f"{directory} holds no {name}; load_lite3r takes a directory written by save_lite3r{alone}")
    try:
        with locked(directory, shared=True):
            text, (metadata, tensors) = _read_text(directory / CONFIG_NAME), _read_tensors(directory / WEIGHTS_NAME)
        record = json.loads(text)
        text, tied = same_text(record), metadata and same_text(json.loads(metadata))
    except (ValueError, RecursionError) as error:  # no text, no JSON, or numbers and nesting beyond reason
        raise CheckpointError(f"{directory} is damaged: {short(error)}; {AGAIN}") from error
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be read: {short(error)}") from error
    _check_fields(record, directory / CONFIG_NAME)
    if tied is None:
        raise CheckpointError(f"{directory / WEIGHTS_NAME} is damaged, or not of save_lite3r: it does not say what it holds; {AGAIN}")
    if tied != text:
        raise CheckpointError(_two_saves(directory, json.loads(tied), tensors))
    if problem := broken(record["tensors"], tensors):
        raise CheckpointError(f"{directory / WEIGHTS_NAME} is damaged or was changed: {problem}; {AGAIN}")
    return record, tensors


def broken(expected: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str | None:
    """What tells that the tensors are not those whose `seals` are `expected`, or None."""
    if other := sorted(set(expected) ^ set(tensors)):
        return f"{other[0]!r} is missing, or extra"
    for name, tensor in tensors.items():
        if same_text(_seal(tensor)) != same_text(expected[name]):
            return f"{name!r} has another checksum, dtype or shape than was saved"
    return None


def _seal(tensor: Tensor) -> dict[str, Any]:
    # Its bytes as they lie in memory: numpy() shows them as well, but then nobody can resize that memory any more, as FSDP does.
    plain = tensor.detach().cpu().contiguous()
    data = (ctypes.c_ubyte * plain.nbytes).from_address(plain.data_ptr()) if plain.nbytes else b""
    return {"dtype": str(tensor.dtype), "shape": list(tensor.shape), "sha256": hashlib.sha256(data).hexdigest()}


def _two_saves(directory: Path, other: Any, tensors: Mapping[str, Tensor]) -> str:
    sealed = other.get("tensors") if isinstance(other, dict) else None
    problem = broken(sealed, tensors) if isinstance(sealed, dict) else "its metadata is no record"
    start = f"{CONFIG_NAME} and {WEIGHTS_NAME} in {directory} do not belong together"
    if problem:
        return f"{start}, and the weights are damaged: {problem}; {AGAIN}"
    return (
        f"{start}: a save was interrupted between them, they were copied from two saves, or the configuration was changed. {WEIGHTS_NAME} "
        f"is whole, and its metadata holds the configuration that it was saved with under {METADATA_KEY!r}: write that to {CONFIG_NAME} "
        f"(docs/checkpoints.md shows how), or {AGAIN}"
    )


def _read_text(path: Path) -> str:
    with path.open("rb") as file:
        data = file.read(MAX_RECORD_BYTES + 1)
    if len(data) > MAX_RECORD_BYTES:
        raise ValueError(f"{path.name} has more than {MAX_RECORD_BYTES} bytes")
    return data.decode("utf-8")


def _read_tensors(path: Path) -> tuple[str | None, dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get(METADATA_KEY), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except OSError:
        raise
    except Exception as error:  # of a damaged header also what is no SafetensorError
        raise ValueError(f"{path.name}: {short(error)}") from error


def _check_fields(record: Any, path: Path) -> None:
    version = record.get("format") if isinstance(record, dict) else None
    if type(version) is not int or version != FORMAT_VERSION:
        newer = type(version) is int and version > FORMAT_VERSION
        raise CheckpointError(
            f"{path} has the format version {repr(version)[:40]}, and lite3r-plugin {__version__} reads {FORMAT_VERSION}: "
            + ("install a newer release" if newer else f"it is damaged, or of another release; {AGAIN}")
        )
    if missing := set(_TYPES) - set(record):
        raise CheckpointError(f"{path} lacks {sorted(missing)}; {AGAIN}")
    for name, kind in _TYPES.items():
        if type(record[name]) is not kind:
            what = "JSON object" if kind is dict else {str: "text", list: "list", bool: "truth value"}[kind]
            raise CheckpointError(f"{path} is damaged: {name!r} is no {what}; {AGAIN}")
    shapes = record["fp8"].values()
    if not all(type(s) is list and len(s) == 2 and all(type(size) is int for size in s) for s in shapes):
        raise CheckpointError(f"{path} is damaged: 'fp8' holds something else than shapes of weights; {AGAIN}")
    for name in ("fp8_biases", "changed"):
        if not all(type(value) is str for value in record[name]):
            raise CheckpointError(f"{path} is damaged: {name!r} holds something else than names; {AGAIN}")
