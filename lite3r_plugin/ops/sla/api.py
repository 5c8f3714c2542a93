"""The public entry: `sparse_linear_attention`, from q, k, v in host order to the output in host order, and what it refuses."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple, get_args, overload

import torch
from torch import Tensor

from ...errors import BackendError, ConfigError, shown
from ..block_map import SegmentMask
from ..dispatch import require_one_device, under_trace, use_triton, without_autocast
from ..options import (
    Backend,
    FeatureMap,
    LinearBranch,
    check_block_choice,
    check_choice,
    check_ratio,
    check_rope_base,
    check_share,
    is_int,
    is_number,
)
from ..qk_norm_rope import NO_NORM, HeadNorm, norm_tensors
from . import forward, naive, operators
from .signature import INPUTS, Arguments

LARGEST_BLOCK = 2**15
_CHOICES = {"linear": get_args(LinearBranch), "feature_map": get_args(FeatureMap), "backend": get_args(Backend)}


class KeyTokens(NamedTuple):
    """The tokens of keys and values, where they are others than those of queries: those of another view, or of a cache.

    Attributes:
        order: ``[N]`` int permutation that makes blocks of consecutive keys compact, or None.
        pinned_tokens: All queries attend to the blocks that hold the first `pinned_tokens` keys (in `order`).
        positions: ``[B or 1, N, 2]`` coordinates for the rotary embedding, or None: keys are not rotated.
    """

    order: Tensor | None = None
    pinned_tokens: int = 0
    positions: Tensor | None = None


NO_KEYS = KeyTokens()


def linear_attention(q: Tensor, k: Tensor, v: Tensor, *, proj: Tensor, feature_map: str) -> Tensor:
    """The linear branch over all tokens, through Proj, in torch operators: linear in N, any device; untouched by autocast.

    Args:
        q, k, v: ``[B, H, N, D]``, floating point.
        proj: ``[D, D]``, as the weight of `torch.nn.Linear`.
        feature_map: ``"softmax"`` or ``"elu"``.

    Returns:
        ``[B, H, N, D]`` in q's dtype; arithmetic is FP32 (FP64 for FP64 input). See `naive` for the formula (Lite3R,
        arXiv 2605.11354).

    Raises:
        ConfigError, WeightsError: the tensors are on several devices, or some of them on the meta device.
    """
    require_one_device(v, queries=q, keys=k, proj=proj)
    with without_autocast(v):
        return naive.linear_attention(q, k, v, proj=proj, feature_map=feature_map)


@overload
def sparse_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, *, keep_ratio: float, negligible_ratio: float = ..., order: Tensor | None = ...,
    pinned_tokens: int = ..., pinned_keys: int | None = ..., keys: KeyTokens | None = ..., mask: SegmentMask | None = ...,
    q_norm: HeadNorm | None = ..., k_norm: HeadNorm | None = ..., positions: Tensor | None = ..., rope_base: float | None = ...,
    scale: float | None = ...,
    linear: str = ..., feature_map: str = ..., proj: Tensor | None = ..., block_means: bool = ..., block_choice: str = ...,
    block_q: int = ..., block_k: int = ..., backend: str = ..., return_lse: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip
@overload
def sparse_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, *, keep_ratio: float, negligible_ratio: float = ..., order: Tensor | None = ...,
    pinned_tokens: int = ..., pinned_keys: int | None = ..., keys: KeyTokens | None = ..., mask: SegmentMask | None = ...,
    q_norm: HeadNorm | None = ..., k_norm: HeadNorm | None = ..., positions: Tensor | None = ..., rope_base: float | None = ...,
    scale: float | None = ...,
    linear: str = ..., feature_map: str = ..., proj: Tensor | None = ..., block_means: bool = ..., block_choice: str = ...,
    block_q: int = ..., block_k: int = ..., backend: str = ..., return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def sparse_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    keep_ratio: float,
    negligible_ratio: float = 0.0,
    order: Tensor | None = None,
    pinned_tokens: int = 0,
    pinned_keys: int | None = None,
    keys: KeyTokens | None = None,
    mask: SegmentMask | None = None,
    q_norm: HeadNorm | None = None,
    k_norm: HeadNorm | None = None,
    positions: Tensor | None = None,
    rope_base: float | None = None,
    scale: float | None = None,
    linear: str = "none",
    feature_map: str = "softmax",
    proj: Tensor | None = None,
    block_means: bool = False,
    block_choice: str = "mean",
    block_q: int = 128,
    block_k: int = 64,
    backend: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Sparse-linear attention (SLA, arXiv 2509.24006; Lite3R, arXiv 2605.11354), of tokens to each other or to other tokens.

    Args:
        q: ``[B, H, M, D]``, any strides.
        k, v: ``[B, H, N, D]``, any strides. Without `keys` they are of the tokens of q, and N is M.
        keep_ratio: Share of the key blocks that are not pinned to keep for each query block, in (0, 1].
        negligible_ratio: Share of them to leave out, without a mean or a part in the branch over marginal blocks, in [0, 1].
        order: ``[M]`` int permutation that makes blocks of consecutive tokens compact, or None.
        pinned_tokens: The blocks that hold the first `pinned_tokens` tokens (in `order`) attend to all keys, and without `keys` all
            queries attend to them.
        pinned_keys: All queries attend to the blocks that hold the first `pinned_keys` tokens instead. None: as many as
            `pinned_tokens`. With `keys`, these say it.
        keys: Order, pins and positions of keys, where they are other tokens (cross-attention, a cache), in any number: `order`,
            `pinned_tokens` and `positions` are then those of queries alone. ``KeyTokens()`` for keys of which there is nothing to say.
        mask: Which keys a query may see, by segments of tokens: frame-causal, a window over frames, block-diagonal. Ratios are then of
            the key blocks that all queries of a block may see, those that some may see are kept, and pins hold within the mask. All
            forms of the operator respect it.
        q_norm, k_norm, positions, rope_base: Norm and rotary embedding to apply first; see `prepare_qkv`.
        scale, linear, feature_map, proj, block_means, block_q, block_k: See `naive.sparse_linear_attention`.
        block_choice: By which score key blocks are kept, see `block_map.naive`: ``"mean"``, or ``"error"``, which needs `block_means` and
            no `negligible_ratio`.
        backend: ``"auto"``, ``"triton"`` or ``"naive"``.
        return_lse: Whether the log-sum-exp of each query is returned too: the natural logarithm of the denominator of the sparse
            softmax. With `block_means` that counts each marginal block as its number of tokens times the exponential of the score of
            its mean key; without, critical blocks alone. The linear branch has no part in it. `merge` puts outputs of the softmax
            over sets of keys together by it. Gradients flow through it.

    Returns:
        ``[B, H, M, D]`` in v's dtype, in the order of the input tokens; of no keys, zeros. With `return_lse` also ``[B, H, M]`` FP32
        (FP64 for FP64 input), -inf of no keys.

    Raises:
        BackendError: `backend` is ``"triton"`` and the kernels cannot take these tensors, or they would run and cannot take these blocks.
        ConfigError: tensors do not fit each other; an option is out of its range; `linear` needs a `proj` that was not given.
        WeightsError: some of the tensors are on the meta device.
    """
    check_options(keep_ratio, negligible_ratio, scale, rope_base, linear, feature_map, backend)
    check_block_choice(block_choice, block_means, negligible_ratio)
    check_blocks(block_q, block_k)
    check_tensors(q, k, v, order, positions, proj, pinned_tokens, keys, pinned_keys)
    cross, keys = keys is not None, keys or NO_KEYS
    if mask is not None:
        check_mask(mask, q.shape[-2], k.shape[-2], cross)
        require_one_device(v, **{"mask.queries": mask.queries, "mask.keys": mask.keys})
    if not _kernels_take(block_q, block_k) and use_triton(backend, v):
        raise BackendError(
            f'the kernels take blocks of 16 to 128 tokens, powers of two, got {block_q} and {block_k}; backend="naive" takes any'
        )
    proj = naive.needed_proj(linear, proj)
    q_norm, k_norm = q_norm or NO_NORM, k_norm or NO_NORM
    require_one_device(
        v, queries=q, keys=k, order=order, positions=positions, proj=proj, **norm_tensors(q_norm, k_norm),
    )  # fmt: skip
    if cross:
        require_one_device(v, **{"keys.order": keys.order, "keys.positions": keys.positions})
    arguments = Arguments(
        q, k, v, q_norm.weight, q_norm.bias, k_norm.weight, k_norm.bias, proj,
        order=order, positions=positions, pinned_tokens=pinned_tokens, keep_ratio=keep_ratio, negligible_ratio=negligible_ratio,
        q_kind=q_norm.kind, q_eps=q_norm.eps, k_kind=k_norm.kind, k_eps=k_norm.eps, rope_base=rope_base, scale=scale, linear=linear,
        feature_map=feature_map, block_means=block_means, block_q=block_q, block_k=block_k, backend=backend, cross=cross,
        key_order=keys.order, key_positions=keys.positions, return_lse=return_lse,
        key_pinned_tokens=keys.pinned_tokens if cross else pinned_tokens if pinned_keys is None else pinned_keys,
        mask_queries=mask and mask.queries, mask_keys=mask and mask.keys, mask_before=mask and mask.before, mask_after=mask and mask.after,
        mask_sink=mask and mask.sink,
        block_choice=block_choice,
    )  # fmt: skip
    out, lse = _run(arguments)
    if not return_lse:
        return out
    assert lse is not None
    return out, lse


