"""What attention costs, as a formula of its length, and the rule that follows: when sparse attention is faster than dense."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

from ..config import Lite3RConfig

BILLION = 10**9


@dataclasses.dataclass(frozen=True)
class AttentionCosts:
    """Milliseconds of attention with 16 heads of 64 in BF16 over N tokens.

    Dense attention takes ``dense * N**2``, sparse attention
    ``slowdown * share * dense * N**2 + per_token * N + per_call``, where `share` of the scores is computed. Pooling, the
    block map and the linear branch are linear in N, launches are constant. Both follow the number of heads and their size.

    Attributes:
        dense: Of a score of dense attention.
        slowdown: By what factor a score of sparse attention takes longer; a plain number.
        per_token: Of a token, in sparse attention.
        per_call: Of a call of sparse attention.
    """

    dense: float
    slowdown: float
    per_token: float
    per_call: float

    def milliseconds(self, width: int, tokens: int, share: float | None) -> float:
        """Of one call over N = `tokens`.

        Args:
            width: Batch times heads times head dimension.
            tokens: N.
            share: Of the scores that sparse attention computes; None: dense attention.
        """
        scale, scores = width / (16 * 64), self.dense * tokens**2
        if share is None:
            return scale * scores
        return scale * (self.slowdown * share * scores + self.per_token * tokens) + self.per_call


class SparseShares(NamedTuple):
    """What share of the scores sparse attention computes at a site.

    Whole numbers: compilers take the floats of a module for symbols once they change, and a symbol is no argument of
    `break_even`, which they are to run and take for a constant.

    Attributes:
        kept: Keep ratio of the site, in billionths.
        keys_per_mean: Keys that a block mean stands for, one more score for each so many; 0 where there are no block means.
    """

    kept: int
    keys_per_mean: int

    @classmethod
    def of(cls, config: Lite3RConfig, fqn: str) -> SparseShares:
        """Those of the site `fqn`; one that waits for a ratio computes everything."""
        return cls(BILLION if config.waits else round(BILLION * config.keep_ratio_of(fqn)), config.block_k if config.block_means else 0)

    @property
    def keep_ratio(self) -> float:
        """Share of the keys, of a query that is not pinned, whose scores are computed one by one."""
        return self.kept / BILLION

    def of_scores(self, tokens: int, pinned_queries: int, pinned_keys: int) -> float:
        """Share of the scores over `tokens` tokens that is computed."""
        free = (tokens - pinned_queries) * (tokens - pinned_keys) / tokens**2
        return 1 - (1 - self.mean_share) * (1 - self.keep_ratio) * free

    @property
    def mean_share(self) -> float:
        """Block means, as a share of the keys that they stand for."""
        return 1 / self.keys_per_mean if self.keys_per_mean else 0.0


class BreakEven(NamedTuple):
    """Sparse attention pays where ``width * (gain * free - loss * M * N - tokens * prepared) > call``.

    `free` is the number of pairs of M queries and N keys neither of which is pinned.

    The numbers are whole and know no size of a tensor, so that a graph of `torch.compile` is guarded by arithmetic on sizes alone.
    All count thousandths of what a dense score costs (`AttentionCosts.dense`); width is batch times heads times head dimension.
    """

    gain: int
    loss: int
    tokens: int
    call: int

    def pays(self, width: int, queries: int, pinned_queries: int, keys: int, pinned_keys: int, prepared: int) -> bool:
        """Whether it does for so many queries and keys, of which some are pinned.

        Linear costs are of `prepared` tokens, a third each for queries, keys and values: fewer where some were prepared in other calls.
        """
        free = (queries - pinned_queries) * (keys - pinned_keys)
        return width * (self.gain * free - self.loss * queries * keys - self.tokens * prepared) > self.call


@functools.lru_cache(maxsize=256)
def break_even_of(costs: AttentionCosts, shares: SparseShares) -> BreakEven:
    """The rule that follows from `costs` where sparse attention computes `shares`."""
    unit = 1000 / costs.dense
    return BreakEven(
        gain=round(1000 * costs.slowdown * (1 - shares.mean_share) * (1 - shares.keep_ratio)),
        loss=round(1000 * (costs.slowdown - 1)),
        tokens=round(unit * costs.per_token),
        call=round(unit * costs.per_call * 16 * 64),
    )
