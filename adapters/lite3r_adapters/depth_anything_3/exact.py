"""Exact rewrites of Depth Anything 3: the same numbers up to rounding, fewer launches, no waits for the GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lite3r_plugin.adapter import ExactRewrite, RewrittenMethod, Trial, like
from lite3r_plugin.runtime.exact import in_fp32, kept_embedding, output_in_fp32, table_rope, token_positions
from lite3r_plugin.runtime.maps import map_kernels
from lite3r_plugin.runtime.patches import patch_products

from .. import _blocks, _dpt


def rewrites(model: nn.Module) -> list[ExactRewrite] | None:
    """Exact rewrites of every Depth Anything 3 encoder and head inside `model`; None where there is no encoder."""
    modules: dict[str, Any] = dict(model.named_modules())
    encoders = {fqn: m for fqn, m in modules.items() if hasattr(m, "_prepare_rope") and hasattr(m, "alt_start")}
    if not encoders:
        return None
    found: list[ExactRewrite] = []
    for fqn, encoder in encoders.items():
        if isinstance(encoder.rope, nn.Module) and hasattr(encoder.rope, "base_frequency"):
            found.append(table_rope(_join(fqn, "rope"), _blocks.head_dim(encoder.blocks[0].attn)))
            found.append(ExactRewrite(fqn, "token positions kept", KeptPositions, _trial, "_prepare_rope"))
        if isinstance(getattr(encoder, "patch_embed", None), nn.Module):
            found += patch_products(_join(fqn, "patch_embed"), encoder.patch_embed)
    for fqn, module in modules.items():
        if hasattr(module, "_add_pos_embed") and hasattr(module, "scratch"):
            found += [*kept_embedding(fqn, "_add_pos_embed", 8), *_dpt.fusion_blocks(fqn, module)]
            found.append(map_kernels(fqn, _head_call, "_forward_impl"))
            found.append(output_in_fp32(_join(fqn, "scratch.output_conv2")))
            if hasattr(module.scratch, "output_conv2_aux"):
                found.append(output_in_fp32(_join(fqn, f"scratch.output_conv2_aux.{len(module.scratch.output_conv2_aux) - 1}")))
        if isinstance(getattr(module, "cam_dec", None), nn.Module):
            found += in_fp32(_join(fqn, "cam_dec"))  # its last Linears are given FP32 by the host whatever the weights are
    return found or None


class KeptPositions(RewrittenMethod):
    """Coordinates of the tokens of an encoder, those of a view kept."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module, "_prepare_rope")

    def rewritten(self, B: int, S: int, H: int, W: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Coordinates ``[B, S, P, 2]`` for local blocks, and for global ones, where all patches share one."""
        encoder: Any = self.module
        local = token_positions(B * S, H // encoder.patch_size, W // encoder.patch_size, encoder.patch_start_idx, device)
        return local.unflatten(0, (B, S)), local.clamp(max=1).unflatten(0, (B, S))


def _trial(encoder: nn.Module) -> Trial:
    patch: Any = encoder.patch_size
    cpu = torch.device("cpu")
    small = like(encoder, rope=nn.Identity())
    return Trial(small, [(1, 1, 2 * patch, 2 * patch, cpu), (2, 3, 2 * patch, 3 * patch, cpu), (1, 2, 4 * patch, patch, cpu)])


def _head_call(head: Any) -> tuple[Any, ...]:
    """``(layers [S, P, C], H, W, special tokens)`` of two small views, and images ``[S, 3, H, W]`` where Gaussians are predicted."""
    generator = torch.Generator("cpu").manual_seed(0)
    size = 2 * head.patch_size, 3 * head.patch_size
    layers = torch.randn(len(head.projects), 2, 1 + 2 * 3, head.projects[0].in_channels, generator=generator, device="cpu")
    images = (torch.rand(2, 3, *size, generator=generator, device="cpu"),) if hasattr(head, "images_merger") else ()
    return list(layers), *size, 1, *images


def _join(fqn: str, name: str) -> str:
    return f"{fqn}.{name}" if fqn else name
