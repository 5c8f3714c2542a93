"""The ways in which a site makes q, k and v and uses the attention output, one per class in `sites`."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ...adapter.sites import AttentionSite, FusedQKV, Routed, SeparateQKV
from ...errors import AdapterError, UnsupportedAttentionError
from ...fp8.linear import Fp8Linear
from ...ops.qk_norm_rope import HeadNorm
from ...wrapper import has_forward_hooks
from ..inputs import AttentionInputs, refusal
from . import routed

if TYPE_CHECKING:
    from ..module import SparseLinearAttention


def check(host: nn.Module, site: AttentionSite) -> None:
    """Raise `AdapterError` unless `host` has the children that `site` names, in the right sizes."""
    spec = site.projections
    if isinstance(spec, Routed):
        return
    width = spec.num_heads * site.head_dim
    if isinstance(spec, FusedQKV):
        linears = {spec.qkv: (None, 3 * width), spec.out: (width, None)}
    else:
        linears = {spec.q: (None, width), spec.k: (None, width), spec.v: (None, width), spec.out: (width, None)}
    for name, (inputs, outputs) in linears.items():
        child = _child(host, name, site)
        for what, expected in (("in_features", inputs), ("out_features", outputs)):
            found = getattr(child, what, None)
            if expected is not None and found is not None and found != expected:
                raise AdapterError(
                    f"site {site.fqn!r}: {name}.{what} is {found}, but {spec.num_heads} heads of {site.head_dim} need {expected}; "
                    "correct num_heads or head_dim in the adapter"
                )
    for name in (spec.q_norm, spec.k_norm, spec.out_drop, spec.attn_drop):
        if name is not None:
            _child(host, name, site)
    if spec.positions is not None and spec.positions not in inspect.signature(host.forward).parameters:
        raise AdapterError(f"site {site.fqn!r}: the host's forward has no argument {spec.positions!r}")
    if spec.rope is not None and site.head_dim % 4:
        raise AdapterError(f"site {site.fqn!r}: an axial rotary embedding needs a head_dim that is a multiple of 4, not {site.head_dim}")


def takes_fp8(module: SparseLinearAttention) -> bool:
    """Whether the site's input may be in FP8 already: nothing but its FP8 Linears reads it."""
    spec = module.site.projections
    if isinstance(spec, Routed) or not module.state.config.fuse:
        return False
    names = (spec.qkv,) if isinstance(spec, FusedQKV) else (spec.q, spec.k, spec.v)
    linears = [getattr(module, name) for name in names]
    return all(isinstance(linear, Fp8Linear) and linear.takes_fp8 for linear in linears)


def run(module: SparseLinearAttention, *args: Any, **kwargs: Any) -> Any:
    """The forward of a site: project, attend, project out."""
    spec = module.site.projections
    if isinstance(spec, Routed) or not module.state.config.fuse:
        return routed.run(module, *args, **kwargs)
    x, positions, refused = _arguments(module, spec.positions, args, kwargs)
    if refused is None and module.training and spec.attn_drop is not None and getattr(module, spec.attn_drop).p > 0:
        refused = "dropout of attention weights"
    if refused is not None:
        if module.sparse:
            raise UnsupportedAttentionError(refusal(module, refused))
        return module.run_host(*args, **kwargs)
    shape = (spec.num_heads, module.site.head_dim)
    if isinstance(spec, FusedQKV):
        q, k, v = getattr(module, spec.qkv)(x).unflatten(-1, (3, *shape)).permute(2, 0, 3, 1, 4).unbind(0)
    else:
        q, k, v = (getattr(module, name)(x).unflatten(-1, shape).transpose(1, 2) for name in (spec.q, spec.k, spec.v))
    q, q_norm = _norm(module, spec.q_norm, q)
    k, k_norm = _norm(module, spec.k_norm, k)
    base = spec.rope.base if spec.rope is not None and positions is not None else None
    out = module.attend(AttentionInputs(q, k, v, q_norm, k_norm, positions, base))
    linear = getattr(module, spec.out)
    out = linear.of_heads(out) if isinstance(linear, Fp8Linear) else linear(out.transpose(1, 2).flatten(2))
    if spec.out_drop is not None:
        out = getattr(module, spec.out_drop)(out)
    return (out, None) if isinstance(spec, SeparateQKV) and spec.returns_weights else out


def head_norm(norm: nn.Module, dim: int) -> HeadNorm | None:
    """`norm` as data for the fused kernel; None when it is not a LayerNorm or RMSNorm over exactly `dim` features."""
    if type(norm) is nn.LayerNorm and norm.normalized_shape == (dim,):
        return HeadNorm("layer", norm.weight, norm.bias, norm.eps)
    if type(norm) is nn.RMSNorm and norm.normalized_shape == (dim,):
        return HeadNorm("rms", norm.weight, None, torch.finfo(torch.float32).eps if norm.eps is None else norm.eps)
    return None


def _arguments(
    module: SparseLinearAttention, positions: str | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor | None, str | None]:
    """The hidden states, the positions, and what else was given that sparse attention cannot honour (or None)."""
    names = module.argument_names
    given = dict(zip(names, args, strict=False)) | kwargs
    if names[0] not in given:
        raise AdapterError(f"site {module.site.fqn!r} was called without {names[0]!r}, its first argument: describe it as Routed()")
    x = given.pop(names[0])
    given |= {f"number {i + 1}": value for i, value in enumerate(args) if i >= len(names)}  # of a host with *args
    where = given.pop(positions, None) if positions is not None else None
    refused = [name for name, value in given.items() if value is not None and value is not False]
    return x, where, f"the argument(s) {refused}" if refused else None


def _norm(module: SparseLinearAttention, name: str | None, x: Tensor) -> tuple[Tensor, HeadNorm | None]:
    """`x` and the norm left to the kernel; a norm that the kernel does not know is applied here."""
    norm = getattr(module, name) if name is not None else None
    if norm is None or type(norm) is nn.Identity:
        return x, None
    known = None if has_forward_hooks(norm) else head_norm(norm, x.shape[-1])
    return (x, known) if known is not None else (norm(x), None)


def _child(host: nn.Module, name: str, site: AttentionSite) -> nn.Module:
    child = getattr(host, name, None)
    if not isinstance(child, nn.Module):
        raise AdapterError(f"site {site.fqn!r}: {type(host).__name__} has no child {name!r}; correct the adapter's projections")
    return child
