"""FP8 weights in and out of a checkpoint. Nothing is ever put together in high precision."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..ops.fp8 import E4M3
from . import backends
from .convert import put_in_fp8
from .linear import Fp8Linear
from .qat import FakeQuantLinear

Shapes = dict[str, list[int]]


def fp8_linears(modules: dict[str, nn.Module]) -> dict[str, Fp8Linear]:
    """The FP8 Linears among `modules`, each by its first name."""
    first = {module: name for name, module in reversed(modules.items())}
    return {name: module for name, module in modules.items() if isinstance(module, Fp8Linear) and first[module] == name}


def fp8_tensors(linears: Mapping[str, Fp8Linear]) -> dict[str, Tensor]:
    """The weights ``[C_out, C]`` E4M3 of FP8 Linears and their scales ``[C_out, 1]`` FP32, by name."""
    return {
        f"{fqn}.{name}": getattr(linear, name).contiguous() for fqn, linear in linears.items() for name in ("weight_data", "weight_scale")
    }


def other_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers of `model` that are not in FP8, those outside of its state dict included; counters not."""
    linears = [(fqn, m) for fqn, m in model.named_modules() if isinstance(m, (Fp8Linear, FakeQuantLinear))]
    ours = {f"{fqn}.{name}" for fqn, linear in linears for name, _ in linear.named_buffers()}
    tensors = {name: t.detach() for pairs in (model.named_parameters(), model.named_buffers()) for name, t in pairs if name not in ours}
    seen: set[int] = set()
    for name, tensor in tensors.items():  # safetensors takes no two tensors in one piece of memory
        storage = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if storage in seen else tensor.contiguous()
        seen.add(storage)
    return tensors


def check_fp8_tensors(
    modules: Mapping[str, nn.Module],
    shapes: Shapes,
    biases: list[str] | None,
    weights: Mapping[str, Tensor],
    linears: Iterable[nn.Module],
    where: str,
) -> None:
    """Raise `CheckpointError` unless the FP8 tensors in `weights` fit `shapes`, and those and `biases` the Linears of a model.

    Args:
        modules: All modules of the model by all their names.
        shapes: ``[C_out, C]`` of the FP8 Linears, by name.
        biases: Names of those that have a bias, which is not stored with them; None where that is not known.
        weights: What the file holds.
        linears: The Linears that may be in FP8.
        where: What the file is called in messages.
    """
    known = {id(linear) for linear in linears}
    for fqn, shape in shapes.items():
        linear = modules.get(fqn)
        if not isinstance(linear, nn.Linear) or id(linear) not in known or [linear.out_features, linear.in_features] != shape:
            raise CheckpointError(
                f"{where} has FP8 weights {shape} for {fqn!r}, but this model has no such Linear in its transformer blocks that "
                "fp8_filter takes"
            )
        for name, dtype, expected in (("weight_data", E4M3, shape), ("weight_scale", torch.float32, [shape[0], 1])):
            tensor = weights.get(f"{fqn}.{name}")
            if tensor is None or list(tensor.shape) != expected or tensor.dtype != dtype:
                found = "missing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
                raise CheckpointError(f"{where}: {fqn}.{name} is {found}, not {dtype} {expected}; save it again with save_lite3r")
        codes, scales = weights[f"{fqn}.weight_data"].view(torch.uint8), weights[f"{fqn}.weight_scale"]
        if (codes & 0x7F).eq(0x7F).any() or not scales.isfinite().all():
            raise CheckpointError(f"{where} is damaged: the FP8 weight of {fqn!r} has infinities or NaN; save it again with save_lite3r")
    if biases is not None and biases != sorted(fqn for fqn in shapes if modules[fqn].bias is not None):
        raise CheckpointError(
            f"{where} belongs to another model: other Linears than those of this {type(modules['']).__name__} have a bias"
        )


def install_fp8_tensors(modules: dict[str, nn.Module], shapes: Shapes, weights: Mapping[str, Tensor], device: torch.device) -> None:
    """Replace Linears by FP8 ones with these weights; those on the meta device go to `device`.

    Args:
        modules: All modules of the model by all their names; kept up to date.
        shapes: ``[C_out, C]`` of the FP8 Linears, by name.
        weights: What the file holds.
        device: Where Linears of the meta device go.
    """

    def make(fqn: str, linear: nn.Linear) -> Fp8Linear:
        place = device if linear.weight.is_meta else linear.weight.device
        made = Fp8Linear(
            linear.in_features, linear.out_features, linear.bias,
            backends.choose("auto", place, linear.in_features, linear.out_features), linear.weight.dtype, torch.device("meta"),
        )  # fmt: skip
        # Copied: a tensor of a safetensors file lies wherever the file has it, and products round by the alignment of their operands.
        made.weight_data, made.weight_scale = (weights[f"{fqn}.{name}"].to(place, copy=True) for name in ("weight_data", "weight_scale"))
        made.infinities = torch.zeros(1, dtype=torch.int64, device=place)
        return made.train(linear.training)

    for fqn in shapes:
        if isinstance(linear := modules[fqn], nn.Linear):  # it is, but for a second name of one that has been replaced
            put_in_fp8(modules, linear, functools.partial(make, fqn, linear))


def fill_tensors(model: nn.Module, tensors: Mapping[str, Tensor], device: torch.device) -> None:
    """Give parameters and buffers of `model` these values; those on the meta device are made on `device`."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}  # a parameter may have several
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, value in table.items():
                places.setdefault(id(value), []).append((module, name))
    for name, tensor in tensors.items():
        owner_name, _, child = name.rpartition(".")
        old = getattr(model.get_submodule(owner_name), child)
        if not old.is_meta:
            with torch.inference_mode(old.is_inference()), torch.no_grad():
                old.copy_(tensor)
            continue
        new = tensor.to(device, old.dtype, copy=True)  # as in `install_fp8_tensors`
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=old.requires_grad)
        for owner, place in places[id(old)]:
            setattr(owner, place, new)
