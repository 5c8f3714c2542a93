"""CroCo v2 and what is made of it: DUSt3R, MASt3R, CUT3R. An encoder of each view, decoders whose blocks also attend across views.

A decoder block attends to the tokens of its own view, then to those of the other one (in CUT3R: from a state to a view, and back). Views
may be of different sizes, so layouts are read from the coordinates that come with the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lite3r_plugin.adapter import (
    AttentionSite,
    LayoutFunction,
    ModelOutputs,
    OutputsFunction,
    Rope2D,
    Routed,
    SeparateQKV,
    TokenLayout,
    forward_parameters,
    hookimpl,
)

from . import _blocks
from ._coordinates import layout_of

_ACROSS = ("query", "key", "value", "qpos", "kpos")
_CHILDREN = {"projq", "projk", "projv", "attn_drop", "proj", "proj_drop", "rope"}


@hookimpl
def lite3r_attention_sites(model: nn.Module) -> list[AttentionSite] | None:
    """Sites of every encoder and decoder of this kind inside `model`, if there is a decoder."""
    modules = dict(model.named_modules())
    decoders = {name: block for name, block in modules.items() if _is_decoder_block(block)}
    sites = []
    for name, block in modules.items():
        if name in decoders:
            sites += _decoder_sites(name, block)
        elif decoders and _attends_to_itself(getattr(block, "attn", None)) and not hasattr(block, "cross_attn"):
            sites.append(_site(f"{name}.attn", "encoder", block.attn, _blocks.pre_norm_block(name, block, "xpos")))
    return sites if decoders else None


@hookimpl
def lite3r_outputs(model: nn.Module) -> OutputsFunction | None:
    """Outputs of a DUSt3R or MASt3R."""
    names = ("enc_blocks", "dec_blocks", "dec_blocks2", "downstream_head1", "downstream_head2")
    known = all(hasattr(model, name) for name in names) and _is_decoder_block(getattr(model, "dec_blocks", [None])[0])
    return to_outputs if known else None


def to_outputs(output: Sequence[dict[str, Tensor]]) -> ModelOutputs:
    """From what its forward returns: for each of two views its points in the frame of the first, and confidences, which are above 1."""
    first, second = output
    views = first["pts3d"], second["pts3d_in_other_view"]
    together = views[0].shape == views[1].shape
    confidences = tuple(view["conf"].log() for view in output if "conf" in view)
    return ModelOutputs(points=torch.stack(views, 1) if together else None, other=confidences if together else (*views, *confidences))


def _is_decoder_block(block: Any) -> bool:
    """Whether it attends to its own tokens and across. Those without coordinates, as in CUT3R's memory, have one token or few."""
    across = getattr(block, "cross_attn", None)
    return (
        _attends_to_itself(getattr(block, "attn", None))
        and isinstance(across, nn.Module)
        and all(isinstance(getattr(across, name, None), nn.Module) for name in ("projq", "projk", "projv", "proj"))
        and isinstance(getattr(across, "num_heads", None), int)
        and tuple(forward_parameters(across) or ()) == _ACROSS
        and getattr(across, "rope", None) is not None
    )


def _attends_to_itself(attn: Any) -> bool:
    return _blocks.is_attention(attn) and list(forward_parameters(attn) or ()) == ["x", "xpos"]


def _decoder_sites(name: str, block: Any) -> list[AttentionSite]:
    across, dim = block.cross_attn, block.cross_attn.proj.in_features // block.cross_attn.num_heads
    base: Any = getattr(across.rope, "base", None)
    plain = (
        {child for child, _ in across.named_children()} <= _CHILDREN
        and not list(across.parameters(recurse=False))
        and isinstance(base, (int, float))
        and getattr(across.rope, "F0", 1.0) == 1.0
    )
    projections: Any = Routed(across.num_heads)
    if plain:
        projections = SeparateQKV(
            across.num_heads, "projq", "projk", "projv", "proj", attn_drop="attn_drop", out_drop="proj_drop", rope=Rope2D(float(base)),
            positions="qpos", key="key", value="value", key_positions="kpos",
        )  # fmt: skip
    crossing = AttentionSite(f"{name}.cross_attn", "global", dim, projections, LayoutFunction(of_queries), keys=LayoutFunction(of_keys))
    return [_site(f"{name}.attn", "frame", block.attn), crossing]


def _site(fqn: str, scope: Any, attn: Any, block: Any = None) -> AttentionSite:
    projections = _blocks.projections(attn, "xpos")
    return AttentionSite(fqn, scope, _blocks.head_dim(attn), projections, LayoutFunction(of_tokens), block)


def of_tokens(x: Tensor, xpos: Tensor | None = None) -> TokenLayout | None:
    """The layout of one view."""
    return layout_of(xpos)


def of_queries(query: Tensor, key: Tensor, value: Tensor, qpos: Tensor | None = None, kpos: Tensor | None = None) -> TokenLayout | None:
    """That of the view that attends."""
    return layout_of(qpos)


def of_keys(query: Tensor, key: Tensor, value: Tensor, qpos: Tensor | None = None, kpos: Tensor | None = None) -> TokenLayout | None:
    """That of the view that it attends to."""
    return layout_of(kpos)
