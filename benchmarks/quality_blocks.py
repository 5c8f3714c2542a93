"""Which key blocks to compute exactly: ways of choosing them at the same density, compared on the testbed's own attention.

    python benchmarks/quality_blocks.py --scenes 2 --views 8                                        # a CPU, some minutes
    python benchmarks/quality_blocks.py --device cuda --views 32 64 100 --scenes 1 --json OUT.json  # a GPU, under a minute
    python benchmarks/quality_blocks.py --judge mean "lse, keys in 4" --scenes 12 --views 8 16      # by what the model returns

Queries, keys and values of every global site of the dense model are taken on rendered scenes, normed, rotated, in token order. For some
blocks of queries of each head every way of choosing gives the key blocks that it would keep, pinned ones on top, at one density. It is
told what share of the true attention lies in them (`recall`), and how far the output of sparse attention with block means is from dense
attention, relative to it (`error`); the same with a linear branch over marginal blocks that is fitted to other scenes (`branch`).
With `--judge` the ways that are named run in the model at all global sites, and cameras and depth are measured, scene by scene.

Ways, s(i, j) being the score of a query block i and a key block j, all scores times the scale of attention:

    mean                    mean(Q_i) . mean(K_j) (SLA, arXiv 2509.24006), `block_choice="mean"`
    lse, keys in n          log of the sum over n parts of block j of size * exp(mean(Q_i) . mean(part))
    lse, queries in m ...   the same over all pairs of parts
    mass, ...               for each part of the queries a softmax over all parts of keys, summed: an estimate of the attention mass
    variance, ...           second order: the score of means + half the variance of scores in the block, from variances by dimension
                            (keys, queries), from the whole covariance of keys (full), or from its trace
    spread                  the score of means + the logarithm of the standard deviation of the block's values: what a mean hides
    hidden                  the same times the standard deviation of the scores in the block
    error, ...              as `hidden`, for parts of the queries, each with a softmax over all keys, summed
    tokens, ...             the same with the mean and variance of the scores of all tokens of a block: an upper bound for `error`
    refined, ...            the best 2 * kept by mean; of these the best by another way
    frames                  the view itself, its neighbours, then views as diverse as can be (after GoToHunt, arXiv 2605.23892), whole
    frames, blocks          blocks by mean in twice as many views as that
    half frames             half of the blocks from frames, the others by mean
    ..., threshold a head   one threshold on the softmax of scores for all query blocks of a head instead of a number for each (cf.
                            PISA, arXiv 2602.01077; Sol-Attn, arXiv 2607.24027); `a site`: of all heads
    oracle ...              the true mass; the true error that the mean of a block would make, to first order
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from quality import measures, say
from torch import Tensor, nn

import lite3r_plugin
from lite3r_plugin.adapter.models import ModelEntry
from lite3r_plugin.adapter.plugins import find_model
from lite3r_plugin.apply.lookup import lite3r_modules
from lite3r_plugin.attention.inputs import AttentionInputs
from lite3r_plugin.attention.module import SparseLinearAttention
from lite3r_plugin.evaluation import choose_device, model_inputs, quiet, run_model, sample_views
from lite3r_plugin.files import write_atomically
from lite3r_plugin.ops.block_map import kept_blocks
from lite3r_plugin.ops.qk_norm_rope.naive import block_means, block_sizes, prepare_qkv
from lite3r_plugin.ops.sla.naive import phi, sparse_linear_attention
from lite3r_plugin.scene.data import open_scenes
from lite3r_plugin.testbed import weights_hash
from lite3r_plugin.training.calibrate import fit
from lite3r_plugin.training.record import AttentionSums

HERE = Path(__file__).parent
BLOCK_Q, BLOCK_K = 128, 64
EVALUATED, CALIBRATED = 1, 7  # seeds of scenes
CHUNK_BYTES = 256 << 20


class Blocks:
    """The attention of a site in one forward: tokens in order, with what ways of choosing read of them, made once.

    Args:
        site, inputs: The site and what it was given.
        queries: How many query blocks are looked at, evenly spaced among those that are not pinned; None: all of these, the `rows`.
    """

    def __init__(self, site: SparseLinearAttention, inputs: AttentionInputs, queries: int | None = None) -> None:
        order, pinned = site.order(inputs.layout, inputs.v), site.pinned(inputs.layout)
        prepared = prepare_qkv(
            inputs.q.float(), inputs.k.float(), inputs.v.float(), order=order, q_norm=inputs.q_norm, k_norm=inputs.k_norm,
            positions=inputs.positions, rope_base=inputs.rope_base, block_q=BLOCK_Q, block_k=BLOCK_K,
        )  # fmt: skip
        self.q, self.k, self.v = (x[0] for x in prepared[:3])  # [H, N, D]
        self.order = order
        self.scale = self.q.shape[-1] ** -0.5 if inputs.scale is None else inputs.scale
        self.heads, self.tokens, self.dim = self.q.shape
        self.pinned_rows, self.pinned = -(-pinned.queries // BLOCK_Q), -(-pinned.keys // BLOCK_K)
        self.all_rows, self.columns = -(-self.tokens // BLOCK_Q), -(-self.tokens // BLOCK_K)
        rows = torch.arange(self.pinned_rows, self.all_rows, device=self.q.device)
        if queries is not None and len(rows) > queries:
            rows = rows[torch.linspace(0, len(rows) - 1, queries).round().long()]
        self.rows = rows
        self.layout = inputs.layout
        self._parts: dict[Any, tuple[Tensor, Tensor]] = {}

    def free(self, keep_ratio: float) -> int:
        """Key blocks to choose beside those that are pinned."""
        return kept_blocks(self.columns, keep_ratio, self.pinned) - self.pinned

    @functools.cached_property
    def sizes(self) -> Tensor:
        """Tokens of key blocks ``[columns]``."""
        return block_sizes(self.tokens, BLOCK_K, self.q.device).float()

    def parts(self, of: str, count: int) -> tuple[Tensor, Tensor]:
        """Means of `count` parts of each block ``[H, blocks, count, D]``, of queries times the scale, and their sizes."""
        if (of, count) not in self._parts:
            x, block = (self.q * self.scale, BLOCK_Q) if of == "q" else (self.k, BLOCK_K)
            means, sizes = block_means(x[None], block // count)[0], block_sizes(self.tokens, block // count, x.device).float()
            missing = -means.shape[1] % count
            means = nn.functional.pad(means, (0, 0, 0, missing)).unflatten(1, (-1, count))
            sizes = nn.functional.pad(sizes, (0, missing)).unflatten(0, (-1, count))
            self._parts[of, count] = (means[:, self.rows], sizes[self.rows]) if of == "q" else (means, sizes)
        return self._parts[of, count]

    @property
    def q_mean(self) -> Tensor:
        """``[H, rows, D]``, times the scale."""
        return self.parts("q", 1)[0][:, :, 0]

    @property
    def k_mean(self) -> Tensor:
        """``[H, columns, D]``."""
        return self.parts("k", 1)[0][:, :, 0]

    @functools.cached_property
    def v_mean(self) -> Tensor:
        """``[H, columns, D]``."""
        return block_means(self.v[None], BLOCK_K)[0]

    def variance(self, of: str) -> Tensor:
        """Variances by dimension in blocks, of queries (times the scale, ``[H, rows, D]``), keys or values."""
        x, block = {"q": (self.q * self.scale, BLOCK_Q), "k": (self.k, BLOCK_K), "v": (self.v, BLOCK_K)}[of]
        found = (block_means(x.square()[None], block) - block_means(x[None], block).square())[0].clamp(min=0)
        return found[:, self.rows] if of == "q" else found

    def covariance(self) -> Tensor:
        """Of keys, ``[H, columns, D, D]``."""
        x = nn.functional.pad(self.k, (0, 0, 0, -self.tokens % BLOCK_K)).unflatten(1, (-1, BLOCK_K))
        return x.mT @ x / self.sizes[:, None, None] - self.k_mean[..., None] * self.k_mean[..., None, :]

    @functools.cached_property
    def views(self) -> tuple[Tensor, Tensor]:
        """The view of each of `rows`, and of each key block: that of its middle token; -1 of special tokens."""
        part = self.layout.parts[0]
        view = torch.arange(self.tokens, device=self.q.device) // part.tokens_per_view
        view = torch.where(torch.arange(self.tokens, device=view.device) % part.tokens_per_view < part.special_tokens, -1, view)
        view = view if self.order is None else view[self.order.long()]
        middle = lambda blocks, block: view[(blocks * block + block // 2).clamp(max=self.tokens - 1)]  # noqa: E731
        return middle(self.rows, BLOCK_Q), middle(torch.arange(self.columns, device=view.device), BLOCK_K)


Scores = Callable[[Blocks], Tensor]
"""Scores of key blocks, ``[H, rows, columns]``: the highest are kept."""


def by_mean(b: Blocks) -> Tensor:
    return b.q_mean @ b.k_mean.mT


def by_lse(b: Blocks, queries: int, keys: int, best: bool = False) -> Tensor:
    (q, q_sizes), (k, k_sizes) = b.parts("q", queries), b.parts("k", keys)
    scores = torch.einsum("hrad,hcbd->hrcab", q, k) + q_sizes.log()[:, None, :, None] + k_sizes.log()[:, None]
    return scores.flatten(3).amax(-1) if best else scores.flatten(3).logsumexp(-1)


def by_mass(b: Blocks, queries: int, keys: int) -> Tensor:
    (q, q_sizes), (k, k_sizes) = b.parts("q", queries), b.parts("k", keys)
    scores = torch.einsum("hrad,hcbd->hracb", q, k) + k_sizes.log()
    mass = scores.flatten(3).softmax(-1).view_as(scores).sum(-1)
    return torch.einsum("hrac,ra->hrc", mass, q_sizes).log()


def by_variance(b: Blocks, of: str) -> Tensor:
    scores = by_mean(b) + b.sizes.log()
    if "k" in of:
        scores = scores + b.q_mean.square() @ b.variance("k").mT / 2
    if "q" in of:
        centred = b.k_mean - b.k.mean(1, keepdim=True)  # what all keys have in common changes all scores of a query alike
        scores = scores + b.variance("q") @ centred.square().mT / 2
    if of == "trace":
        scores = scores + b.q_mean.square().sum(-1)[..., None] * b.variance("k").mean(-1)[:, None] / 2
    if of == "full":
        scores = scores + torch.einsum("hrd,hcde,hre->hrc", b.q_mean, b.covariance(), b.q_mean) / 2
    return scores


def by_spread(b: Blocks, of: str) -> Tensor:
    scores = by_mean(b) + b.sizes.log() + b.variance("v").sum(-1).log()[:, None] / 2
    if "s" in of:
        scores = scores + (b.q_mean.square() @ b.variance("k").mT + 1e-12).log() / 2
    if "q" in of:
        scores = by_mass(b, 4, 1) - by_mean(b) - b.sizes.log() + scores
    return scores


def by_hidden(b: Blocks, queries: int, second_order: bool = False, values: bool = True) -> Tensor:
    """For each part of the queries the mass by every token of a block, times the standard deviations of its scores and values."""
    (q, sizes), floor = b.parts("q", queries), 1e-6
    tokens = torch.arange(b.columns * BLOCK_K, device=b.q.device).view(b.columns, BLOCK_K) < b.tokens
    keys = nn.functional.pad(b.k, (0, 0, 0, -b.tokens % BLOCK_K))
    found = []
    for part in range(queries):
        scores = (q[:, :, part] @ keys.mT).unflatten(-1, (b.columns, BLOCK_K))
        mean = (q[:, :, part] @ b.k_mean.mT)[..., None]
        variance = ((scores - mean).square() * tokens).sum(-1) / b.sizes
        if second_order:
            mass = mean[..., 0] + b.sizes.log() + variance / 2
        else:
            mass = scores.masked_fill(~tokens, -torch.inf).logsumexp(-1)
        if queries > 1:
            mass = mass.log_softmax(-1) + sizes[:, part].clamp(min=1e-9).log()[:, None]
        found.append(mass + (variance + floor).log() / 2)
    return torch.stack(found).logsumexp(0) + (b.variance("v").sum(-1).log()[:, None] / 2 if values else 0)


def by_error(b: Blocks, queries: int, keys: int, spread: bool = True) -> Tensor:
    """As `by_hidden`, from means and variances by dimension of parts of the keys instead of every token."""
    (q, q_sizes), (k, k_sizes) = b.parts("q", queries), b.parts("k", keys)
    squares = block_means(b.k.square()[None], BLOCK_K // keys)[0]
    squares = nn.functional.pad(squares, (0, 0, 0, -squares.shape[1] % keys)).unflatten(1, (-1, keys))
    share = k_sizes / k_sizes.sum(-1, keepdim=True)
    scores = torch.einsum("hrad,hcbd->hracb", q, k)
    within = torch.einsum("hrad,hcbd->hracb", q.square(), (squares - k.square()).clamp(min=0))
    mean = (scores * share).sum(-1)
    variance = (((scores - mean[..., None]).square() + within) * share).sum(-1)
    mass = (mean + variance / 2 + b.sizes.log()).log_softmax(-1)
    found = mass + (variance + 1e-12).log() / 2 if spread else mass
    return (found + q_sizes.clamp(min=1e-9).log()[..., None]).logsumexp(2)


def refined(b: Blocks, by: Scores, keep_ratio: float) -> Tensor:
    first = by_mean(b)[..., b.pinned :]
    worst = first.topk(min(2 * b.free(keep_ratio), first.shape[-1]), -1).values[..., -1:]
    return torch.cat((by(b)[..., : b.pinned], by(b)[..., b.pinned :].masked_fill(first < worst, -torch.inf)), -1)


def frame_ranks(b: Blocks) -> Tensor:
    """For each view the rank of each: itself, the views beside it, then the most diverse by the mean keys of views, ``[V, V]``."""
    part = b.layout.parts[0]
    keys = torch.empty_like(b.k).index_copy_(1, b.order.long(), b.k).unflatten(1, (part.count, -1))[:, :, part.special_tokens :].mean(2)
    looks = nn.functional.normalize((keys - keys.mean(1, keepdim=True)).transpose(0, 1).flatten(1), dim=-1)
    distance = 1 - looks @ looks.T
    order, nearest = [0], distance[0].clone()  # the reference first
    for _ in range(part.count - 1):
        nearest[order] = -torch.inf
        order.append(int(nearest.argmax()))
        nearest = torch.minimum(nearest, distance[order[-1]])
    rank = torch.empty(part.count).index_copy_(0, torch.tensor(order), torch.arange(part.count, dtype=torch.float32))
    ranks = rank.repeat(part.count, 1) + 3
    for view in range(part.count):
        for beside in (view - 1, view + 1):
            if 0 <= beside < part.count:
                ranks[view, beside] = 1
        ranks[view, view] = 0
    return ranks.argsort(-1).argsort(-1).to(b.q.device)


def by_frames(b: Blocks, kind: str, keep_ratio: float) -> Tensor:
    means, (mine, theirs) = by_mean(b), b.views
    rank = frame_ranks(b)[mine.clamp(min=0)][:, theirs.clamp(min=0)].float()[None]  # [1, rows, columns]
    order = means.argsort(-1).argsort(-1) / means.shape[-1]  # in [0, 1)
    if kind == "blocks":
        per_view = b.layout.parts[0].patches_per_view / BLOCK_K
        return means.masked_fill(rank >= math.ceil(2 * b.free(keep_ratio) / per_view), -torch.inf)
    frames = order - rank
    if kind == "half":
        frames[..., : b.pinned] = -torch.inf
        first = frames.topk(b.free(keep_ratio) // 2, -1).indices
        return means.scatter(-1, first, torch.inf)
    return frames


@dataclasses.dataclass(frozen=True)
class Way:
    """A way of choosing: its scores, for a keep ratio, and what the number of blocks is fixed for."""

    scores: Callable[[Blocks, float], Tensor] | str
    budget: str = "row"


def plain(by: Scores, budget: str = "row") -> Way:
    return Way(lambda b, _: by(b), budget)


def lse(queries: int, keys: int, best: bool = False) -> Scores:
    return lambda b: by_lse(b, queries, keys, best)


def mass(queries: int, keys: int) -> Scores:
    return lambda b: by_mass(b, queries, keys)


WAYS: dict[str, Way] = {
    "mean": plain(by_mean),
    "lse, keys in 2": plain(lse(1, 2)),
    "lse, keys in 4": plain(lse(1, 4)),
    "lse, queries in 2, keys in 2": plain(lse(2, 2)),
    "lse, queries in 4, keys in 4": plain(lse(4, 4)),
    "best pair, queries in 4, keys in 4": plain(lse(4, 4, True)),
    "mass, queries in 2": plain(mass(2, 1)),
    "mass, queries in 4": plain(mass(4, 1)),
    "mass, queries in 8": plain(mass(8, 1)),
    "mass, queries in 2, keys in 2": plain(mass(2, 2)),
    "mass, queries in 4, keys in 4": plain(mass(4, 4)),
    "mass, queries in 8, keys in 8": plain(mass(8, 8)),
    "variance, keys": plain(lambda b: by_variance(b, "k")),
    "variance, queries": plain(lambda b: by_variance(b, "q")),
    "variance, keys and queries": plain(lambda b: by_variance(b, "kq")),
    "variance, trace": plain(lambda b: by_variance(b, "trace")),
    "variance, full": plain(lambda b: by_variance(b, "full")),
    "spread": plain(lambda b: by_spread(b, "")),
    "hidden": plain(lambda b: by_spread(b, "s")),
    "hidden, mass of queries in 4": plain(lambda b: by_spread(b, "sq")),
    "error, queries in 1": plain(lambda b: by_error(b, 1, 1)),
    "error, queries in 2": plain(lambda b: by_error(b, 2, 1)),
    "error, queries in 4": plain(lambda b: by_error(b, 4, 1)),
    "error, queries in 4, without spread": plain(lambda b: by_error(b, 4, 1, False)),
    "error, queries in 4, keys in 2": plain(lambda b: by_error(b, 4, 2)),
    "error, queries in 4, keys in 4": plain(lambda b: by_error(b, 4, 4)),
    "error, queries in 4, threshold a site": plain(lambda b: by_error(b, 4, 1), "site"),
    "tokens": plain(lambda b: by_hidden(b, 1)),
    "tokens, second order": plain(lambda b: by_hidden(b, 1, True)),
    "tokens, without values": plain(lambda b: by_hidden(b, 1, True, False)),
    "tokens, queries in 2": plain(lambda b: by_hidden(b, 2)),
    "tokens, queries in 4": plain(lambda b: by_hidden(b, 4)),
    "tokens, queries in 4, threshold a head": plain(lambda b: by_hidden(b, 4), "head"),
    "tokens, queries in 4, threshold a site": plain(lambda b: by_hidden(b, 4), "site"),
    "refined, mass 8 8": Way(lambda b, keep: refined(b, mass(8, 8), keep)),
    "frames": Way(lambda b, keep: by_frames(b, "whole", keep)),
    "frames, blocks": Way(lambda b, keep: by_frames(b, "blocks", keep)),
    "half frames": Way(lambda b, keep: by_frames(b, "half", keep)),
    "mean, threshold a head": plain(by_mean, "head"),
    "mean, threshold a site": plain(by_mean, "site"),
    "mass, queries in 4, threshold a head": plain(mass(4, 1), "head"),
    "mass, queries in 4, threshold a site": plain(mass(4, 1), "site"),
    "mass, queries in 4, keys in 4, threshold a site": plain(mass(4, 4), "site"),
    "refined, oracle mass": Way("refined mass"),
    "oracle mass": Way("mass"),
    "oracle mass, threshold a head": Way("mass", "head"),
    "oracle mass, threshold a site": Way("mass", "site"),
    "oracle error": Way("error"),
    "oracle error, threshold a head": Way("error", "head"),
    "oracle error, threshold a site": Way("error", "site"),
}


def chosen(b: Blocks, way: Way, keep_ratio: float, oracle: dict[str, Tensor]) -> Tensor:
    """``[H, rows, columns]`` bool: what is kept, pinned blocks included."""
    if not isinstance(way.scores, str):
        scores = way.scores(b, keep_ratio)
    elif way.scores.startswith("refined"):
        scores = refined(b, lambda _: oracle["mass"], keep_ratio)
    else:
        scores = oracle[way.scores]
    if way.budget != "row" and way.scores != "error":  # true errors have one unit
        scores = scores.log_softmax(-1)
    scores = scores[..., b.pinned :]
    count, found = b.free(keep_ratio), torch.zeros_like(scores, dtype=torch.bool)
    if way.budget == "row":
        found.scatter_(-1, scores.topk(count, -1).indices, True)
    else:
        scores = scores.scatter(-1, scores.argmax(-1, keepdim=True), torch.inf)  # each query block keeps one at least
        flat = scores.flatten(1) if way.budget == "head" else scores.flatten()[None]
        total = count * scores.shape[1] * (1 if way.budget == "head" else b.heads)
        found = torch.zeros_like(flat, dtype=torch.bool).scatter_(-1, flat.topk(total, -1).indices, True).view_as(found)
    return torch.cat((found.new_ones(*found.shape[:2], b.pinned), found), -1)


class Sums:
    """Exact sums over each key block, for the queries of some rows of one head; all relative to the largest score of a query.

    Attributes:
        exact: Of exp(score) times the value, and of exp(score), ``[rows, columns, queries, D + 1]``.
        mean: The same of the block's mean key and value, times its size.
        seen: ``[rows, queries]`` bool: rows of the last block that are queries.
    """

    def __init__(self, b: Blocks, head: int, rows: Tensor) -> None:
        tokens = (b.rows[rows, None] * BLOCK_Q + torch.arange(BLOCK_Q, device=b.q.device)).clamp(max=b.tokens - 1)
        self.seen = b.rows[rows, None] * BLOCK_Q + torch.arange(BLOCK_Q, device=b.q.device) < b.tokens
        self.q = b.q[head, tokens]  # [rows, queries, D]
        pad = -b.tokens % BLOCK_K
        k, v = (nn.functional.pad(x[head], (0, 0, 0, pad)) for x in (b.k, b.v))
        scores = self.q @ k.T * b.scale
        scores[..., b.tokens :] = -torch.inf
        means = self.q @ b.k_mean[head].T * b.scale + b.sizes.log()
        top = scores.amax(-1, keepdim=True)
        weights = (scores - top).exp().unflatten(-1, (b.columns, BLOCK_K)).permute(2, 0, 1, 3)  # [columns, rows, queries, block]
        values = nn.functional.pad(v.view(b.columns, BLOCK_K, -1), (0, 1), value=1.0)
        exact = (weights.flatten(1, 2) @ values).unflatten(1, (len(rows), BLOCK_Q)).transpose(0, 1)
        mean_values = nn.functional.pad(b.v_mean[head], (0, 1), value=1.0)
        self.exact = exact
        self.mean = (means - top).exp().transpose(1, 2)[..., None] * mean_values[:, None]

    @property
    def dense(self) -> Tensor:
        """Dense attention ``[rows, queries, D]``."""
        total = self.exact.sum(1)
        return total[..., :-1] / total[..., -1:]


def in_chunks(b: Blocks) -> Iterator[tuple[int, Tensor, Sums]]:
    """Of each head and some rows: the sums."""
    size = max(1, CHUNK_BYTES // (4 * BLOCK_Q * b.columns * (b.dim + 1)))
    for head in range(b.heads):
        for rows in torch.arange(len(b.rows), device=b.q.device).split(size):
            yield head, rows, Sums(b, head, rows)


def truth(b: Blocks) -> dict[str, Tensor]:
    """The true mass of each pair of blocks, and the squared error of its mean to first order, as logarithms, ``[H, rows, columns]``."""
    mass, error = (torch.zeros(b.heads, len(b.rows), b.columns, device=b.q.device) for _ in range(2))
    for head, rows, sums in in_chunks(b):
        total = sums.exact[..., -1:].sum(1, keepdim=True)
        gap = (sums.exact - sums.mean) / total
        gap = gap[..., :-1] - gap[..., -1:] * sums.dense[:, None]
        seen = sums.seen[:, None]
        mass[head, rows] = ((sums.exact / total)[..., -1] * seen).sum(-1) / seen.sum(-1)
        error[head, rows] = (gap.square().sum(-1) * seen).sum(-1)
    return {"mass": (mass + 1e-30).log(), "error": (error + 1e-30).log()}


def compare(b: Blocks, maps: Sequence[Tensor], branch: bool) -> tuple[Tensor, Tensor, list[AttentionSums]]:
    """Of each map: its recall of the true mass, ``[maps]``, its squared error and that of zero ``[maps, 2]``, and the sums of a fit."""
    maps = torch.stack(list(maps)).float()
    count = len(maps)
    device = b.q.device
    recall, errors = torch.zeros(count, device=device), torch.zeros(count, 2, device=device, dtype=torch.float64)
    gram, cross = (torch.zeros(count, b.dim, b.dim, device=device, dtype=torch.float64) for _ in range(2))
    mean, queries = torch.zeros(count, b.dim, device=device, dtype=torch.float64), 0
    states = None
    if branch:
        features = nn.functional.pad(phi(b.k, "softmax"), (0, 0, 0, -b.tokens % BLOCK_K)).unflatten(1, (-1, BLOCK_K))
        values = nn.functional.pad(b.v, (0, 1, 0, -b.tokens % BLOCK_K), value=0.0).unflatten(1, (-1, BLOCK_K))
        values[..., -1] = 1.0
        states = features.mT @ values  # [H, columns, D, D + 1]
    for head, rows, sums in in_chunks(b):
        kept = maps[:, head, rows].transpose(0, 1)  # [rows, maps, columns]
        dense, seen = sums.dense[:, None], sums.seen[:, None]
        share = sums.exact[..., -1] / sums.exact[..., -1].sum(1, keepdim=True)
        share = (share * seen).sum(-1) / seen.sum(-1)
        recall += (kept * share[:, None]).sum(-1).sum(0)
        out = kept @ (sums.exact - sums.mean).flatten(2)
        out = out.unflatten(-1, (BLOCK_Q, -1)) + sums.mean.sum(1)[:, None]
        gap = (dense - out[..., :-1] / out[..., -1:]) * seen[..., None]
        errors[:, 0] += gap.square().sum((0, 2, 3))
        errors[:, 1] += (dense * seen[..., None]).square().sum()
        if states is not None:
            state = ((1 - kept) @ states[head].flatten(1)).unflatten(-1, (b.dim, b.dim + 1))
            linear = phi(sums.q, "softmax")[:, None] @ state
            linear = linear[..., :-1] / linear[..., -1:].clamp(min=1e-30) * seen[..., None]
            linear, gap = (x.transpose(0, 1).flatten(1, 2) for x in (linear, gap))
            gram += linear.mT @ linear
            cross += gap.mT @ linear
            mean += linear.sum(1)
            queries += int(sums.seen.sum())
    sums_of = [
        AttentionSums(gram[i].cpu(), cross[i].cpu(), errors[i, 0].cpu(), errors[i, 1].cpu(), mean[i].cpu(), queries) for i in range(count)
    ]
    return recall / (b.heads * len(b.rows)), errors, sums_of


class Bench:
    """The testbed with Lite3R at its global sites."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, choose_device(args.device)
        self.entry: ModelEntry = find_model("testbed")
        with quiet():
            self.model: nn.Module = self.entry.build(args.weights, self.device)
            self.hash = weights_hash(self.model)
            lite3r_plugin.apply_lite3r(self.model, keep_ratio=0.5, dense_below=0, linear_branch="none", exact_rewrites=False)
        self.sites = {fqn: site for fqn, site in lite3r_modules(self.model).items() if site.sparse}

    def scenes(self, count: int, views: int, seed: int) -> Iterator[tuple[Any, Tensor]]:
        """The views of a scene as a sample, and as what the model takes."""
        rendered = "cuda" if self.device.type == "cuda" else "cpu"
        for scene in open_scenes(f"procedural:scenes={count},seed={seed},views={views},device={rendered}"):
            sample = sample_views(self.entry, scene, range(views))
            yield sample, model_inputs(self.entry, sample).to(self.device)

    def run(self, inputs: Tensor, see: Callable[[str, SparseLinearAttention, AttentionInputs], Tensor]) -> Any:
        """The prediction, with ``see(name, site, inputs)`` in the place of the attention of each global site."""
        with contextlib.ExitStack() as stack:
            for fqn, site in self.sites.items():
                stack.enter_context(site.substitute(functools.partial(see, fqn)))
            return run_model(self.entry, self.model, inputs, torch.float32).prediction

    def study(self, views: int) -> dict[str, Any]:
        """All ways at all keep ratios, by site."""
        folds: dict[Any, dict[int, AttentionSums]] = {}
        rows: dict[Any, list[list[float]]] = {}

        def see(fqn: str, site: SparseLinearAttention, inputs: AttentionInputs) -> Tensor:
            b = Blocks(site, inputs, self.args.queries)
            oracle = truth(b)
            keys, maps = [], []
            for keep in self.args.keep_ratios:
                for name, way in WAYS.items():
                    if self.args.ways and name not in self.args.ways:
                        continue
                    keys.append((keep, name))
                    maps.append(chosen(b, way, keep, oracle))
            recall, errors, sums = compare(b, maps, self.args.branch)
            for i, key in enumerate(keys):
                error = (errors[i, 0] / errors[i, 1]).sqrt().item()
                rows.setdefault(key, []).append([recall[i].item(), error, maps[i].float().mean().item()])
                folds.setdefault((*key, fqn), {})[index] = sums[i]
            return site.dense(inputs)

        index = 0
        for index, (_, inputs) in enumerate(self.scenes(self.args.scenes, views, EVALUATED)):
            start = time.perf_counter()
            self.run(inputs, see)
            say(f"{views} views, scene {index}: {time.perf_counter() - start:.0f} s")
        found: dict[str, Any] = {}
        for (keep, name), values in rows.items():
            row = torch.tensor(values)
            entry = {"recall": row[:, 0].mean().item(), "error": row[:, 1].mean().item(), "density": row[:, 2].mean().item()}
            entry["error of sites"] = row[:, 1].view(-1, len(self.sites)).mean(0).tolist()
            if self.args.branch and self.args.scenes > 1:
                fits = [fit(fqn, folds[keep, name, fqn]) for fqn in self.sites]
                entry["branch"] = sum(f.report(1.0, f.weight).after for f in fits) / len(fits)
            found.setdefault(str(keep), {})[name] = entry
        return found

    def judge(self, views: int, save: Callable[[Any], None]) -> dict[str, Any]:
        """What the model returns with the ways that are named, scene by scene."""
        found: dict[str, Any] = {}
        for index, (sample, inputs) in enumerate(self.scenes(self.args.scenes, views, EVALUATED)):
            reference = sample.geometry()
            teacher = self.run(inputs, lambda _, site, given: site.dense(given)).geometry()
            found.setdefault("dense", []).append(measures(teacher, reference, None))
            for keep in self.args.keep_ratios:
                for name in self.args.judge:
                    start = time.perf_counter()
                    predicted = self.run(inputs, functools.partial(self._sparse, WAYS[name], keep)).geometry()
                    found.setdefault(f"{name} {keep}", []).append(measures(predicted, reference, teacher))
                    say(f"{views} views, scene {index}, {name} {keep}: {time.perf_counter() - start:.0f} s")
            say_means(found, views)
            save(found)
        return found

    def _by_rows(self, b: Blocks, kept: Tensor) -> Tensor:
        """As the definition, ``[H, N, D]``, gathering whole blocks of one query block at a time: on a CPU ten times as fast."""
        attend, first = nn.functional.scaled_dot_product_attention, b.pinned_rows * BLOCK_Q
        out = torch.empty_like(b.q)
        out[:, :first] = attend(b.q[None, :, :first], b.k[None], b.v[None], scale=b.scale)[0]
        keys, values = (list(x.split(BLOCK_K, 1)) for x in (b.k, b.v))
        for head in range(b.heads):
            for row, near in zip(b.rows.tolist(), kept[head], strict=True):
                some = slice(row * BLOCK_Q, (row + 1) * BLOCK_Q)
                columns = near.nonzero().flatten().tolist()
                k = torch.cat([*(keys[c][head] for c in columns), b.k_mean[head, ~near]])
                v = torch.cat([*(values[c][head] for c in columns), b.v_mean[head, ~near]])
                weights = b.sizes[~near].log()
                bias = nn.functional.pad(weights, (len(k) - len(weights), 0))
                out[head, some] = attend(b.q[None, None, head, some], k[None, None], v[None, None], bias[None, None, None], scale=b.scale)[
                    0, 0
                ]
        return out

    def _sparse(self, way: Way, keep: float, fqn: str, site: SparseLinearAttention, inputs: AttentionInputs) -> Tensor:
        b = Blocks(site, inputs)
        kept = chosen(b, way, keep, truth(b) if isinstance(way.scores, str) else {})
        if self.device.type == "cpu":
            out = self._by_rows(b, kept)[None]
        else:
            width = int(kept.sum(-1).max())
            columns = torch.where(kept, torch.arange(b.columns, device=kept.device), b.columns).sort(-1).values[..., :width]
            indices = torch.where(columns < b.columns, columns, -1)
            indices = nn.functional.pad(indices, (0, 0, b.pinned_rows, 0))[None]  # pinned rows attend to all
            out, _ = sparse_linear_attention(
                b.q[None], b.k[None], b.v[None], indices, pinned=b.pinned_rows, scale=b.scale, block_means=True, block_q=BLOCK_Q,
                block_k=BLOCK_K,
            )  # fmt: skip
        return (out if b.order is None else torch.empty_like(out).index_copy_(-2, b.order.long(), out)).to(inputs.v.dtype)


