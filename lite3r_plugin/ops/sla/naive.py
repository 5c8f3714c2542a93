"""Definition of sparse-linear attention over ordered tokens (SLA, arXiv 2509.24006; Lite3R, arXiv 2605.11354, Eq. 5).

Queries come in blocks I, keys in blocks J; kept(I) are the *critical* key blocks of I. Of the others some may be *negligible*, with
no part in the sparse softmax and the branch over marginal blocks; all that are left are *marginal*.

    O_sparse(q) = sum_j p_j v_j,  p = softmax over the tokens j of the critical blocks of  q . k_j * scale
    with `block_means`, each marginal block J enters that softmax as one key:
                  logit  q . mean(K_J) * scale + log |J|,  value  mean(V_J)
    O_linear(q) = phi(q) H / (phi(q) Z),  H = sum_j phi(k_j)^T v_j,  Z = sum_j phi(k_j)^T
                  over all tokens (linear="all", Lite3R) or over those of marginal blocks ("marginal", SLA Eq. 5)
    O           = O_sparse + O_linear Proj^T

Queries need not be as many as keys. Pinned query blocks (the first ones) attend to all keys; they have no marginal blocks. phi is
softmax over the head dimension or elu + 1.

With a mask each query has a set of keys that it may see, and sums over tokens are over those. Blocks are marginal or negligible only
where the mask allows all of their pairs (`block_map.mask`), so a mean or a state never holds a key that may not be seen. A query that may
see no key gets zeros, and -inf.

The log-sum-exp of a query is the natural logarithm of the denominator of p: over the tokens of its critical blocks and, with
`block_means`, over its marginal blocks as the one key each that they are there, which stands for |J| tokens by its log |J|. It is about
the log-sum-exp over all keys then, and that over critical blocks alone without. What is negligible and the linear branch have no part
in it. Parts of the keys that are attended to apart are put together by it (`merge`).

Work is done in slabs of query blocks, so no buffer of all pairs ever exists: this also serves CPUs and GPUs without Triton. Arithmetic
is FP32 (FP64 for FP64 input).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ...errors import ConfigError
from ..block_map.mask import Allowed
from ..qk_norm_rope.naive import block_means as mean_over_blocks
from ..qk_norm_rope.naive import block_sizes

SLAB_BYTES = 128 << 20


def phi(x: Tensor, feature_map: str) -> Tensor:
    """The positive feature map of the linear branch over the last dimension."""
    return F.softmax(x, -1) if feature_map == "softmax" else F.elu(x) + 1


def needed_proj(linear: str, proj: Tensor | None) -> Tensor | None:
    """`proj` where the linear branch is on, else None. Raises `ConfigError` when it is on and there is none."""
    if linear != "none" and proj is None:
        raise ConfigError(f"linear={linear!r} needs proj, the [D, D] weight that its output goes through")
    return proj if linear != "none" else None


def linear_state(k: Tensor, v: Tensor, feature_map: str) -> tuple[Tensor, Tensor]:
    """H ``[B, H, D, D]`` and Z ``[B, H, D]`` over all tokens of k, v ``[B, H, N, D]``, in FP32."""
    wide = torch.promote_types(k.dtype, torch.float32)
    features = phi(k.to(wide), feature_map)
    return features.mT @ v.to(wide), features.sum(-2)


def linear_attention(q: Tensor, k: Tensor, v: Tensor, *, proj: Tensor, feature_map: str = "softmax") -> Tensor:
    """The linear branch over all tokens, through Proj: ``[B, H, N, D]`` in q's dtype. Linear in N, any device."""
    wide = torch.promote_types(q.dtype, torch.float32)
    state, total = linear_state(k, v, feature_map)
    features = phi(q.to(wide), feature_map)
    return (features @ (state @ proj.to(wide).mT) / (features @ total[..., None])).to(q.dtype)


def over_marginal(marginal: Tensor, states: Tensor) -> Tensor:
    """Sums over the key blocks that are marginal: ``[B, H, query blocks, key blocks]`` bool of ``[B, H, key blocks, ...]``."""
    return torch.einsum("bhrc,bhc...->bhr...", marginal.to(states.dtype), states)


