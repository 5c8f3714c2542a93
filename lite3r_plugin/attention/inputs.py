"""What every way of making q, k and v hands to attention, and how it refuses what attention cannot do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from ..ops.qk_norm_rope import HeadNorm

if TYPE_CHECKING:
    from .module import SparseLinearAttention


@dataclass(frozen=True)
class AttentionInputs:
    """Queries, keys and values ``[B, H, N, D]`` with what is still to be done to q and k before attention."""

    q: Tensor
    k: Tensor
    v: Tensor
    q_norm: HeadNorm | None = None
    k_norm: HeadNorm | None = None
    positions: Tensor | None = None
    rope_base: float | None = None
    scale: float | None = None


def refusal(module: SparseLinearAttention, what: str) -> str:
    """The message for a forward that asked for `what`."""
    return (
        f"site {module.site.fqn!r} was given {what}, which sparse-linear attention does not support. Run it inside "
        "lite3r_disabled(model), or leave its scope out of Lite3RConfig.scopes"
    )
