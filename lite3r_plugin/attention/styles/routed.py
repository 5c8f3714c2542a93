"""Sites where the host's forward runs, and its one call of attention is sent to ours."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ...adapter.sites import AttentionSite, Routed
from ...errors import UnsupportedAttentionError
from ..inputs import AttentionInputs, refusal
from .base import ProjectionStyle, SiteModule


class RoutedStyle(ProjectionStyle):
    """The style of `Routed`.

    Attributes:
        same_tokens: As in `Routed`.
        attended_to_itself: Whether a call with several arguments was seen to be no cross-attention, which a compiler cannot see.
    """

    def __init__(self, site: AttentionSite, host: nn.Module, spec: Routed) -> None:
        super().__init__(site, host)
        self.same_tokens = spec.same_tokens
        self.attended_to_itself = False

    def run(self, module: SiteModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The host's forward with sparse-linear attention.

        Raises:
            UnsupportedAttentionError: the host calls `scaled_dot_product_attention` not once, or in a way that has no
                sparse form; or its queries are of other tokens than its values, which is cross-attention.
        """
        if not module.sparse:
            return module.run_host(*args, **kwargs)
        families = [] if self.same_tokens else _families((args, kwargs))
        calls = 0
        learns = torch.is_grad_enabled()

        def attend(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
            nonlocal calls
            calls += 1
            refused = None
            if attn_mask is not None:
                refused = "an attention mask"
            elif is_causal:
                refused = "causal attention"
            elif dropout_p:
                refused = "dropout of attention weights"
            else:
                refused = self._wrong_heads(query, key, value)
            if refused is None and learns and not torch.is_grad_enabled():
                refused = "attention without gradients in a forward with them, as of reentrant gradient checkpointing inside the module, "
                refused += "which would be dense when it is run again (checkpoint the module as a whole)"
            if refused is None and families:
                refused = self._crossing(families, query, value)
            if refused is not None:
                raise UnsupportedAttentionError(refusal(self.site.fqn, refused))
            return module.attend(AttentionInputs(query, key, value, scale=scale))

        with _Redirect(attend, families):
            out = module.run_host(*args, **kwargs)
        if calls != 1:
            raise UnsupportedAttentionError(
                f"site {self.site.fqn!r}: its forward called scaled_dot_product_attention {calls} times, not once, so "
                "Lite3R cannot take its place. Switch the host to its SDPA attention (transformers: "
                'attn_implementation="sdpa"; timm: fused_attn=True), or correct the adapter'
            )
        return out

    def _wrong_heads(self, query: Tensor, key: Tensor, value: Tensor) -> str | None:
        """What to refuse because of the shapes, or None."""
        dim = self.site.head_dim
        if query.shape[-2] != key.shape[-2]:
            return f"cross-attention of {query.shape[-2]} queries to {key.shape[-2]} keys"
        if query.shape[:-2] != key.shape[:-2] or query.shape[:-2] != value.shape[:-2]:
            return f"grouped-query attention, keys of shape {tuple(key.shape)} for queries of {tuple(query.shape)}"
        if query.dim() != 4 or query.shape[-1] != dim or value.shape[-1] != dim:
            return f"heads of shape {tuple(query.shape)} where the adapter says head_dim={dim}"
        return None

    def _crossing(self, families: list[list[Tensor]], query: Tensor, value: Tensor) -> str | None:
        """What to refuse if the value comes from an argument that the query does not come from; None if that is not so."""
        of_query = [any(query is member for member in family) for family in families]
        of_value = [any(value is member for member in family) for family in families]
        known = any(of_query) and any(of_value)
        hint = "if those are the same tokens, let the adapter say Routed(same_tokens=True)"
        if any(v and not q for q, v in zip(of_query, of_value, strict=True)):
            return f"cross-attention, whose queries and values come from different arguments of its forward ({hint})"
        if torch.compiler.is_compiling():  # which does not show how `q, k, v = qkv` unpacks a tensor
            if not known and not self.attended_to_itself:
                return f"what torch.compile cannot tell from cross-attention (run the model without it once before; {hint})"
        elif known:
            self.attended_to_itself = True
        elif any(of_query):
            return f"values that come from no argument of its forward ({hint})"
        return None


class _Redirect(TorchFunctionMode):
    """Sends the calls of `scaled_dot_product_attention` inside its context to `attend`; keeps `families` up to date.

    A family is a floating-point argument of the host's forward with all tensors that were computed from it. They are
    kept only where there is more than one such argument.
    """

    def __init__(self, attend: Any, families: list[list[Tensor]]) -> None:
        super().__init__()
        self.attend = attend
        self.families = families

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self.attend(*args, **kwargs)
        if func is Tensor.unflatten:
            func = torch.unflatten  # the same; Dynamo of torch 2.11 cannot trace the method from here
        out = func(*args, **kwargs)
        if self.families:
            given = list(_tensors((args, kwargs)))
            made = given[:1] if out is None else list(_tensors(out))  # nothing comes back: the first argument was written to
            for family in self.families:
                if any(x is member for x in given for member in family):
                    family.extend(made)
        return out


def _families(arguments: Any) -> list[list[Tensor]]:
    """One family for each distinct floating-point tensor of `arguments`; none where there is only one."""
    distinct: list[Tensor] = []
    for x in _tensors(arguments):
        if x.is_floating_point() and x.dim() > 1 and not any(x is other for other in distinct):
            distinct.append(x)
    return [[x] for x in distinct] if len(distinct) > 1 else []


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