def sparse_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kv_indices: Tensor,
    *,
    negligible: Tensor | None = None,
    mask: Allowed | None = None,
    pinned: int = 0,
    scale: float | None = None,
    linear: str = "none",
    feature_map: str = "softmax",
    proj: Tensor | None = None,
    block_means: bool = False,
    block_q: int = 128,
    block_k: int = 64,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Sparse-linear attention of ordered tokens; see the module's docstring.

    Args:
        q: ``[B, H, M, D]``.
        k, v: ``[B, H, N, D]``.
        kv_indices: ``[B, H, ceil(M / block_q), kept]`` int, the critical key blocks of each query block; -1 stands for none.
        negligible: ``[B, H, ceil(M / block_q), n]`` int, its negligible key blocks, or None; -1 stands for none.
        mask: What queries may see, in order, or None: all.
        pinned: The first `pinned` query blocks attend to all keys.
        scale: Factor of the scores, ``D ** -0.5`` by default.
        linear: ``"all"``, ``"marginal"`` or ``"none"``.
        feature_map: ``"softmax"`` or ``"elu"``.
        proj: ``[D, D]`` weight of Proj, as in `torch.nn.Linear`; needed unless `linear` is ``"none"``.
        block_means: Marginal blocks enter the softmax by their means.
        block_q, block_k: Tokens per block.
        return_lse: Whether the log-sum-exp of each query is wanted.

    Returns:
        The output ``[B, H, M, D]`` in q's dtype; and the log-sum-exp ``[B, H, M]`` of each query, FP32 (FP64 for FP64 input), if
        `return_lse`, else None.

    Raises:
        ConfigError: `linear` needs a `proj` that was not given.
    """
    batch, heads, queries, dim = q.shape
    tokens = k.shape[-2]
    wide = torch.promote_types(q.dtype, torch.float32)
    factor = dim**-0.5 if scale is None else scale
    columns, kept = -(-tokens // block_k), kv_indices.shape[-1]
    keys = _in_blocks(k.to(wide), block_k)  # [B, H, columns, block_k, D]
    values = _in_blocks(v.to(wide), block_k)
    sizes = block_sizes(tokens, block_k, q.device)
    valid = torch.arange(block_k, device=q.device) < sizes[:, None]  # [columns, block_k]
    blocks = None if mask is None else mask.in_blocks(block_q, block_k)
    means = (mean_over_blocks(k, block_k), mean_over_blocks(v, block_k)) if block_means else ()
    states = ()  # H and Z, of every key block or of all tokens
    if linear == "marginal" or (linear == "all" and mask is not None):
        features = phi(keys, feature_map) * valid[..., None]
        states = features.mT @ values, features.sum(-2)
    elif linear == "all":
        states = linear_state(k, v, feature_map)
    proj = needed_proj(linear, proj)
    proj = None if proj is None else proj.to(wide)

    def attend(first: int, last: int, critical: Tensor, left_out: Tensor, q: Tensor, *_: Tensor) -> tuple[Tensor, Tensor | None]:
        """Of query blocks first..last, whose critical and negligible key blocks are given, [B, H, last - first, n] each."""
        rows = _in_blocks(q.to(wide)[..., first * block_q : last * block_q, :], block_q)
        there, critical, left_out = critical >= 0, critical.long().clamp(min=0), left_out.long()
        flat = critical.flatten(2)[..., None, None]
        near_k, near_v = (x.take_along_dim(flat, 2).unflatten(2, critical.shape[2:]).flatten(3, 4) for x in (keys, values))
        seen = (valid[critical] & there[..., None]).flatten(3)[..., None, :]  # by all queries of a block, [B, H, rows, 1, tokens]
        marginal = _not_listed(torch.cat((torch.where(there, critical, columns), left_out), -1), columns)
        if mask is not None and blocks is not None:
            starts, ends = (_in_blocks(x[first * block_q : last * block_q, None], block_q) for x in (mask.first, mask.last))
            low, high = (_in_blocks(x[:, None], block_k)[critical, :, 0].flatten(3)[..., None, :] for x in (mask.low, mask.high))
            seen = seen & (high >= starts) & (low <= ends)  # [B, H, rows, block_q, tokens]
            marginal = marginal & blocks.allowed(slice(first, last))
        if block_means:
            mean_k, mean_v = (x[:, :, None].expand(-1, -1, rows.shape[2], -1, -1) for x in means)
            every_k, every_v = torch.cat((near_k, mean_k), 3), torch.cat((near_v, mean_v), 3)
            log_sizes = sizes.to(wide).log().where(marginal, -torch.inf)[..., None, :].expand(*seen.shape[:-1], -1)
        else:
            every_k, every_v, log_sizes = near_k, near_v, rows.new_empty(*seen.shape[:-1], 0)
        bias = torch.cat((torch.zeros_like(seen, dtype=wide).masked_fill(~seen, -torch.inf), log_sizes), -1)
        if return_lse or mask is not None:
            sees = (bias > -torch.inf).any(-1, keepdim=True)
            scores = rows @ every_k.mT * factor + torch.where(sees, bias, 0)
            out = torch.where(sees, scores.softmax(-1) @ every_v, 0)
            lse = torch.where(sees[..., 0], scores.logsumexp(-1), -torch.inf).flatten(2)
        else:
            lse = None
            out = F.scaled_dot_product_attention(
                *(x.flatten(0, 2)[:, None] for x in (rows, every_k, every_v)), attn_mask=bias.flatten(0, 2)[:, None], scale=factor
            ).view_as(rows)
        if proj is None:
            return out.flatten(2, 3), lse
        features = phi(rows, feature_map)
        if linear == "all" and mask is None:
            state, total = (x[:, :, None] for x in states)
        elif linear == "all" and blocks is not None:
            state, total = (over_marginal(blocks.allowed(slice(first, last)).expand_as(marginal), x) for x in states)
        else:
            state, total = (over_marginal(marginal, x) for x in states)
        summed, norm = features @ state, features @ total[..., None]
        if linear == "all" and blocks is not None:  # token by token where blocks are partly allowed: those are critical
            partly = ~blocks.allowed(slice(first, last)).expand_as(marginal).take_along_dim(critical, -1)
            pairs = features @ phi(near_k, feature_map).mT * (seen & partly.repeat_interleave(block_k, -1)[..., None, :])
            summed, norm = summed + pairs @ near_v, norm + pairs.sum(-1, keepdim=True)
        norm = torch.where(norm > 0, norm, 1)  # without a key 0 / 0 is 0, and so is its gradient
        return (out + summed / norm @ proj.mT).flatten(2, 3), lse

    def slabs(first: int, last: int, near: int) -> range:
        row_bytes = (
            batch * heads * 4 * (near * block_k * (2 * dim + 2 * block_q) + (dim * dim if linear == "marginal" or mask is not None else 0))
        )
        return range(first, last, max(1, SLAB_BYTES // row_bytes))

    rows = kv_indices.shape[-2]
    pinned = min(pinned, rows)
    everything = torch.arange(columns, device=q.device).expand(batch, heads, 1, columns)
    outputs, lses = [], []
    for first, last, near in ((0, pinned, columns), (pinned, rows, kept)):
        steps = slabs(first, last, near)
        for start in steps:
            stop = min(start + steps.step, last)
            critical = everything.expand(-1, -1, stop - start, -1) if last == pinned else kv_indices[:, :, start:stop]
            left_out = critical[..., :0] if negligible is None else negligible[:, :, start:stop]
            arguments: tuple[Any, ...] = (start, stop, critical, left_out, q, k, v) + (() if proj is None else (proj,))
            if torch.is_grad_enabled() and any(x.requires_grad for x in arguments[4:]):
                out, lse = checkpoint(attend, *arguments, use_reentrant=False)
            else:
                out, lse = attend(*arguments)
            outputs.append(out)
            lses.append(lse)
    return torch.cat(outputs, -2)[..., :queries, :].to(q.dtype), torch.cat(lses, -1)[..., :queries] if return_lse else None


def merge(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over the union of sets of keys from attention over each of them: the outputs, weighted by their share of exp(lse).

    Exact for outputs of a softmax alone (``linear="none"``), with block means too: each key, or mean, has to be in one set.

    Args:
        outputs: Of the same queries, ``[..., M, D]`` each. Where the log-sum-exp is -inf they may hold anything.
        lses: Their log-sum-exps ``[..., M]``, -inf where there was no key.

    Returns:
        The output ``[..., M, D]`` in the dtype of the first, and its log-sum-exp ``[..., M]`` FP32 (FP64 if any is); zeros and -inf
        where no set has a key. Arithmetic is in that dtype. Gradients flow through all of it.

    Raises:
        ConfigError: there is nothing to merge, or shapes do not fit each other.
    """
    if not outputs or len(outputs) != len(lses):
        raise ConfigError(f"merge takes outputs and as many log-sum-exps, at least one, got {len(outputs)} and {len(lses)}")
    for out, lse in zip(outputs, lses, strict=True):
        if out.shape != outputs[0].shape or lse.shape != out.shape[:-1]:
            raise ConfigError(
                f"merge takes outputs [..., M, D] of one shape, and their log-sum-exps [..., M], got {list(out.shape)} and "
                f"{list(lse.shape)}; the first output has {list(outputs[0].shape)}"
            )
    wide = functools.reduce(torch.promote_types, (x.dtype for x in (*outputs, *lses)), torch.float32)
    stacked = torch.stack([lse.to(wide) for lse in lses])
    top = stacked.detach().amax(0)
    top = top.masked_fill(top == -torch.inf, 0)
    weights = (stacked - top).exp()
    total = weights.sum(0)
    seen = total > 0
    total = torch.where(seen, total, 1)  # what was not seen has gradients of zero, not of 0 / 0
    merged = sum(
        torch.where(weight[..., None] > 0, out.to(wide), 0) * (weight / total)[..., None]
        for out, weight in zip(outputs, weights, strict=True)
    )
    return merged.to(outputs[0].dtype), torch.where(seen, top + total.log(), -torch.inf)  # type: ignore[union-attr]


def _not_listed(listed: Tensor, columns: int) -> Tensor:
    """``[..., columns]`` bool of those that are not in ``[..., n]``, whose entries are below columns; others stand for none."""
    listed = torch.where(listed < 0, columns, listed)
    return listed.new_ones(*listed.shape[:-1], columns + 1, dtype=torch.bool).scatter(-1, listed, False)[..., :columns]


def _in_blocks(x: Tensor, block: int) -> Tensor:
    """``[..., N, D] -> [..., ceil(N / block), block, D]``, padded with zeros."""
    return F.pad(x, (0, 0, 0, -x.shape[-2] % block)).unflatten(-2, (-1, block))
