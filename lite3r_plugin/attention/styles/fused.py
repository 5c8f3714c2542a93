"""Sites where one Linear makes q, k and v."""

from __future__ import annotations

from torch import Tensor, nn

from ...adapter.sites import AttentionSite, FusedQKV
from .base import SiteModule
from .parts import part_of, rows_of_heads
from .projected import ProjectedStyle


class FusedStyle(ProjectedStyle):
    """The style of `FusedQKV`: ``qkv(x).view(B, N, 3, H, D)``."""

    def __init__(self, site: AttentionSite, host: nn.Module, spec: FusedQKV) -> None:
        super().__init__(site, host, spec)
        self.qkv = spec.qkv

    @property
    def input_linears(self) -> dict[str, int]:
        return {self.qkv: 3}

    def project(self, module: SiteModule, x: Tensor, heads: slice | None = None) -> tuple[Tensor, Tensor, Tensor]:
        linear, (count, dim) = module.child(self.qkv), self.shape
        made = linear(x) if heads is None else part_of(linear, x, rows_of_heads(heads, dim, count, times=3))
        q, k, v = made.unflatten(-1, (3, -1, dim)).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v