def say_means(found: dict[str, Any], views: int) -> None:
    """The means so far."""
    shown = ("depth.abs_rel", "pose.auc30", "pose.auc5", "teacher.depth_abs_rel", "teacher.rotation_mean")
    for name, scenes in found.items():
        means = {m: sum(s.get(m) or 0 for s in scenes) / len(scenes) for m in shown}
        say(f"  {views} {name:50} " + "  ".join(f"{m} {x:.4f}" for m, x in means.items()))


def parse() -> argparse.Namespace:
    """Options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", help="a folder; by default the testbed's own")
    parser.add_argument("--scenes", type=int, default=2)
    parser.add_argument("--views", type=int, nargs="+", default=[8])
    parser.add_argument("--keep-ratios", type=float, nargs="+", default=[0.25, 0.125, 0.06])
    parser.add_argument("--queries", type=int, default=12, help="query blocks of each head that are looked at")
    parser.add_argument("--ways", nargs="+", choices=WAYS, help="which; by default all")
    parser.add_argument("--no-branch", dest="branch", action="store_false", help="leave out the linear branch")
    parser.add_argument("--judge", nargs="+", choices=WAYS, help="run these in the model, and measure what it returns")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, default=HERE / "results" / "quality_blocks.json")
    return parser.parse_args()


@torch.no_grad()
def main() -> None:
    """Measure, and add what was found to the file."""
    args = parse()
    bench = Bench(args)
    found: dict[str, Any] = {}
    kind = "judged" if args.judge else "sites"
    store: dict[str, Any] = json.loads(args.json.read_text()) if args.json.exists() else {}
    if store.get("weights_sha256") != bench.hash:
        store = {"weights_sha256": bench.hash}
    where = torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else "CPU"

    def save(views: int, rows: dict[str, Any]) -> None:
        found[str(views)] = rows
        scenes = len(rows["dense"]) if args.judge else args.scenes
        store.setdefault(kind, {})[str(views)] = {"device": where, "scenes": scenes, "rows": rows}
        write_atomically(args.json, json.dumps(store, indent=1) + "\n")

    for views in args.views:
        save(views, bench.judge(views, functools.partial(save, views)) if args.judge else bench.study(views))
    if not args.judge:
        for views, ratios in found.items():
            for keep, rows in ratios.items():
                for name, row in sorted(rows.items(), key=lambda item: item[1]["error"]):
                    values = (f"{k} {v:.4f}" for k, v in row.items() if isinstance(v, float))
                    print(f"{views:>4} {keep:>6} {name:52}", "  ".join(values))


if __name__ == "__main__":
    main()
