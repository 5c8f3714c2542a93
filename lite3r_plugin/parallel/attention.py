"""Attention of one site whose tokens are spread over processes.

sparse    keys and values of all processes are gathered, already normed and rotated; each process computes some of the query blocks
          (`rows`) with the operator for keys that are other tokens. It sees the keys that one process sees, in the same order,
          so blocks, means and states are the same, and so is the choice. This goes by groups of heads, which do not know of each other:
          while a process attends with one, keys and values of the next travel, and no more than these two groups are held.
dense     keys and values go round a ring: while a process attends to those of one part, the next part comes in. Parts are merged by
          their log-sum-exps. The state of a linear branch over all tokens is the sum of those of the processes.
few       one token a view, as in heads of cameras: keys and values are gathered, attention is what the host calls.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..adapter.layouts import TokenLayout, Views
from ..attention.inputs import AttentionInputs
from ..attention.module import SparseLinearAttention
from ..costs.views import GROUP_BYTES, head_groups
from ..errors import LayoutError, ParallelError
from ..ops.dispatch import without_autocast
from ..ops.options import Backend
from ..ops.sla import KeyTokens, merge, sparse_linear_attention
from ..ops.sla.naive import linear_state, phi
from .group import Group
from .rows import Rows, plan_rows
from .spread import Spread

MAX_PLANS = 16


class SpreadAttention:
    """Attention of sites whose tokens are spread over the processes of `group`.

    Args:
        group: The processes.

    Attributes:
        group: The same.
        least: Bytes of keys and values from which on a group of heads travels by itself.
    """

    def __init__(self, group: Group) -> None:
        self.group = group
        self.least = GROUP_BYTES
        self._plans: OrderedDict[tuple[Any, ...], Rows] = OrderedDict()

    def at_site(self, module: SparseLinearAttention, inputs: AttentionInputs, spread: Spread) -> Tensor:
        """What `SparseLinearAttention` computes in one process, of the tokens of this one: ``[B, H, n, D]``.

        Raises:
            LayoutError: the sequence is not one of views that are alike.
            ParallelError: another process failed; keys are other tokens, or there is a mask; TransformerEngine would train the branch,
                which takes tokens of one process.
            ConfigError: the site waits for its keep ratio.
        """
        config, v = module.state.config, inputs.v
        module.require_ratio()
        if inputs.crossed or inputs.mask is not None:
            what = "its keys are of other tokens than its queries" if inputs.crossed else "it has a mask"
            raise ParallelError(f"site {module.site.fqn!r}: {what}, which is not spread over processes: run this model in one")
        sizes = spread.tokens(v.shape[-2])
        layout = None if inputs.layout is None else _whole(inputs.layout, module.site.fqn, spread)
        tokens, proj = sum(sizes), module.projection(v)
        if module.trains_in_te():
            raise ParallelError(
                f"site {module.site.fqn!r}: TransformerEngine trains its linear branch, of tokens of one process; convert with another "
                "fp8_backend before parallelize_views"
            )
        rows = self._rows(layout or _without_grid(tokens), sizes, module, v.device, v.shape[-2] - sizes[spread.rank])
        pinned = module.pinned(layout)

        def pays() -> bool:
            return module.pays(v[:, :, :1].expand(-1, -1, tokens, -1), pinned)

        key = ("pays", module.keep_ratio, v.shape[:2], v.shape[-1], tokens, pinned, id(module.state))
        if self.group.agree(key, pays, v.device):
            module.begin_sparse(tokens, pinned, tokens)
            return self._sparse(module, inputs, rows, sizes, proj, spread)
        branch = (proj, config.feature_map) if module.begin_dense() and proj is not None else None
        q, k, v = (_without_stand_in(x, spread) for x in (*module.finished(inputs), v))
        return _with_stand_in(self.along_ring(q, k, v, sizes, inputs.scale, config.attention_backend, branch), spread)

    def of_host(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, spread: Spread, few: bool) -> Tensor:
        """Dense attention that a host calls for, of ``[B, H, n, D]`` each, of the tokens of this process; `few`: one token a view."""
        sizes = spread.tokens(v.shape[-2])
        q, k, v = (_without_stand_in(x, spread) for x in (q, k, v))
        if few:
            keys, values = self._gathered(k, v, sizes)
            out = F.scaled_dot_product_attention(q, keys, values, scale=scale)
        else:
            out = self.along_ring(q, k, v, sizes, scale, "auto")
        return _with_stand_in(out, spread)

    def along_ring(
        self, q: Tensor, k: Tensor, v: Tensor, sizes: tuple[int, ...], scale: float | None, backend: Backend,
        branch: tuple[Tensor, str] | None = None,
    ) -> Tensor:  # fmt: skip
        """Dense attention of this process's queries to the keys of all.

        Args:
            q, k, v: ``[B, H, n, D]``, finished.
            sizes: n of each process.
            scale: As in `scaled_dot_product_attention`.
            backend: As in `Lite3RConfig.attention_backend`.
            branch: Proj ``[D, D]`` and the feature map of a linear branch over all tokens, or None.

        Returns:
            ``[B, H, n, D]`` in v's dtype.
        """
        group = self.group
        part = torch.stack([x.permute(2, 0, 1, 3) for x in (k.to(v.dtype), v)], 1)  # [n, 2, B, H, D]
        q, out, lse = q.to(v.dtype), None, None
        for step in range(group.size):
            last = step == group.size - 1
            coming, wait = (part, None) if last else group.pass_on(part, sizes[(group.rank - step - 1) % group.size])
            keys, values = part.permute(1, 2, 3, 0, 4).unbind(0)
            found = sparse_linear_attention(
                q, keys, values, keys=KeyTokens(), keep_ratio=1.0, scale=scale, backend=backend, return_lse=True
            )
            out, lse = found if out is None or lse is None else merge((out, found[0]), (lse, found[1]))
            if wait is not None:
                wait()
            part = coming
        assert out is not None
        return out if branch is None else out + self._over_all(q, k, v, *branch)

    def _over_all(self, q: Tensor, k: Tensor, v: Tensor, proj: Tensor, feature_map: str) -> Tensor:
        """The linear branch over the tokens of all processes, of this one's queries."""
        with without_autocast(v):
            state, total = linear_state(k, v, feature_map)
            wide = state.dtype
            state, total = self.group.sum(torch.cat((state, total[..., None]), -1)).split((state.shape[-1], 1), -1)
            features = phi(q.to(wide), feature_map)
            return (features @ (state @ proj.to(wide).mT) / (features @ total)).to(v.dtype)

    def _sparse(
        self, module: SparseLinearAttention, inputs: AttentionInputs, rows: Rows, sizes: tuple[int, ...], proj: Tensor | None,
        spread: Spread,
    ) -> Tensor:  # fmt: skip
        config, heads, count = module.state.config, inputs.v.shape[1], self._head_groups(inputs.v, sizes)
        groups = [slice(heads * one // count, heads * (one + 1) // count) for one in range(count)]

        def leave(some: slice) -> tuple[Tensor, Callable[[], Tensor]]:
            own = dataclasses.replace(inputs, q=inputs.q[:, some], k=inputs.k[:, some], v=inputs.v[:, some])
            q, k, v = (_without_stand_in(x, spread).permute(2, 0, 1, 3) for x in (*module.finished(own), own.v))
            # Before the keys: what comes after them waits for them, also on the way.
            others = self.group.exchange(q.index_select(0, rows.leaving), rows.sent, rows.received)
            queries = torch.cat((q.index_select(0, rows.staying), others))
            return queries.permute(1, 2, 0, 3), self.group.gather_pair(k, v, sizes)

        outs = []
        coming: tuple[Tensor, Callable[[], Tensor]] | None = leave(groups[0])
        for following in (*groups[1:], None):
            assert coming is not None
            queries, arrive = coming
            coming = None if following is None else leave(following)
            keys, values = arrive().permute(1, 2, 3, 0, 4).unbind(0)
            del arrive  # it holds what came, of which these are a copy where shares are uneven
            out = sparse_linear_attention(
                queries, keys, values, order=rows.arranged, pinned_tokens=rows.pinned, keys=KeyTokens(rows.order, rows.pinned_keys),
                scale=inputs.scale, keep_ratio=module.keep_ratio, negligible_ratio=config.negligible_ratio,
                linear="none" if proj is None else config.linear_branch, proj=proj, feature_map=config.feature_map,
                block_means=config.block_means, block_choice=config.chosen_by, block_q=config.block_q, block_k=config.block_k,
                backend=config.attention_backend,
            )  # fmt: skip
            outs.append(out.permute(2, 0, 1, 3))
            del queries, keys, values, out  # before the next are made
        out = outs[0] if count == 1 else torch.cat(outs, 2)
        del outs
        own, others = out.split((len(rows.staying), sum(rows.received)))
        home = torch.cat((own, self.group.exchange(others, rows.received, rows.sent)))
        return home.index_select(0, rows.returning).permute(1, 2, 0, 3)

    def _head_groups(self, v: Tensor, sizes: tuple[int, ...]) -> int:
        """Into how many groups heads are divided, the same in all processes."""
        token = 2 * v.element_size() * v[:, :, 0].numel()
        return head_groups(v.shape[1], token * (sum(sizes) - sum(sizes) // len(sizes)), self.least)

    def _gathered(self, k: Tensor, v: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Keys and values ``[B, H, N, D]`` of all processes, tokens outermost in memory, as they travel."""
        every = self.group.gather_pair(k.to(v.dtype).permute(2, 0, 1, 3), v.permute(2, 0, 1, 3), sizes)()
        keys, values = every.permute(1, 2, 3, 0, 4).unbind(0)
        return keys, values

    def _rows(
        self, layout: TokenLayout, sizes: tuple[int, ...], module: SparseLinearAttention, device: torch.device, stand_in: int
    ) -> Rows:
        config = module.state.config
        key = (layout, sizes, config.pin, config.block_q, device, stand_in)
        if key not in self._plans:
            self._plans[key] = plan_rows(layout, sizes, config.pin, config.block_q, self.group.rank, device, stand_in)
            if len(self._plans) > MAX_PLANS:
                self._plans.popitem(last=False)
        self._plans.move_to_end(key)
        return self._plans[key]


def _without_stand_in(x: Tensor, spread: Spread) -> Tensor:
    """``[B, H, n, D]`` without the tokens of the stand-in."""
    return spread.without_stand_in(x.unflatten(-2, (spread.held, -1)), 2).flatten(2, 3)


def _with_stand_in(out: Tensor, spread: Spread) -> Tensor:
    """``[B, H, n, D]`` with zeros for the tokens of the stand-in."""
    per_view = out.shape[-2] // spread.counts[spread.rank] * spread.skipped
    return torch.cat((out.new_zeros(*out.shape[:2], per_view, out.shape[-1]), out), -2) if per_view else out


def _whole(layout: TokenLayout, fqn: str, spread: Spread) -> TokenLayout:
    """The layout of the views of all processes, from that of this one's."""
    views = layout.parts[0]
    if len(layout.parts) != 1 or not isinstance(views, Views) or views.count != spread.held or layout.reference not in (0, None):
        raise LayoutError(
            f"site {fqn!r} has {layout} tokens, reference view {layout.reference}; over several processes a sequence is of {spread.held} "
            "views that are alike, the first one the reference, without tokens that are of no view"
        )
    return TokenLayout((Views(views.grid, spread.views, views.special_tokens, views.trailing_tokens),), layout.reference)


def _without_grid(tokens: int) -> TokenLayout:
    """Tokens in their own order, none of them pinned."""
    return TokenLayout((Views((1, tokens)),), None)
