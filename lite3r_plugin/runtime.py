"""Decisions that depend on the machine."""

from __future__ import annotations

import torch

BREAK_EVEN_TOKENS_CUDA = 8192
BREAK_EVEN_TOKENS_CPU = 4096


def break_even_tokens(device: torch.device, keep_ratio: float) -> int:
    """Sequence length below which dense attention is at least as fast as sparse attention with this keep ratio."""
    return BREAK_EVEN_TOKENS_CUDA if device.type == "cuda" else BREAK_EVEN_TOKENS_CPU
