"""The multi-view transformers of UniCeption, which MapAnything (arXiv 2509.13414) is made of, and its image encoders.

A transformer is given the features of all views, of one size, as they are in an image; tokens of each view follow its patches, and tokens
of the whole sequence, such as the one of scale, end it. Layouts are read from there.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from lite3r_plugin.adapter import (
    AttentionSite,
    FusedQKV,
    LayoutFunction,
    Rope2D,
    Routed,
    SeparateQKV,
    TokenLayout,
    Views,
    forward_parameters,
)

from .. import _blocks
from .._coordinates import layout_of
from .._dinov2 import encoder_sites

_CHILDREN = {"q_norm", "k_norm", "attn_drop", "proj", "proj_drop", "custom_positional_encoding"}
_ACROSS = ["query", "key", "value", "qpos", "kpos"]
_ALTERNATING = ("uniception.models.info_sharing.alternating_attention_transformer", "MultiViewAlternatingAttentionTransformer")
_GLOBAL = ("uniception.models.info_sharing.global_attention_transformer", "MultiViewGlobalAttentionTransformer")


def attention_sites(model: nn.Module) -> list[AttentionSite] | None:
    """Sites of every such transformer inside `model`, and of the encoders beside them."""
    sites: list[AttentionSite] = []
    modules: dict[str, Any] = dict(model.named_modules())
    for name, module in modules.items():
        if not is_transformer(module):
            continue
        outer = name.rpartition(".")[0]
        found = list(_transformer_sites(name, module, modules[outer] if name else None))
        sites += found
        encoder = f"{outer}.encoder".lstrip(".")
        if found and encoder in modules:
            sites += _encoder_sites(f"{encoder}.", modules[encoder])
    return sites or None


def is_transformer(module: Any) -> bool:
    """By structure, so that forks under any module path are known too."""
    if list(forward_parameters(module) or ())[:1] != ["model_input"]:
        return False
    branches: Any = getattr(module, "multi_view_branches", None)
    if isinstance(branches, nn.ModuleList) and len(branches) > 1:
        return all(_blocks.has_attention(branch) and all(map(_crosses, branch)) for branch in list[Any](branches))
    blocks: Any = getattr(module, "self_attention_blocks", None)
    return (
        isinstance(getattr(module, "distinguish_ref_and_non_ref_views", None), bool)
        and _blocks.has_attention(blocks)
        and all(_attends_to_itself(block.attn) for block in blocks)
    )


def _attends_to_itself(attn: Any) -> bool:
    return list(forward_parameters(attn) or ()) == ["x", "xpos"]


def _crosses(block: Any) -> bool:
    across = getattr(block, "cross_attn", None)
    return (
        _attends_to_itself(block.attn)
        and list(forward_parameters(across) or () if isinstance(across, nn.Module) else ()) == _ACROSS
        and all(isinstance(getattr(across, name, None), nn.Module) for name in ("projq", "projk", "projv", "proj"))
    )


def _transformer_sites(name: str, module: Any, owner: Any) -> Iterator[AttentionSite]:
    """Its sites: none where nothing tells whether every other block attends within a view."""

    def read(function: Any, **options: Any) -> LayoutFunction:
        return LayoutFunction(functools.partial(function, **options) if options else function, module=name)

    if hasattr(module, "multi_view_branches"):
        for view, branch in enumerate(module.multi_view_branches):
            for i, block in enumerate(branch):
                fqn = f"{name}.multi_view_branches.{view}.{i}".lstrip(".")
                yield AttentionSite(f"{fqn}.attn", "frame", _blocks.head_dim(block.attn), _projections(block.attn), read(of_one_view))
                across, dim = block.cross_attn, _blocks.head_dim(block.cross_attn)
                keys = read(of_other_views, view=view)
                yield AttentionSite(f"{fqn}.cross_attn", "global", dim, _across(across), read(of_one_view), keys=keys)
        return
    kind = _kind(module, owner)
    if kind is None:
        return
    of_all = read(of_all_views) if module.distinguish_ref_and_non_ref_views else read(of_all_views, reference=None)
    for i, block in enumerate(module.self_attention_blocks):
        alone = kind == "alternating_attention" and i % 2 == 1
        yield _site(
            f"{name}.self_attention_blocks.{i}".lstrip("."), "frame" if alone else "global", block, read(of_one_view) if alone else of_all
        )


def _kind(module: Any, owner: Any) -> str | None:
    """As MapAnything calls it; a transformer of UniCeption that something else has inside is known by its class."""
    stated = getattr(owner, "info_sharing_type", None)
    if stated in ("alternating_attention", "global_attention"):
        return stated
    for (path, name), kind in ((_ALTERNATING, "alternating_attention"), (_GLOBAL, "global_attention")):
        known = getattr(sys.modules.get(path), name, None)
        if known is not None and isinstance(module, known):
            return kind
    return None


def _encoder_sites(prefix: str, encoder: Any) -> list[AttentionSite]:
    """Those of a DINOv2 or a CroCo; other encoders run as they are."""
    blocks: Any = getattr(encoder, "enc_blocks", None)
    if _blocks.has_attention(blocks) and all(_attends_to_itself(block.attn) for block in blocks):
        return [_site(f"{prefix}enc_blocks.{i}", "encoder", block, LayoutFunction(of_tokens)) for i, block in enumerate(blocks)]
    return encoder_sites(f"{prefix}model.", getattr(encoder, "model", None))


def _site(name: str, scope: Any, block: Any, tokens: LayoutFunction) -> AttentionSite:
    whole = _pre_norm_block(name, block)
    return AttentionSite(f"{name}.attn", scope, _blocks.head_dim(block.attn), _projections(block.attn), tokens, whole)


def _pre_norm_block(name: str, block: Any) -> Any:
    """The block, whose own reference to the positional encoding changes nothing."""
    return _blocks.pre_norm_block(name, block, "xpos", beside={"custom_positional_encoding"})


def _projections(attn: Any) -> FusedQKV | Routed:
    rope, known = _rope(attn, "qkv")
    if not known:
        return Routed(attn.num_heads)
    if hasattr(attn, "rope"):
        return _blocks.projections(attn, "xpos")
    return FusedQKV(attn.num_heads, rope=rope, positions=None if rope is None else "xpos", **_parts(attn))


def _across(attn: Any) -> SeparateQKV | Routed:
    rope, known = _rope(attn, "projq", "projk", "projv")
    if not known:
        return Routed(attn.num_heads)
    given = {} if rope is None else {"positions": "qpos", "key_positions": "kpos"}
    linears = ("projq", "projk", "projv", "proj")
    return SeparateQKV(attn.num_heads, *linears, rope=rope, key="key", value="value", **given, **_parts(attn))


def _parts(attn: Any) -> dict[str, Any]:
    """What norms and dropouts it has, as projections name them."""
    names = {"q_norm": "q_norm", "k_norm": "k_norm", "attn_drop": "attn_drop", "out_drop": "proj_drop"}
    return {field: name for field, name in names.items() if hasattr(attn, name)}


def _rope(attn: Any, *linears: str) -> tuple[Rope2D | None, bool]:
    """The rotary embedding of `attn`, and whether what it does is all known: its scores may grow with the number of tokens."""
    encoding = getattr(attn, "custom_positional_encoding", None)
    base: Any = getattr(encoding, "base", None)
    known = (
        not (getattr(attn, "use_scalable_softmax", False) or getattr(attn, "use_entropy_scaling", False))
        and {name for name, _ in attn.named_children()} <= _CHILDREN | {*linears, "rope"}
        and not list(attn.parameters(recurse=False))
        and (encoding is None or (isinstance(base, (int, float)) and getattr(encoding, "F0", 1.0) == 1.0))
    )
    return (None if encoding is None or not known else Rope2D(float(base))), known


def of_all_views(model_input: Any, reference: int | None = 0) -> TokenLayout:
    """The layout of the sequence of all views; the first one is the reference, in whose frame points are, unless all are alike.

    Args:
        model_input: ``features`` of each view ``[B, C, h, w]``, ``additional_input_tokens_per_view`` ``[B, C, t]`` of each and
            ``additional_input_tokens`` ``[B, C, T]``, or None.
        reference: As of `TokenLayout`.
    """
    view, last = _view(model_input), getattr(model_input, "additional_input_tokens", None)
    views = Views(view.grid, len(model_input.features), trailing_tokens=view.trailing_tokens)
    return TokenLayout((views,) if last is None else (views, last.shape[2]), reference)


def of_one_view(model_input: Any) -> TokenLayout:
    """That of one view."""
    return TokenLayout((_view(model_input),))


def of_other_views(model_input: Any, view: int) -> TokenLayout:
    """That of all views but `view`, in whose order they are."""
    one = _view(model_input)
    return TokenLayout((Views(one.grid, len(model_input.features) - 1, trailing_tokens=one.trailing_tokens),), 0 if view else None)


def of_tokens(x: Tensor, xpos: Tensor | None = None) -> TokenLayout | None:
    """That of one view in an encoder."""
    return layout_of(xpos)


def _view(model_input: Any) -> Views:
    rows, columns = model_input.features[0].shape[-2:]
    own = getattr(model_input, "additional_input_tokens_per_view", None)
    return Views((rows, columns), trailing_tokens=0 if own is None else own[0].shape[2])
