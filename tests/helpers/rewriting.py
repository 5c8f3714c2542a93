"""Exact rewrites put into a model by themselves, without the rest of Lite3R."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from lite3r_plugin.adapter import ExactRewrite
from lite3r_plugin.runtime.exact import KeptInFp32
from lite3r_plugin.runtime.rewrites import Rewrites, plan_rewrites
from lite3r_plugin.wrapper import Changes


def rewrite_exactly(model: nn.Module, wanted: Callable[[ExactRewrite], bool] = lambda rewrite: True) -> Rewrites | None:
    """Put all exact rewrites into `model` that agree with it, those for weights in BF16 too. Returns what was done, and what was not."""
    modules = dict(model.named_modules(remove_duplicate=False))
    rewrites = plan_rewrites(model, modules, wanted)
    if rewrites is None:
        return None
    with Changes() as changes:
        rewrites.put_in(changes, modules)
    for module in modules.values():
        if isinstance(module, KeptInFp32):
            module.float()
    return rewrites