def _run(arguments: Arguments) -> tuple[Tensor, Tensor | None]:
    """The output and, if it is wanted, the log-sum-exp: in a graph as an operator, else with or without a function of autograd."""
    inputs: tuple[Any, ...] = arguments[: len(INPUTS)]  # as `Arguments.inputs`, over which the compiler of torch 2.9 cannot go
    needed = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs]
    # torch operators can be seen as they are; a compiler gets one node for them too
    if torch.compiler.is_compiling() or (under_trace() and forward.on_triton(arguments, needs_grad=any(needed))):
        if any(needed):
            out, lse, _ = operators.train(needed, *arguments)
        elif arguments.return_lse:
            out, *lse = operators.infer_lse(*arguments)
        else:
            out, lse = operators.infer(*arguments), []
        return out.transpose(1, 2), lse[0] if lse else None
    if any(needed) and not arguments.is_empty and forward.on_triton(arguments, needs_grad=True):
        from .backward import SparseLinearAttentionFunction

        return SparseLinearAttentionFunction.apply(*arguments)
    return forward.run(arguments, needs_grad=any(needed))


# A kernel would read beyond a tensor that is too small, or take an option for another.


def check_options(
    keep_ratio: float, negligible_ratio: float, scale: float | None, rope_base: float | None, linear: str, feature_map: str, backend: str
) -> None:  # fmt: skip
    """Raise `ConfigError` unless the options of `sparse_linear_attention` are in their ranges."""
    check_ratio("keep_ratio", keep_ratio)
    check_share("negligible_ratio", negligible_ratio)
    check_rope_base(rope_base)
    if scale is not None and (not is_number(scale) or not 0 <= scale < math.inf):
        raise ConfigError(f"scale is {shown(scale)}; it must be a finite number and not negative: negate the queries instead")
    for name, value in (("linear", linear), ("feature_map", feature_map), ("backend", backend)):
        check_choice(name, value, _CHOICES[name])


