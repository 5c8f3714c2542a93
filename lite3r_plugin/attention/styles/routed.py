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
from ..inputs import AttentionInputs
from .base import ProjectionStyle, SiteModule, child_of


class RoutedStyle(ProjectionStyle):
    """The style of `Routed`.

    Attributes:
        out, same_tokens: As in `Routed`.
        crossed: Whether keys and values are of other tokens than queries, which the site knows.
        sees_views: Whether a sequence may be of several views, so that a mask may be frame-causal.
        attended_to_itself: Whether a call with several arguments was seen to be no cross-attention, which a compiler cannot see.
    """

    def __init__(self, site: AttentionSite, host: nn.Module, spec: Routed) -> None:
        super().__init__(site, host)
        self.out = spec.out
        self.same_tokens = spec.same_tokens
        self.crossed = site.keys is not None
        self.sees_views = site.scope == "global" and site.tokens is not None
        self.attended_to_itself = False

    def check(self, host: nn.Module) -> None:
        if self.out is not None:
            child_of(host, self.out, self.site.fqn)

    def run(self, module: SiteModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The host's forward with sparse-linear attention.

        A call of `scaled_dot_product_attention` that has no sparse form, as of cross-attention, where queries are of other tokens than
        values, runs as the host wants it. So does all of the forward where there are several calls, or none.

        Raises:
            UnsupportedAttentionError: there are several, but it was given what may remember the first; or a compiler hides whether it is
                cross-attention.
        """
        if not module.sparse:
            return module.run_host(*args, **kwargs)
        families = [] if self.same_tokens or self.crossed else _families((args, kwargs))
        calls = 0
        learns = torch.is_grad_enabled()

        def attend(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
            nonlocal calls
            calls += 1
            if calls > 1:
                raise _SeveralCallsError
            refused = None
            if attn_mask is not None and not (self.sees_views and attn_mask.shape[-2:] == (query.shape[-2], key.shape[-2])):
                refused = "its attention has a mask or a bias"
            elif is_causal:
                refused = "its attention is causal"
            elif dropout_p:
                refused = "it drops attention weights by chance"
            elif scale is not None and not scale >= 0:  # of which the blocks with the highest scores are others
                refused = "the scale of its scores is negative"
            else:
                refused = self._wrong_heads(query, key, value)
            if refused is None and learns and not torch.is_grad_enabled():
                refused = "it attends without gradients in a forward with them, as of reentrant gradient checkpointing inside the module, "
                refused += "and would be dense when it is run again (checkpoint the module as a whole)"
            if refused is None and families and not self.crossed:
                refused = self._crossing(families, query, value)
            if refused is not None:
                module.note(refused)
                options: dict[str, Any] = dict(attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale)
                return F.scaled_dot_product_attention(query, key, value, enable_gqa=enable_gqa, **options)
            query, key, value = (_as_autocast_has_it(x) for x in (query, key, value))
            inputs = AttentionInputs(query, key, value, scale=scale, crossed=self.crossed and attn_mask is None, mask=attn_mask)
            return module.attend(inputs, args, kwargs)

        try:
            with _Redirect(attend, families):
                out = module.run_host(*args, **kwargs)
        except _SeveralCallsError:
            reason = "its forward calls scaled_dot_product_attention several times"
            if any(not isinstance(x, _HARMLESS) for x in _leaves((args, kwargs))):
                raise UnsupportedAttentionError(
                    f"site {self.site.fqn!r}: {reason}, and it was given an object that may remember the first call, so that it cannot be "
                    f"begun again: leave it to the host by apply_lite3r(model, exclude=({self.site.fqn!r},))"
                ) from None
            module.leave_to_host(reason)
            return module.run_host(*args, **kwargs)
        if not calls:
            module.note(f"its forward does not call scaled_dot_product_attention{_way_out(module)}")
        return out

    def _wrong_heads(self, query: Tensor, key: Tensor, value: Tensor) -> str | None:
        """What to refuse because of the shapes, or None."""
        dim = self.site.head_dim
        if query.shape[-2] != key.shape[-2] and not self.crossed:
            return "it is cross-attention, of queries to another number of keys"
        if query.shape[:-2] != key.shape[:-2] or query.shape[:-2] != value.shape[:-2]:
            return "several heads of queries share one of keys"
        if query.dim() != 4 or query.shape[-1] != dim or value.shape[-1] != dim:
            return f"its attention is of shape {tuple(query.shape)} where the adapter says [B, H, N, D] with head_dim={dim}"
        return None

    def _crossing(self, families: list[list[Tensor]], query: Tensor, value: Tensor) -> str | None:
        """What to refuse if the value comes from an argument that the query does not come from; None if that is not so."""
        of_query = [any(query is member for member in family) for family in families]
        of_value = [any(value is member for member in family) for family in families]
        known = any(of_query) and any(of_value)
        hint = "if those are the same tokens, let the adapter say Routed(same_tokens=True)"
        if any(v and not q for q, v in zip(of_query, of_value, strict=True)):
            return f"it is cross-attention, whose queries and values come from different arguments of its forward ({hint})"
        if torch.compiler.is_compiling():  # which does not show how `q, k, v = qkv` unpacks a tensor
            if not known and not self.attended_to_itself:
                raise UnsupportedAttentionError(
                    f"site {self.site.fqn!r}: torch.compile cannot tell its attention from cross-attention: run the model without it once "
                    f"before; {hint}"
                )
        elif known:
            self.attended_to_itself = True
        elif any(of_query):
            return f"its values come from no argument of its forward ({hint})"
        return None


def _as_autocast_has_it(x: Tensor) -> Tensor:
    """What `scaled_dot_product_attention` computes with inside of autocast: tensors in its dtype, but for those in FP64."""
    device = x.device.type
    if x.is_meta or x.dtype == torch.float64 or not torch.is_autocast_enabled(device):  # which knows no meta device
        return x
    return x.to(torch.get_autocast_dtype(device))


_HARMLESS = (Tensor, bool, int, float, str, type(None), torch.dtype, torch.device)


class _SeveralCallsError(Exception):
    """Ends a forward at its second call of attention."""


def _way_out(module: Any) -> str:
    """How the host is brought to call attention as one function."""
    if hasattr(module, "fused_attn"):
        return ": set fused_attn=True on it before apply_lite3r"
    if hasattr(module, "attn_implementation"):
        return ': set attn_implementation="flash_attention" on it before apply_lite3r'
    if hasattr(getattr(module, "config", None), "_attn_implementation"):
        return ': call model.set_attn_implementation("sdpa")'
    return ""


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
    return (x for x in _leaves(value) if isinstance(x, Tensor))


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, dict):
        yield from _leaves(tuple(value.values()))
    else:
        yield value
