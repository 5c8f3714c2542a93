"""Dense heads that several families have: DPT's, and MoGe's of convolutions, over whose feature maps kernels of Lite3R can pass."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from lite3r_plugin.adapter import ExactRewrite
from lite3r_plugin.runtime.maps import map_kernels

VIEWS, ROWS, COLUMNS = 2, 2, 3  # of patches, in the small call of a trial


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


def _vggt(head: Any) -> tuple[Any, ...]:
    """``(layers [B, S, P, C], images [B, S, 3, H, W], special tokens)``"""
    read, width = head.intermediate_layer_idx, head.projects[0].in_channels
    layers = [_random(1, VIEWS, 1 + ROWS * COLUMNS, width) for _ in range(max(*read, -min(read)) + 1)]
    return layers, _random(1, VIEWS, 3, ROWS * head.patch_size, COLUMNS * head.patch_size), 1


def _depth_anything(head: Any) -> tuple[Any, ...]:
    """``(layers [S, P, C], H, W, special tokens)``, and images ``[S, 3, H, W]`` where Gaussians are predicted."""
    width, size = head.projects[0].in_channels, (ROWS * head.patch_size, COLUMNS * head.patch_size)
    layers = [_random(VIEWS, 1 + ROWS * COLUMNS, width) for _ in head.projects]
    images = (_random(VIEWS, 3, *size),) if "images" in _arguments(head, "_forward_impl") else ()
    return layers, *size, 1, *images


def _moge(head: Any) -> tuple[Any, ...]:
    """``(tokens [S, P, C], no image, rows, columns)``"""
    project = next((part for part in head.projects.modules() if isinstance(part, nn.Linear)), None)
    first: Any = head.upsample_blocks[0][0][0]
    width = project.in_features if project is not None else first.in_channels - (2 if head.using_uv else 0)
    return _random(VIEWS, ROWS * COLUMNS, width), None, ROWS, COLUMNS


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
"""By a method and its first arguments, all arguments of a small call."""
