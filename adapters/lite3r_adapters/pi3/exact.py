"""Exact rewrites of Pi3 and Pi3X: the same numbers up to rounding, fewer launches, no waits for the GPU."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from lite3r_plugin.adapter import ExactRewrite, RewrittenMethod, Trial, like
from lite3r_plugin.runtime.exact import in_fp32, not_in_bf16, table_rope, token_positions
from lite3r_plugin.runtime.maps import map_kernels
from lite3r_plugin.runtime.patches import patch_products

from .. import _blocks, _dinov2
from .sites import is_pi3

SQUARINGS = 24  # the largest of four eigenvalues stands out by 2^24 powers of its ratio to the next


def rewrites(model: nn.Module) -> list[ExactRewrite] | None:
    """Exact rewrites of every Pi3 inside `model`; None where there is none."""
    found: list[ExactRewrite] = []
    models: dict[str, Any] = {fqn: module for fqn, module in model.named_modules() if is_pi3(module)}
    for fqn, pi3 in models.items():
        join = functools.partial(_join, fqn)
        if isinstance(rope := getattr(pi3, "rope", None), nn.Module) and hasattr(rope, "base"):
            found.append(table_rope(join("rope"), _blocks.head_dim(pi3.decoder[0].attn)))
        if isinstance(encoder := getattr(pi3, "encoder", None), nn.Module):
            found += patch_products(*_dinov2.patch_embedding(join("encoder"), encoder))
        if hasattr(pi3, "decode") and hasattr(pi3, "position_getter"):
            found.append(ExactRewrite(fqn, "special tokens and token positions kept on the device", Decode, _trial, "decode"))
        if hasattr(getattr(pi3, "camera_head", None), "svd_orthogonalize"):
            words = "nearest rotations without a singular value decomposition, no wait for the GPU"
            found.append(ExactRewrite(join("camera_head"), words, NearestRotation, _rotation_trial, "svd_orthogonalize"))
        heads = [name for name in ("point_head", "conf_head", "camera_head") if isinstance(getattr(pi3, name, None), nn.Module)]
        for name in heads:
            if hasattr(getattr(pi3, name), "upsample_blocks"):  # Pi3X's; those of Pi3 are Linears
                found.append(map_kernels(join(name), _head_call))
            found += in_fp32(join(name))  # the host gives them FP32 whatever the weights are
        if hasattr(pi3, "metric_head") or not heads:
            found.append(not_in_bf16(fqn, "Pi3X, and what has other heads than Pi3, was not tried with weights in BF16"))
    return found or None


class Decode(RewrittenMethod):
    """The decoder of a Pi3, without copies from main memory."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module, "decode")

    def rewritten(self, hidden: Tensor, N: int, H: int, W: int) -> tuple[Tensor, Tensor]:
        """From ``[B * N, patches, C]`` to the last two layers side by side ``[B * N, P, 2C]`` and positions ``[B * N, P, 2]``."""
        model: Any = self.module
        views, batch = hidden.shape[0], hidden.shape[0] // N
        special = model.register_token[0].expand(views, -1, -1)
        x = torch.cat((special, hidden.reshape(views, -1, hidden.shape[-1])), 1)
        tokens = x.shape[1]
        pos = token_positions(views, H // model.patch_size, W // model.patch_size, model.patch_start_idx, x.device)
        layers: list[Tensor] = []
        for i, block in enumerate(model.decoder):
            shape = (batch, N * tokens) if i % 2 else (views, tokens)
            x = block(x.reshape(*shape, -1), xpos=pos.reshape(*shape, 2))
            if i + 2 >= len(model.decoder):
                layers.append(x.reshape(views, tokens, -1))
        return torch.cat(layers, -1), pos


class NearestRotation(RewrittenMethod):
    """The rotation nearest to a matrix, by the quaternion with the largest eigenvalue (Horn, JOSA A 4(4), 1987), in FP64."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module, "svd_orthogonalize")

    def rewritten(self, m: Tensor) -> Tensor:
        """From ``[B, 9]`` or ``[B, 3, 3]``, whose rows are normalised first, to rotations ``[B, 3, 3]``."""
        a = torch.nn.functional.normalize(m.reshape(-1, 3, 3), p=2, dim=-1).double()
        trace = a.diagonal(dim1=-2, dim2=-1).sum(-1)
        skew = torch.stack((a[:, 2, 1] - a[:, 1, 2], a[:, 0, 2] - a[:, 2, 0], a[:, 1, 0] - a[:, 0, 1]), -1)
        identity = torch.eye(3, dtype=a.dtype, device=a.device)
        inner = a + a.mT - trace[:, None, None] * identity
        top = torch.cat((trace[:, None], skew), -1)[:, None]
        form = torch.cat((top, torch.cat((skew[:, :, None], inner), -1)), -2)  # R of q is nearest where q form q is largest
        power = form + 3 * torch.eye(4, dtype=a.dtype, device=a.device)  # rows of length 1: no eigenvalue is below -3
        for _ in range(SQUARINGS):
            power = power @ power
            power = power / power.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
        column = power.diagonal(dim1=-2, dim2=-1).argmax(-1)[:, None, None].expand(-1, 4, 1)
        w, x, y, z = torch.nn.functional.normalize(power.gather(-1, column).squeeze(-1), dim=-1).unbind(-1)
        rows = (
            (1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
            (2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
            (2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
        )
        return torch.stack([torch.stack(row, -1) for row in rows], -2).to(m.dtype)


def _trial(module: nn.Module) -> Trial:
    model: Any = module
    width = model.register_token.shape[-1]
    small = like(module, decoder=nn.ModuleList(_SmallBlock(0.5 + i) for i in range(len(model.decoder))))
    generator = torch.Generator("cpu").manual_seed(0)
    inputs = []
    for batch, views, rows, columns in ((1, 1, 2, 2), (2, 3, 2, 3), (1, 2, 3, 1)):
        hidden = torch.rand(batch * views, rows * columns, width, generator=generator, device="cpu")
        inputs.append((hidden, views, rows * model.patch_size, columns * model.patch_size))
    return Trial(small, inputs)


def _rotation_trial(head: nn.Module) -> Trial:
    return Trial(like(head), [(torch.randn(16, 9, generator=torch.Generator("cpu").manual_seed(0), device="cpu"),)])


def _head_call(head: Any) -> tuple[Any, ...]:
    """``(tokens [S, P, C], no image, rows, columns)`` of two small views."""
    project = next((part for part in head.projects.modules() if isinstance(part, nn.Linear)), None)
    width = project.in_features if project is not None else head.upsample_blocks[0][0][0].in_channels - (2 if head.using_uv else 0)
    return torch.randn(2, 2 * 3, width, generator=torch.Generator("cpu").manual_seed(0), device="cpu"), None, 2, 3


class _SmallBlock(nn.Module):
    """Mixes tokens of a sequence, and lets positions, their order and its own place count."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor, xpos: Tensor) -> Tensor:
        mixed = 0.5 * x + 0.25 * x.roll(1, 1) + 0.01 * self.scale * x.mean(1, keepdim=True)
        return mixed + 0.01 * self.scale * (xpos.to(x.dtype) @ xpos.new_tensor([[1], [3]], dtype=x.dtype))


def _join(fqn: str, name: str) -> str:
    return f"{fqn}.{name}" if fqn else name
