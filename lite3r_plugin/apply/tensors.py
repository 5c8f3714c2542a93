"""What a checkpoint holds of a model besides FP8 weights: which tensors can be written, and which a model takes."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..config import plain_name
from ..errors import CheckpointError, WeightsError
from ..wrapper import Changes
from .names import by_plain_name

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def writable(tensors: Mapping[str, Tensor], learned: set[str]) -> dict[str, Tensor]:
    """`tensors` as a safetensors file takes them: dense, each in memory of its own.

    Args:
        tensors: By name.
        learned: Names of those that must be finite: parameters.

    Raises:
        WeightsError: a tensor is on the meta device, or one of `learned` has infinities or NaN.
        CheckpointError: a tensor is of a kind that no file holds: sparse, or of a subclass.
    """
    seen: set[int] = set()
    made: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise WeightsError(f"{name} is on the meta device, perhaps with others, and has no values: load weights before save_lite3r")
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided:
            raise CheckpointError(
                f"{name} is a {type(tensor).__name__}, {tensor.layout}, which no checkpoint holds: make it a plain tensor"
            )
        if name in learned and not _is_finite(tensor):
            raise WeightsError(f"{name} has infinities or NaN: the model is broken, and load_lite3r would refuse it")
        tensor = tensor.detach().resolve_conj().resolve_neg()
        storage = tensor.untyped_storage().data_ptr()
        made[name] = tensor.clone(memory_format=torch.contiguous_format) if storage in seen else tensor.contiguous()
        seen.add(storage)
    return made


def check_values(name: str, tensor: Tensor, dtype: torch.dtype, learned: bool, where: str) -> None:
    """Raise `CheckpointError` unless `tensor` can become one of `dtype`: of the same kind, and finite there if it is `learned`."""
    if not (tensor.dtype == dtype or (tensor.dtype in _FLOATS and dtype in _FLOATS)):
        raise CheckpointError(f"{where} holds {name} as {tensor.dtype}, but in this model it is {dtype}; save it again with save_lite3r")
    if learned and not _is_finite(tensor.to(dtype)):
        raise CheckpointError(
            f"{where} is damaged or beyond the range of this model: {name} has infinities or NaN in {dtype}; save it again with save_lite3r"
        )


def fill_tensors(changes: Changes, model: nn.Module, tensors: Mapping[str, Tensor], device: torch.device, where: str) -> None:
    """Give parameters and buffers of `model` these values; those on the meta device are made on `device`.

    Until `changes` are final, the values from before are kept.

    Args:
        changes: Takes note of what is done.
        model: The model.
        tensors: Values by plain name (`by_plain_name`), of the right shapes.
        device: Where tensors of the meta device go.
        where: What the file is called in messages.

    Raises:
        CheckpointError: values are of another kind than those of the model, or not finite; nothing is changed yet.
    """
    places: dict[int, list[tuple[dict[str, Any], str]]] = {}  # a parameter may have several
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, value in table.items():
                places.setdefault(id(value), []).append((table, name))
    own = by_plain_name({name: tensor for name, tensor in named_tensors(model).items() if plain_name(name) in tensors})
    for name, tensor in tensors.items():
        check_values(name, tensor, own[name].dtype, isinstance(own[name], nn.Parameter), where)
    for name, tensor in tensors.items():
        old = own[name]
        if not old.is_meta and not _overlaps(old):
            changes.make(functools.partial(_write, old, tensor), functools.partial(_write, old, old.detach().clone()))
            continue
        # Copied: a tensor of a safetensors file lies wherever the file has it, and products round by the alignment of their operands.
        new = tensor.to(device if old.is_meta else old.device, old.dtype, copy=True)
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=old.requires_grad)
        for table, place in places[id(old)]:
            changes.put(table, place, new)


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by all their names."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


def _write(tensor: Tensor, values: Tensor) -> None:
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        tensor.copy_(values)


def _is_finite(tensor: Tensor) -> bool:
    return not (tensor.dtype in _FLOATS or tensor.is_complex()) or bool(tensor.isfinite().all())


def _overlaps(tensor: Tensor) -> bool:
    """Whether several elements lie at one place, as in what `expand` gives: nothing can be written there one by one."""
    return any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
