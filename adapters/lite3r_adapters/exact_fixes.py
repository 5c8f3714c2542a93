"""Exact fixes of VGGT and Depth Anything 3, one module each; see `lite3r_plugin.adapter.hookspecs.lite3r_optimize`."""

from __future__ import annotations

from torch import nn

from lite3r_plugin import hookimpl

from . import _da3_strong, _vggt_strong


@hookimpl
def lite3r_optimize(model: nn.Module) -> list[str] | None:
    """Fix `model` in place if it is one of these models."""
    return _vggt_strong.optimize(model) or _da3_strong.optimize(model)
