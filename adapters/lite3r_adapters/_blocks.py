"""The transformer block that VGGT, Depth Anything 3 and Pi3 share: fused qkv, norms over the head dimension, axial RoPE."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

from torch import nn

from lite3r_plugin.adapter import FusedQKV, KeyValueCache, PreNormBlock, Rope2D, Routed, forward_parameters

_BLOCK_CHILDREN = {"norm1", "attn", "ls1", "drop_path", "drop_path1", "norm2", "mlp", "ls2", "drop_path2"}
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
    return (
        isinstance(blocks, (nn.ModuleList, nn.Sequential))
        and len(blocks) > 0
        and all(is_attention(getattr(b, "attn", None)) for b in blocks)
    )


def head_dim(attn: Any) -> int:
    """D."""
    return attn.proj.in_features // attn.num_heads


_CACHES = (
    KeyValueCache("past_key_values", "use_cache", by_calls=True, finished=False),  # StreamVGGT
    KeyValueCache("kv_cache"),  # STream3R
)


def cache_of(attn: Any) -> KeyValueCache | None:
    """How `attn` takes the keys and values of the frames before, as models that stream do; None where it takes none."""
    arguments = forward_parameters(attn)
    named = (cache for cache in _CACHES if arguments is not None and _names(cache) <= arguments.keys())
    return next(named, None)


def _names(cache: KeyValueCache | None) -> set[str]:
    return set() if cache is None else {name for name in (cache.past, cache.wanted) if name is not None}


def projections(attn: Any, positions: str) -> FusedQKV | Routed:
    """How `attn` makes q, k and v; `positions` names its argument with the token coordinates.

    A fork's attention may do more (token merging, a gate). Then it has other arguments, children or
    parameters, and its own forward must run: `Routed`.
    """
    rope = getattr(attn, "rope", None)
    base = getattr(rope, "base_frequency", getattr(rope, "base", None))
    arguments = forward_parameters(attn)
    if arguments is None:
        return Routed(attn.num_heads)
    cache = cache_of(attn)
    plain = (
        {name for name, _ in attn.named_children()} <= _CHILDREN
        and not list(attn.parameters(recurse=False))
        and arguments.keys() <= {"x", "attn_bias", "attn_mask", positions} | _names(cache)
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
        mask="attn_mask" if cache is not None and "attn_mask" in arguments else None,
        cache=cache,
    )


def pre_norm_block(fqn: str, block: Any, positions: str, beside: Set[str] = frozenset()) -> PreNormBlock | None:
    """`block` as the usual transformer block of DINOv2 and its heirs, or None when it does more or something else.

    Args:
        fqn: Its fully qualified name.
        block: The module.
        positions: Name of its argument with the token coordinates.
        beside: Names of children that its own forward does not run.
    """
    parts, arguments = dict(block.named_children()), forward_parameters(block)
    plain = (
        {"norm1", "attn", "norm2", "mlp"} <= parts.keys() <= _BLOCK_CHILDREN | beside
        and not list(block.parameters(recurse=False))
        and arguments is not None
        and arguments.keys() <= {"x", "x_or_x_list", "attn_bias", "attn_mask", positions}
    )
    if not plain:
        return None
    mlp = {name: part for name, part in parts["mlp"].named_children() if not isinstance(part, (nn.Dropout, nn.Identity))}
    names, kinds = list(mlp), list(mlp.values())
    if isinstance(parts["mlp"], nn.Sequential) or names == ["fc1", "act", "fc2"]:
        if len(names) != 3 or type(kinds[1]) is not nn.GELU:
            return None
        activation = "gelu_tanh" if kinds[1].approximate == "tanh" else "gelu"
    elif names == ["w12", "w3"]:
        activation = "swiglu"
    else:
        return None
    gains = [_gain(parts.get(name), name) for name in ("ls1", "ls2")]
    if "" in gains:
        return None
    return PreNormBlock(fqn, f"mlp.{names[0]}", f"mlp.{names[-1]}", activation, gain1=gains[0], gain2=gains[1])


def block_around(owner: nn.Module, attn: str, prefix: str, positions: str) -> PreNormBlock | None:
    """`pre_norm_block` of the module around the attention `attn` of `owner`, whose name in the model is `prefix`."""
    name, _, child = attn.rpartition(".")
    return pre_norm_block(f"{prefix}{name}", owner.get_submodule(name), positions) if child == "attn" else None


def _gain(scale: nn.Module | None, name: str) -> str | None:
    """The name of the gain of a layer scale, None where there is none, "" where it is something else."""
    if scale is None or isinstance(scale, nn.Identity):
        return None
    return f"{name}.gamma" if [n for n, _ in scale.named_parameters()] == ["gamma"] else ""


def patch_size(module: Any) -> tuple[int, int]:
    """Height and width of a patch from ``module.patch_size``, one number or two."""
    size = module.patch_size
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