def check_blocks(block_q: int, block_k: int) -> None:
    """Raise `ConfigError` unless these can be the sizes of blocks of tokens."""
    for name, size in (("block_q", block_q), ("block_k", block_k)):
        if not is_int(size) or not 0 < size <= LARGEST_BLOCK:
            raise ConfigError(f"{name} is a number of tokens from 1 to {LARGEST_BLOCK}, got {shown(size)}; 128 and 64 are usual")


def _kernels_take(block_q: int, block_k: int) -> bool:
    return block_q % block_k == 0 and all(16 <= size <= 128 and size & (size - 1) == 0 for size in (block_q, block_k))


def check_tensors(
    q: Tensor, k: Tensor, v: Tensor, order: Tensor | None, positions: Tensor | None, proj: Tensor | None, pinned_tokens: int,
    keys: KeyTokens | None, pinned_keys: int | None = None,
) -> None:  # fmt: skip
    """Raise `ConfigError` unless the tensors of `sparse_linear_attention` fit each other. Looks at no values of theirs."""
    for x in (q, k, v):
        if x.dim() != 4 or not x.is_floating_point():
            raise ConfigError(f"q, k and v are [B, H, N, D] floating-point tensors, got {x.dim()} dimensions and {x.dtype}")
    dim = v.shape[-1]
    if proj is not None and tuple(proj.shape) != (dim, dim):
        raise ConfigError(f"proj is [D, D] = [{dim}, {dim}], got {list(proj.shape)}")
    for name, x in (("order", order), ("keys.order", keys.order if keys else None)):
        if x is not None and (x.dim() != 1 or x.dtype not in (torch.int32, torch.int64)):
            raise ConfigError(f"{name} is [N] int32 or int64, got {list(x.shape)} {x.dtype}")
    if keys is not None and pinned_keys is not None:
        raise ConfigError("keys are other tokens than queries, so KeyTokens says how many of them are pinned: leave pinned_keys out")
    if torch.compiler.is_compiling():  # lengths are symbols there, and a comparison would become a guard
        return
    if keys is None and not q.shape == k.shape == v.shape:
        raise ConfigError(
            f"q, k and v must have the same shape, got {list(q.shape)}, {list(k.shape)} and {list(v.shape)}: expand grouped keys and "
            "values, and say with keys=KeyTokens(...) that keys are other tokens than queries"
        )
    if k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[-1] != k.shape[-1]:
        raise ConfigError(
            f"q is [B, H, M, D] and k and v are [B, H, N, D], got {list(q.shape)}, {list(k.shape)} and {list(v.shape)}: expand grouped "
            "keys and values"
        )
    _check_side("", "q", q.shape[-2], order, positions, pinned_tokens)
    if pinned_keys is not None:
        _check_pinned("pinned_keys", k.shape[-2], pinned_keys)
    if keys is not None:
        _check_side("keys.", "k", k.shape[-2], keys.order, keys.positions, keys.pinned_tokens)


