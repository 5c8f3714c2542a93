"""Sites where three Linears make q, k and v."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ...adapter.sites import AttentionSite, SeparateQKV
from .base import SiteModule
from .parts import part_of, rows_of_heads
from .projected import ProjectedStyle


class SeparateStyle(ProjectedStyle):
    """The style of `SeparateQKV`."""

    def __init__(self, site: AttentionSite, host: nn.Module, spec: SeparateQKV) -> None:
        super().__init__(site, host, spec)
        self.linears = (spec.q, spec.k, spec.v)
        self.returns_weights = spec.returns_weights

    @property
    def input_linears(self) -> dict[str, int]:
        return dict.fromkeys(self.linears, 1)

    def project(self, module: SiteModule, x: Tensor, heads: slice | None = None) -> tuple[Tensor, Tensor, Tensor]:
        if heads is None:
            return self.project_across(module, x, x, x)
        count, dim = self.shape
        made = (part_of(module.child(name), x, rows_of_heads(heads, dim, count)) for name in self.linears)
        q, k, v = (part.unflatten(-1, (-1, dim)).transpose(1, 2) for part in made)
        return q, k, v

    def project_across(self, module: SiteModule, x: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q ``[B, H, N, D]``, k and v ``[B, H, M, D]`` of hidden states ``[B, N, C]``, and of ``[B, M, C]`` for each of keys and values."""
        made = zip(self.linears, (x, key, value), strict=True)
        q, k, v = (module.child(name)(tokens).unflatten(-1, self.shape).transpose(1, 2) for name, tokens in made)
        return q, k, v

    def returned(self, out: Tensor) -> Any:
        """The output, in a pair with None in the place of attention weights where the host returns such a pair."""
        return (out, None) if self.returns_weights else out

    def compared(self, result: Any) -> Any:
        """Without attention weights, which the site does not make."""
        return result[0] if self.returns_weights and isinstance(result, tuple) and len(result) == 2 else result
