"""Dense heads that several families have: DPT's, and MoGe's of convolutions, over whose feature maps kernels of Lite3R can pass."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from lite3r_plugin.adapter import ExactRewrite
from lite3r_plugin.runtime.maps import map_kernels

SIZES = ((1, 2, 3), (2, 3, 2))  # views, rows and columns of patches


def head_kernels(model: nn.Module) -> list[ExactRewrite]:
    """Kernels for the feature maps of each dense head inside `model`, which is told by its parts and the arguments of a method."""
    found: list[ExactRewrite] = []
    for fqn, module in model.named_modules():
        if not hasattr(module, "scratch") and not hasattr(module, "upsample_blocks"):
            continue
        for (method, *first), inputs in _INPUTS.items():
            if _arguments(module, method)[: len(first)] == first:
                found.append(map_kernels(fqn, inputs, method))
                break
    return found


def _vggt(head: Any) -> list[tuple[Any, ...]]:
    """``(layers [B, S, P, C], images [B, S, 3, H, W], special tokens)``"""
    read, width, patch = head.intermediate_layer_idx, head.projects[0].in_channels, head.patch_size
    calls = []
    for views, rows, columns in SIZES:
        layers = [_random(1, views, 1 + rows * columns, width) for _ in range(max(*read, -min(read)) + 1)]
        calls.append((layers, _random(1, views, 3, rows * patch, columns * patch), 1))
    return calls


def _depth_anything(head: Any) -> list[tuple[Any, ...]]:
    """``(layers [S, P, C], H, W, special tokens)``, and images ``[S, 3, H, W]`` where Gaussians are predicted."""
    width, patch = head.projects[0].in_channels, head.patch_size
    calls = []
    for views, rows, columns in SIZES:
        height, wide = rows * patch, columns * patch
        layers = [_random(views, 1 + rows * columns, width) for _ in head.projects]
        images = (_random(views, 3, height, wide),) if "images" in _arguments(head, "_forward_impl") else ()
        calls.append((layers, height, wide, 1, *images))
    return calls


def _moge(head: Any) -> list[tuple[Any, ...]]:
    """``(tokens [S, P, C], no image, rows, columns)``"""
    project = next((part for part in head.projects.modules() if isinstance(part, nn.Linear)), None)
    first: Any = head.upsample_blocks[0][0][0]
    width = project.in_features if project is not None else first.in_channels - (2 if head.using_uv else 0)
    return [(_random(views, rows * columns, width), None, rows, columns) for views, rows, columns in SIZES]


def _arguments(module: nn.Module, method: str) -> list[str]:
    try:
        return list(inspect.signature(getattr(module, method)).parameters)
    except Exception:  # there is none, or whatever a `__signature__` of somebody else raises
        return []


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(0), device="cpu")


_INPUTS = {
    ("forward", "aggregated_tokens_list", "images", "patch_start_idx"): _vggt,
    ("_forward_impl", "feats", "H", "W", "patch_start_idx"): _depth_anything,
    ("forward", "hidden_states", "image", "patch_h", "patch_w"): _moge,
}
"""By a method and its first arguments, those of small calls."""