def check_mask(mask: SegmentMask, queries: int, keys: int, cross: bool) -> None:
    """Raise `ConfigError` unless `mask` fits that many queries and keys, which are other tokens if `cross`."""
    if cross and mask.keys is None:
        raise ConfigError("keys are other tokens than queries, so a SegmentMask must name their segments: SegmentMask(queries, keys)")
    for name, x, tokens in (("queries", mask.queries, queries), ("keys", mask.keys, keys)):
        if x is not None and (x.dim() != 1 or x.dtype not in (torch.int32, torch.int64)):
            raise ConfigError(f"mask.{name} holds a segment for each token, [N] int32 or int64, got {list(x.shape)} {x.dtype}")
        if x is not None and not torch.compiler.is_compiling() and len(x) != tokens:
            raise ConfigError(f"mask.{name} names the segments of {len(x)} tokens, but there are {tokens}")
    for name, x in (("before", mask.before), ("after", mask.after), ("sink", mask.sink)):
        if x is not None and (not is_int(x) or not 0 <= x < 2**31):
            raise ConfigError(f"mask.{name} is a number of segments, not negative, or None for all, got {shown(x)}")


def _check_side(prefix: str, tensor: str, tokens: int, order: Tensor | None, positions: Tensor | None, pinned_tokens: int) -> None:
    """Of queries, or of keys that are other tokens."""
    if order is not None and len(order) != tokens:
        raise ConfigError(f"{prefix}order names {len(order)} tokens, but {tensor} has {tokens}")
    if positions is not None and tuple(positions.shape[-2:]) != (tokens, 2):
        raise ConfigError(f"{prefix}positions are [..., N, 2] for N = {tokens} tokens, got {list(positions.shape)}")
    _check_pinned(f"{prefix}pinned_tokens", tokens, pinned_tokens)


def _check_pinned(name: str, tokens: int, pinned: int) -> None:
    if not is_int(pinned) or not 0 <= pinned <= tokens:
        raise ConfigError(f"{name} must be in [0, {tokens}], the number of tokens, got {shown(pinned)}")
