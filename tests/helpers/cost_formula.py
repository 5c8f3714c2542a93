"""The formula of `AttentionCosts`, anew, and costs to try it with."""

from __future__ import annotations

from lite3r_plugin.costs.model import AttentionCosts

SLOW = AttentionCosts(dense=3e-8, slowdown=2.0, per_token=1e-5, per_call=0.2)


def modelled(costs: AttentionCosts, tokens: int, share: float | None) -> float:
    """Milliseconds of attention by the docstring's formula; dense without a share."""
    if share is None:
        return costs.dense * tokens**2
    return costs.slowdown * share * costs.dense * tokens**2 + costs.per_token * tokens + costs.per_call
