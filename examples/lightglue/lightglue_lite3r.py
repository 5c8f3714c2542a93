"""A Lite3R adapter for LightGlue (arXiv 2306.13643), and the keypoint order that makes its blocks compact."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lite3r_plugin import AttentionSite, Routed, hookimpl
from lite3r_plugin.adapter import ModelOutputs, OutputsFunction

MORTON_BITS = 10
UNLIKELY = -8.0
"""Logarithm of the probability below which matches count less and less when assignments are compared."""


@hookimpl
def lite3r_attention_sites(model: nn.Module) -> list[AttentionSite] | None:
    """The self-attention of every LightGlue inside `model`. Cross-attention stays dense: Lite3R has no form of it."""
    sites = []
    for name, module in model.named_modules():
        if not _is_lightglue(module):
            continue
        dot = f"{name}." if name else ""
        for i, layer in enumerate(module.transformers):  # pyright: ignore[reportArgumentType]
            attention = getattr(layer, "self_attn", None)
            if hasattr(attention, "Wqkv") and hasattr(layer, "cross_attn"):
                heads = attention.num_heads
                head_dim = attention.Wqkv.out_features // (3 * heads)
                sites.append(AttentionSite(f"{dot}transformers.{i}.self_attn", "frame", head_dim, Routed(heads)))
    return sites or None


@hookimpl
def lite3r_outputs(model: nn.Module) -> OutputsFunction | None:
    """What a LightGlue returns, as what is to stay as it is: see `assignment`."""
    return assignment if _is_lightglue(model) else None


def assignment(output: Mapping[str, Any]) -> ModelOutputs:
    """The logarithms of the probabilities of all matches ``[B, M + 1, N + 1]``, cut off smoothly at `UNLIKELY`: thousands of keypoints
    that do not match at all would outweigh the few that do. Of a class that does not return them, the scores of the best matches.
    """
    scores = output.get("log_assignment")
    if scores is None:
        return ModelOutputs(other=(output["matching_scores0"], output["matching_scores1"]))
    return ModelOutputs(other=(F.softplus(scores - UNLIKELY),))


def _is_lightglue(module: nn.Module) -> bool:
    return isinstance(getattr(module, "transformers", None), nn.ModuleList) and hasattr(module, "log_assignment")


def morton_order(keypoints: Tensor) -> Tensor:
    """Indices ``[B, N]`` that sort keypoints ``[B, N, 2]`` along a Morton curve.

    Each coordinate becomes a whole number in one common unit, and the bits of the two are interleaved. Points with the same
    leading bits lie in the same cell of a quadtree, so that a run of consecutive points is a compact part of the image.
    """
    if not keypoints.shape[-2]:
        return torch.zeros_like(keypoints[..., 0], dtype=torch.long)
    low = keypoints.amin(-2, keepdim=True)
    extent = (keypoints - low).amax((-2, -1), keepdim=True).clamp_min(torch.finfo(keypoints.dtype).tiny)
    cell = ((keypoints - low) / extent * (2**MORTON_BITS - 1)).long()
    bits = torch.arange(MORTON_BITS, device=keypoints.device)
    x, y = ((cell[..., None] >> bits) & 1).unbind(-2)
    return ((x << 2 * bits) + (y << 2 * bits + 1)).sum(-1).argsort(dim=-1, stable=True)


def sort_features(features: dict[str, Tensor]) -> dict[str, Tensor]:
    """The features of an image, as LightGlue takes them, with all that there is per keypoint in `morton_order`."""
    order = morton_order(features["keypoints"])
    return {name: _reorder(x, order) if x.shape[:2] == order.shape and name != "image_size" else x for name, x in features.items()}


def _reorder(x: Tensor, order: Tensor) -> Tensor:
    return x.gather(1, order.reshape(*order.shape, *[1] * (x.ndim - 2)).expand_as(x))
