"""The attention module that VGGT, Depth Anything 3 and Pi3 share: fused qkv, norms over the head dimension, axial RoPE."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from lite3r_plugin import FusedQKV, Rope2D, Routed

_CHILDREN = {"qkv", "q_norm", "k_norm", "attn_drop", "proj", "proj_drop", "rope"}


def is_attention(module: Any) -> bool:
    """Whether `module` is an attention module with a fused qkv Linear, whatever wraps its Linears."""
    return (
        isinstance(module, nn.Module)
        and isinstance(getattr(module, "qkv", None), nn.Module)
        and isinstance(getattr(module, "proj", None), nn.Module)
        and isinstance(getattr(module, "num_heads", None), int)
    )


def has_attention(blocks: Any) -> bool:
    """Whether `blocks` is a non-empty list of transformer blocks with such attention."""
    return isinstance(blocks, nn.ModuleList) and len(blocks) > 0 and all(is_attention(getattr(b, "attn", None)) for b in blocks)


def head_dim(attn: nn.Module) -> int:
    """D."""
    return attn.proj.in_features // attn.num_heads


def projections(attn: nn.Module, positions: str) -> FusedQKV | Routed:
    """How `attn` makes q, k and v; `positions` names its argument with the token coordinates.

    A fork's attention may do more (a cache, token merging, a gate). Then it has other arguments, children or
    parameters, and its own forward must run: `Routed`.
    """
    rope = getattr(attn, "rope", None)
    base = getattr(rope, "base_frequency", getattr(rope, "base", None))
    plain = (
        {name for name, _ in attn.named_children()} <= _CHILDREN
        and not list(attn.parameters(recurse=False))
        and set(inspect.signature(attn.forward).parameters) <= {"x", "attn_bias", "attn_mask", positions}
        and (rope is None or isinstance(base, (int, float)))
        and getattr(rope, "F0", 1.0) == 1.0
    )
    if not plain:
        return Routed(attn.num_heads)
    present = {name: name for name in ("q_norm", "k_norm", "attn_drop") if hasattr(attn, name)}
    if hasattr(attn, "proj_drop"):
        present["out_drop"] = "proj_drop"
    if rope is not None:
        return FusedQKV(attn.num_heads, **present, rope=Rope2D(float(base)), positions=positions)
    takes_positions = positions in inspect.signature(attn.forward).parameters
    return FusedQKV(attn.num_heads, **present, positions=positions if takes_positions else None)


def patch_size(module: nn.Module) -> tuple[int, int]:
    """Height and width of a patch from ``module.patch_size``, one number or two."""
    size = module.patch_size
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
