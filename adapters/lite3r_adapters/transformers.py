"""Hugging Face transformers: DINOv2 (with registers), DINOv3, ViT, DPT, Depth Anything, SigLIP, V-JEPA 2, other image models."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from torch import nn

from lite3r_plugin.adapter import AttentionSite, ExactRewrite, Routed, TokenSource, forward_parameters, hookimpl

_SPECIAL_TOKENS = {"cls_token", "class_embedding", "register_tokens", "distillation_token"}
_BESIDE = {"position_embeddings", "cu_seqlens"}  # arguments of self-attention that are no tokens
_OTHER_PARAMETERS = {"mask_token", "position_embeddings", "position_embedding"}


@hookimpl(trylast=True)
def lite3r_attention_sites(model: nn.Module) -> list[AttentionSite] | None:
    """Self-attention of every transformers image or video model inside `model`, where it goes through its SDPA interface."""
    pretrained = getattr(sys.modules.get("transformers"), "PreTrainedModel", None)
    if pretrained is None:
        return None
    modules: dict[str, Any] = dict(model.named_modules())
    sites = []
    for name, module in modules.items():
        if not _is_self_attention(module):
            continue
        owner = next((m for _, m in _around(modules, name) if isinstance(m, pretrained)), None)
        if owner is not None and _takes_images(owner):
            sites.append(AttentionSite(name, "frame", _head_dim(module), Routed(), _tokens(modules, name, owner.config)))
    return sites or None


def _takes_images(owner: Any) -> bool:
    """Those that take packed patches, whose main input has any name, take the grids of their images besides.

    In transformers 5.0 a part of a model may name the main input of the whole, such as the vision half of SigLIP.
    """
    parameters = forward_parameters(owner) or {}
    alone = "pixel_values" in parameters and "input_ids" not in parameters
    return str(owner.main_input_name).startswith("pixel_values") or "grid_thw" in parameters or alone


@hookimpl(trylast=True)
def lite3r_exact_rewrites(model: nn.Module) -> list[ExactRewrite] | None:
    """None is known, and none is needed: these models run in BF16 as they are."""
    pretrained = getattr(sys.modules.get("transformers"), "PreTrainedModel", None)
    return [] if pretrained is not None and any(isinstance(module, pretrained) for module in model.modules()) else None


def _is_self_attention(module: nn.Module) -> bool:
    """What calls the attention interface has a scale and `is_causal`; names of classes and Linears differ between versions."""
    if getattr(module, "is_causal", None) is not False or not isinstance(_scale(module), float):
        return False
    parameters = [p for name, p in (forward_parameters(module) or {}).items() if name not in _BESIDE]
    return sum(p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters) == 1  # cross-attention has more


def _scale(module: Any) -> float | None:
    return getattr(module, "scaling", getattr(module, "scale", None))


def _head_dim(module: Any) -> int:
    for name in ("head_dim", "attention_head_size"):
        if isinstance(getattr(module, name, None), int):
            return getattr(module, name)
    return round((_scale(module) or 1.0) ** -2)


def _around(modules: dict[str, Any], name: str) -> Iterator[tuple[str, Any]]:
    """The modules around the module `name`, from the inside out."""
    while name:
        name = name.rpartition(".")[0]
        yield name, modules[name]


def _tokens(modules: dict[str, Any], name: str, config: object) -> TokenSource | None:
    """Tokens from the one patch convolution next to the attention; None where they are not special tokens plus grid."""
    channels = getattr(config, "num_channels", 3)
    for prefix, outer in _around(modules, name):
        convs = [n for n, m in outer.named_modules(prefix=prefix) if isinstance(m, nn.Conv2d) and m.in_channels == channels]
        if convs:
            break
    else:
        return None
    conv = modules[convs[0]]
    if len(convs) > 1 or conv.kernel_size != conv.stride or conv.kernel_size == (1, 1) or conv.padding not in ((0, 0), "valid"):
        return None
    special = 0
    for inner, module in _around(modules, convs[0]):
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if parameter_name in _SPECIAL_TOKENS:
                special += 1 if parameter.dim() == 1 else parameter.shape[-2]
            elif parameter_name not in _OTHER_PARAMETERS:
                return None
        if inner == prefix:
            break
    return TokenSource(convs[0], conv.stride, special, strict=False)
