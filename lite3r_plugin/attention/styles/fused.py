"""Sites where one Linear makes q, k and v."""

from __future__ import annotations

from torch import Tensor, nn

from ...adapter.sites import AttentionSite, FusedQKV
from .base import SiteModule
from .projected import ProjectedStyle


class FusedStyle(ProjectedStyle):
    """The style of `FusedQKV`: ``qkv(x).view(B, N, 3, H, D)``."""

    def __init__(self, site: AttentionSite, host: nn.Module, spec: FusedQKV) -> None:
        super().__init__(site, host, spec)
        self.qkv = spec.qkv

    @property
    def input_linears(self) -> dict[str, int]:
        return {self.qkv: 3}

    def project(self, module: SiteModule, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = module.child(self.qkv)(x).unflatten(-1, (3, *self.shape)).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v
