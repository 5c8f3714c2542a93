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


def head_dim(attn: Any) -> int:
    """D."""
    return attn.proj.in_features // attn.num_heads


def projections(attn: Any, positions: str) -> FusedQKV | Routed:
    """How `attn` makes q, k and v; `positions` names its argument with the token coordinates.

    A fork's attention may do more (a cache, token merging, a gate). Then it has other arguments, children or
    parameters, and its own forward must run: `Routed`.
    """
    rope = getattr(attn, "rope", None)
    base = getattr(rope, "base_frequency", getattr(rope, "base", None))
    arguments = set(inspect.signature(attn.forward).parameters)
    plain = (
        {name for name, _ in attn.named_children()} <= _CHILDREN
        and not list(attn.parameters(recurse=False))
        and arguments <= {"x", "attn_bias", "attn_mask", positions}
        and (rope is None or isinstance(base, (int, float)))
        and getattr(rope, "F0", 1.0) == 1.0
    )
    if not plain:
        return Routed(attn.num_heads)

    def present(name: str) -> str | None:
        return name if hasattr(attn, name) else None

    return FusedQKV(
        attn.num_heads,
        q_norm=present("q_norm"),
        k_norm=present("k_norm"),
        attn_drop=present("attn_drop"),
        out_drop=present("proj_drop"),
        rope=None if base is None else Rope2D(float(base)),
        positions=positions if positions in arguments else None,
    )


def patch_size(module: Any) -> tuple[int, int]:
    """Height and width of a patch from ``module.patch_size``, one number or two."""
    size = module.patch_size
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
