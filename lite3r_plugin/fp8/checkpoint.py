"""FP8 weights in and out of a checkpoint. Nothing is ever put together in high precision."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..ops.fp8 import E4M3, Quantized, dequantize
from ..wrapper import Changes, replace_modules, share_hooks
from . import backends
from .linear import Fp8Linear
from .qat import FakeQuantLinear

Shapes = dict[str, list[int]]


def fp8_linears(modules: dict[str, nn.Module]) -> dict[str, Fp8Linear]:
    """The FP8 Linears among `modules`, each by its first name."""
    first = {module: name for name, module in reversed(modules.items())}
    return {name: module for name, module in modules.items() if isinstance(module, Fp8Linear) and first[module] == name}


def fp8_tensors(linears: Mapping[str, Fp8Linear]) -> dict[str, Tensor]:
    """The weights ``[C_out, C]`` E4M3 of FP8 Linears and their scales ``[C_out, 1]`` FP32, by name."""
    return {f"{fqn}.{name}": getattr(linear, name) for fqn, linear in linears.items() for name in ("weight_data", "weight_scale")}


def other_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers of `model` that are not in FP8, those outside of its state dict included; counters not."""
    linears = [(fqn, m) for fqn, m in model.named_modules() if isinstance(m, (Fp8Linear, FakeQuantLinear))]
    ours = {f"{fqn}.{name}" for fqn, linear in linears for name, _ in linear.named_buffers()}
    return {name: t.detach() for pairs in (model.named_parameters(), model.named_buffers()) for name, t in pairs if name not in ours}


def check_fp8_tensors(
    linears: Mapping[str, nn.Linear], shapes: Shapes, biases: list[str], weights: Mapping[str, Tensor], where: str, model: str
) -> None:
    """Raise `CheckpointError` unless the FP8 tensors in `weights` fit `shapes`, and those and `biases` the Linears of a model.

    Args:
        linears: The Linears of the model that may be in FP8, by name.
        shapes: ``[C_out, C]`` of the FP8 Linears, by name.
        biases: Names of those that have a bias, which is not stored with them.
        weights: What the file holds.
        where: What the file is called in messages.
        model: What the model is called in messages.
    """
    for fqn, shape in shapes.items():
        linear = linears.get(fqn)
        if linear is None or [linear.out_features, linear.in_features] != shape:
            raise CheckpointError(
                f"{where} has FP8 weights {shape} for {fqn!r}, but this model has no such Linear in its transformer blocks that "
                "fp8_filter takes"
            )
        for name, dtype, expected in (("weight_data", E4M3, shape), ("weight_scale", torch.float32, [shape[0], 1])):
            tensor = weights.get(f"{fqn}.{name}")
            if tensor is None or list(tensor.shape) != expected or tensor.dtype != dtype:
                found = "missing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
                raise CheckpointError(f"{where}: {fqn}.{name} is {found}, not {dtype} {expected}; save it again with save_lite3r")
        if problem := _problem(weights[f"{fqn}.weight_data"], weights[f"{fqn}.weight_scale"], linear.weight.dtype):
            raise CheckpointError(f"{where} is damaged: the FP8 weight of {fqn!r} has {problem}; save it again with save_lite3r")
    if biases != sorted(fqn for fqn in shapes if linears[fqn].bias is not None):
        raise CheckpointError(f"{where} belongs to another model: other Linears than those of this {model} have a bias")


def install_fp8_tensors(
    changes: Changes, modules: dict[str, nn.Module], linears: Mapping[str, nn.Linear], weights: Mapping[str, Tensor], device: torch.device
) -> None:
    """Replace Linears by FP8 ones with these weights; those on the meta device go to `device`.

    Until `changes` are final, the original weights are kept.

    Args:
        changes: Takes note of what is done.
        modules: All modules of the model by all their names; kept up to date.
        linears: Those to replace, by the names that they have in the file.
        weights: What the file holds.
        device: Where Linears of the meta device go.
    """

    made: dict[nn.Module, nn.Module] = {}
    for fqn, linear in linears.items():
        if (bias := linear._parameters.get("bias")) is not None:  # which no longer learns
            changes.make(functools.partial(bias.requires_grad_, False), functools.partial(bias.requires_grad_, bias.requires_grad))
        made[linear] = _fp8_linear(linear, weights[f"{fqn}.weight_data"], weights[f"{fqn}.weight_scale"], device)
    for linear in linears.values():
        changes.put(linear._parameters, "weight", None)  # free it, whoever still holds the module
    replace_modules(changes, modules, made)


def _fp8_linear(linear: nn.Linear, data: Tensor, scale: Tensor, device: torch.device) -> Fp8Linear:
    """What takes the place of `linear`, with this weight: where that of `linear` is, or on `device`."""
    place = device if linear.weight.is_meta else linear.weight.device
    backend = backends.choose("auto", place, linear.in_features, linear.out_features)
    made = Fp8Linear(linear.in_features, linear.out_features, linear.bias, backend, linear.weight.dtype, torch.device("meta"))
    # Copied: a tensor of a safetensors file lies wherever the file has it, and products round by the alignment of their operands.
    made.weight_data, made.weight_scale = data.to(place, copy=True), scale.to(place, copy=True)
    made.infinities = torch.zeros(1, dtype=torch.int64, device=place)
    share_hooks(made, linear)
    return made.train(linear.training)


def _problem(data: Tensor, scale: Tensor, dtype: torch.dtype) -> str | None:
    """What is wrong with a weight of codes `data` ``[C_out, C]`` and `scale` ``[C_out, 1]`` that is to be one of `dtype`, or None."""
    magnitudes = data.view(torch.uint8) & 0x7F
    if magnitudes.eq(0x7F).any() or not scale.isfinite().all():
        return "infinities or NaN"
    if not scale.gt(0).all():
        return "scales that are not positive"
    if data.numel() and not dequantize(Quantized(magnitudes.amax(1, keepdim=True).view(E4M3), scale, dtype)).isfinite().all():
        return f"scales with which it is beyond {dtype}"
    return None
