"""The module that takes the place of a host's attention module.

It shares the host's tables of parameters, buffers, children and hooks, so whatever replaces a child (PEFT, `.to`,
quantisation) is seen by both, `state_dict` keys stay as they were plus ``proj_lin.weight``, and the host itself is
always there, whole, to run the dense model or to be put back.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapter.layouts import LayoutFunction, TokenLayout
from ..adapter.sites import AttentionSite, KeyValueCache
from ..config import Lite3RConfig
from ..costs.attention import break_even
from ..costs.model import SparseShares
from ..errors import ConfigError, LayoutError
from ..ops.block_map import Allowed, density, masked_density
from ..ops.dispatch import SlowPathWarning, require_one_device, use_triton
from ..ops.fp8 import fake_quantize
from ..ops.qk_norm_rope import norm_rope
from ..ops.sla import KeyCache, KeyTokens, SegmentMask, linear_attention, sparse_linear_attention
from ..tokens.layout import NOTHING, Pinned, pinned_tokens
from ..tokens.pending import RecomputedError
from ..tokens.tracker import LayoutTracker, Source, call, checked
from ..wrapper import Changes, HostWrapper, may_be_read
from .branch import branch_weight, make_branch, write_branch
from .inputs import AttentionInputs
from .masks import frame_causal, learns
from .state import CallCounts, ModelState
from .streams import Stream, Streams, in_a_row, in_calls, norm_as_it_is, of_calls, pinned_keys, pinned_queries
from .styles.registry import style_of

KEPT_WHOLE = "keep_ratio 1"
REPLACED = "something else takes the place of attention, as where views are spread over processes"
NO_SPARSE_FORM = "its attention has a mask that is not frame-causal"
MARGINAL_SHARE = 4
"""The branch over marginal blocks is not kept from call to call of a stream: it costs about a quarter of what preparing its keys does."""
Observer = Callable[["SparseLinearAttention", AttentionInputs, Tensor], None]
"""Sees the inputs and the output of an attention, ``[B, H, N, D]``; it must change neither."""
Substitute = Callable[["SparseLinearAttention", AttentionInputs], Tensor]
"""Takes the place of an attention: its output ``[B, H, N, D]``."""


class SparseLinearAttention(HostWrapper):
    """Attention of one site: sparse softmax over critical key blocks plus a linear branch through `proj_lin`.

    Args:
        host: The module to stand in for.
        site: Its description.
        state: What the sites of the model share.
        sparse: False for a site that stays dense and only has its norm and rotary embedding fused.
        left: Why the host's own forward is to run in every call; None where it is not.

    Attributes:
        proj_lin: The ``[D, D]`` map of the linear branch, FP32, without bias, shared by all heads, zero at the start
            (absent at sites that stay dense and with ``linear_branch="none"``).
        keep_ratio: The keep ratio of this site; 1 where it stays dense, NaN where it waits for a choice.
        style: How q, k and v are made.
        argument_names, argument_defaults: The arguments of the host's forward, as `ProjectionStyle` says.
        enabled: False runs the host's own forward.
        left: As above. A site is left later, too, where its host turns out to attend several times in one forward.
        calls: What ran so far.
        te_projection: Runs `proj_lin` in TransformerEngine where gradients are wanted, or None.
    """

    heads_at_once: int | None = None
    """Of attention, where memory is planned (`lite3r_plugin.runtime.memory`) and its style can make q, k and v so; None: all."""

    def __init__(self, host: nn.Module, site: AttentionSite, state: ModelState, sparse: bool, left: str | None = None) -> None:
        super().__init__(host)
        self.site = site
        self.state = state
        self.sparse = sparse
        self.enabled = True
        self._observers: tuple[tuple[Observer], ...] = ()  # each in a tuple of its own, by which it is told from others like it
        self._substitutes: tuple[tuple[Substitute, bool], ...] = ()
        self.calls = CallCounts()
        self.style = style_of(site, host, state.config.fuse)
        self.argument_names, self.argument_defaults = self.style.argument_names, self.style.argument_defaults
        # Looked up here, lest code that is compiled for one block depend on its name.
        self.keep_ratio, self.shares, self.left = self._ratio_of(state.config, left)
        self.te_projection: Any = None
        self._streams = Streams()
        self._density: tuple[Any, float] | None = None
        self._tokens, self._keys = (_LayoutOf.source(state, source if sparse else None) for source in (site.tokens, site.keys))
        if sparse and state.config.linear_branch != "none":
            self.proj_lin = make_branch(host, site.head_dim)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the host's forward. What has no sparse form (masks, causal order, dropout of weights) runs in the host's own code."""
        if self.enabled and not self._substitutes:
            self.require_ratio()
        if not self.enabled or self.left is not None:
            self.count("host" if self.enabled else "disabled")
            if self._tracker is not None:
                self._tracker.ran(self.site.fqn)
            return self.run_host(*args, **kwargs)
        return self.style.run(self, args, kwargs)

    def require_ratio(self) -> None:
        """Raise `ConfigError` where the site waits for its keep ratio: whatever it did instead would pass for what was asked."""
        if self.sparse and self.left is None and self.state.config.waits:
            raise ConfigError(
                "keep_ratio is 'auto', and no ratios were chosen yet: choose_keep_ratios(model, inputs) chooses them from a few inputs; "
                "to take those of another run, apply_lite3r(model, keep_ratio=KeepRatioProfile.load(file))"
            )

    def settle(self, changes: Changes) -> None:
        """Take the keep ratio that the configuration has now."""
        left = None if self.left == KEPT_WHOLE else self.left
        for name, value in zip(("keep_ratio", "shares", "left"), self._ratio_of(self.state.config, left), strict=True):
            changes.put(vars(self), name, value)

    def _ratio_of(self, config: Lite3RConfig, left: str | None) -> tuple[float, SparseShares, str | None]:
        """What follows from the keep ratio that a configuration has for this site, which is `left` to the host in any case: the ratio, its
        shares, and why the host's own forward runs."""
        ratio = config.keep_ratio_of(self.site.fqn) if self.sparse else 1.0
        if self.sparse and left is None and not self.style.replaces and ratio == 1 and config.patterns:
            left = None if config.linear_branch == "all" else KEPT_WHOLE
        return ratio, SparseShares.of(config, self.site.fqn), left

    def note(self, reason: str) -> None:
        """Take note that a call runs dense in the host's own code, and why; warn of each reason once."""
        if torch.compiler.is_compiling():
            return
        self.count("host")
        self.calls.reason = reason
        if reason not in self.state.warned:
            self.state.warned.add(reason)
            warnings.warn(
                f"Lite3R: site {self.site.fqn!r}, and those of which the same is true, runs dense in the host's own code: {reason}",
                SlowPathWarning,
                stacklevel=2,
            )

    def leave_to_host(self, reason: str) -> None:
        """Let the host's own forward run from now on; as `note`."""
        self.note(reason)
        self.left = reason

    def child(self, name: str) -> Any:
        """The host's child of that name, as it is now."""
        return getattr(self, name)

    @property
    def takes_fp8(self) -> bool:
        """Whether its input may be in FP8 already, a `Quantized` instead of a tensor: nothing but its FP8 Linears reads it."""
        return self.left is None and self._tokens.function is None and self.style.takes_fp8(self.child)

    def round_projection(self, changes: Changes) -> None:
        """Put into `proj_lin`, for good, the weight that training for FP8 used."""
        if "proj_lin" in self._modules and (rounded := self.projection(self.proj_lin.weight)) is not None:
            write_branch(self.proj_lin, rounded, changes)

    def attend(self, inputs: AttentionInputs, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Attention over the site's tokens, sparse or dense as `pays` says, or what takes its place (`substitute`).

        Args:
            inputs: Queries, keys and values.
            args, kwargs: What the forward was given, of which a `LayoutFunction` may read the layout.

        Returns:
            ``[B, H, N, D]`` in the dtype of ``inputs.v``.

        Raises:
            LayoutError: the tokens are not those of the images that the model was given.
            BackendError: the backend of the configuration cannot run here.
            WeightsError: weights are on the meta device, and inputs are not.
        """
        try:
            layout = self._tokens.layout(self.site.fqn, inputs.q.shape[-2], args, kwargs)
            keys = self._keys.layout(self.site.fqn, inputs.v.shape[-2], args, kwargs) if inputs.key_layout is None else inputs.key_layout
        except LayoutError as error:
            if not self._may_lack_layout(error):
                raise
            self.note("its tokens are not those of whole images")
            return self.dense(inputs)
        if layout is not None or keys is not None:
            inputs = dataclasses.replace(inputs, layout=layout, key_layout=keys)
        out = self._substitutes[-1][0](self, inputs) if self._substitutes else self._attend(inputs)
        if self._tracker is not None:
            self._tracker.watch(out)
        for (observer,) in self._observers:
            observer(self, inputs, out)
        return out

    def _may_lack_layout(self, error: LayoutError) -> bool:
        """Whether the tokens of a call may be others than the adapter says, so that it runs dense."""
        return not isinstance(error, RecomputedError) and not getattr(self.site.tokens, "strict", True)

    def attend_by_heads(self, parts: Iterator[AttentionInputs], num_heads: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """As `attend`, of inputs that hold some of the heads each. Each is dropped before the next one is made; it counts as one call.

        Args:
            parts: The inputs; together they have `num_heads` heads, in order.
            num_heads: H.
            args, kwargs: As of `attend`.

        Returns:
            ``[B, H, N, D]``.

        Raises:
            LayoutError, BackendError, WeightsError: As `attend`.
        """
        out: Tensor | None = None
        counted, done = dict[str, Any](), 0
        try:
            for inputs in parts:
                part = self.attend(inputs, args, kwargs).transpose(1, 2)
                if out is None:
                    out, counted = part.new_empty(*part.shape[:2], num_heads, part.shape[3]), dict(vars(self.calls))
                out[:, :, done : done + part.shape[2]] = part
                done += part.shape[2]
                inputs = part = None
        finally:
            vars(self.calls).update(counted)
        assert out is not None
        return out.transpose(1, 2)

    def attend_to_past(
        self,
        inputs: AttentionInputs,
        past: tuple[Tensor, Tensor] | None,
        cache: KeyValueCache,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Attention of a call's tokens to those of earlier calls and to each other, sparse or dense as `pays` says.

        What is computed once for each call is kept (`streams`); what somebody observes, or learns from, is computed as a whole.

        Args:
            inputs: Of the tokens of this call; keys not normed and rotated yet.
            past: k and v of the tokens before, as `cache` says; None at the beginning.
            cache: How they are given.
            args, kwargs: As of `attend`.

        Returns:
            ``[B, H, N, D]``, and k and v of all tokens so far, as `cache` says.

        Raises:
            LayoutError, BackendError, WeightsError: As `attend`.
        """
        tokens, config = inputs.v.shape[2], self.state.config
        try:
            layout = self.layout(tokens, args, kwargs)
        except LayoutError as error:
            if not self._may_lack_layout(error):
                raise
            return self._attend_to_all_of(inputs, past, cache, None, args, kwargs)
        if self._substitutes or _is_recorded(inputs.v) or not _without_gradients(inputs, past):  # a recording is replayed with other caches
            return self._attend_to_all_of(inputs, past, cache, layout, args, kwargs)
        positions = None if inputs.positions is None else self.state.positions.of(inputs.positions)
        shared, norm = (None, None) if cache.finished else (positions, norm_as_it_is(inputs.k_norm))
        stream = None if past is None else self._streams.find(past, inputs.v, layout, shared, norm)
        if stream is None:
            stream = Stream(KeyCache(config.block_q, config.block_k), layout, shared, norm)
            if past is not None and not self._take_over(stream, inputs, past, cache):
                return self._attend_to_all_of(inputs, past, cache, layout, args, kwargs)
        before, first = stream.keys.tokens, past is None
        queries = stream.keys.extend(
            inputs.q, inputs.k, inputs.v, order=self.order(layout, inputs.v), pinned_tokens=pinned_keys(layout, config.pin, first),
            q_norm=inputs.q_norm, k_norm=inputs.k_norm, positions=positions, rope_base=inputs.rope_base, backend=self._preparing,
        )  # fmt: skip
        k, v = stream.cached(queries.keys if cache.finished else inputs.k, inputs.v, before)
        k, v = in_calls(k, cache, tokens), in_calls(v, cache, tokens)
        self._streams.keep(stream, k, v)
        proj, all_tokens = self.projection(inputs.v), stream.keys.tokens
        pinned = pinned_queries(layout, config.pin, first)
        prepared = tokens + (all_tokens // MARGINAL_SHARE if proj is not None and config.linear_branch == "marginal" else 0)
        options: dict[str, Any] = dict(scale=inputs.scale, backend=config.attention_backend)
        if self.pays(stream.keys.v, Pinned(pinned, stream.keys.pinned_tokens), tokens, prepared):
            self.begin_sparse(tokens, Pinned(0, stream.keys.pinned_tokens), all_tokens, exact=pinned)
            out = stream.keys.attend(
                queries, keep_ratio=self.keep_ratio, negligible_ratio=config.negligible_ratio, pinned_tokens=pinned, proj=proj,
                linear="none" if proj is None else config.linear_branch, feature_map=config.feature_map, block_means=config.block_means,
                block_choice=config.chosen_by, **options,
            )  # fmt: skip
        elif self.begin_dense():
            out = stream.keys.attend(queries, keep_ratio=1.0, linear="all", feature_map=config.feature_map, proj=proj, **options)
        else:
            out = stream.keys.attend_to_all(queries, scale=inputs.scale)
        for (observer,) in self._observers:
            observer(self, self._everything(inputs, past, cache, layout)[0], out)
        return out, k, v

    @contextlib.contextmanager
    def observe(self, observer: Observer) -> Iterator[None]:
        """Call ``observer(site, inputs, out)`` after each attention of this site while the context is open.

        Several may be open at once; they are called in the order in which they were opened. Where the host's own forward runs, as in
        `lite3r_disabled` and where a site that stays dense is `Routed`, there is nothing to see.
        """
        entry = (observer,)
        try:
            try:
                self._observers = (*self._observers, entry)
                yield
            finally:
                self._observers = _without(self._observers, entry)
        finally:  # an interruption may come before the first
            self._observers = _without(self._observers, entry)

    @contextlib.contextmanager
    def substitute(self, substitute: Substitute, watches: bool = True) -> Iterator[None]:
        """Let ``substitute(site, inputs)`` take the place of this site's attention while the context is open.

        Where several are open, the one that was opened last does. Observers see what it returns, ``[B, H, N, D]``.

        Args:
            substitute: What does.
            watches: Whether the model is to run as without a preset meanwhile, as where somebody observes. Else its blocks run compiled
                around this site, if it may be sparse, and whatever is raised inside is raised at once: a forward runs only once.
        """
        entry = (substitute, watches)
        try:
            try:
                self._substitutes = (*self._substitutes, entry)
                yield
            finally:
                self._substitutes = _without(self._substitutes, entry)
        finally:
            self._substitutes = _without(self._substitutes, entry)

    @contextlib.contextmanager
    def unseen(self) -> Iterator[None]:
        """Nobody observes its attention inside the context, or takes the place of it; it is made whole where somebody did."""
        observers, substitutes = self._observers, self._substitutes
        try:
            self._observers = ((_see_nothing,),) if observers else ()
            self._substitutes = tuple((_in_its_own_place, watches) for _, watches in substitutes)
            yield
        finally:
            self._observers, self._substitutes = observers, substitutes

    def dense(self, inputs: AttentionInputs, proj: Tensor | None = None) -> Tensor:
        """Attention of all tokens to all, plus the linear branch over all of them through `proj` ``[D, D]``, if there is one.

        Returns ``[B, H, N, D]``.
        """
        require_one_device(inputs.v, queries=inputs.q, keys=inputs.k, mask=inputs.mask)
        q, k = self.finished(inputs)
        mask = inputs.mask if inputs.mask is None or inputs.mask.dtype == torch.bool else inputs.mask.to(q.dtype)
        out = F.scaled_dot_product_attention(q, k, inputs.v, attn_mask=mask, scale=inputs.scale)
        if proj is not None:
            out = out + linear_attention(q, k, inputs.v, proj=proj, feature_map=self.state.config.feature_map)
        return out

    def sparse_linear(self, inputs: AttentionInputs, proj: Tensor | None, keep_ratio: float | None = None) -> Tensor:
        """Sparse attention as configured, plus the linear branch through `proj` ``[D, D]``, if there is one, whatever pays.

        `keep_ratio` takes the place of the site's own. With a mask that has no sparse form it is attention as the mask has it, without a
        branch. Returns ``[B, H, N, D]``.
        """
        mask = self.recognised(inputs)
        if mask is None and inputs.mask is not None:
            return self.dense(inputs)
        return self._sparse_linear(inputs, proj, mask, self.keep_ratio if keep_ratio is None else keep_ratio)

    def _sparse_linear(self, inputs: AttentionInputs, proj: Tensor | None, mask: SegmentMask | None, keep_ratio: float) -> Tensor:
        config, layout = self.state.config, inputs.layout
        pinned, keys = self.pinned_in(inputs), None
        if inputs.crossed:
            keys = KeyTokens(self.order(inputs.key_layout, inputs.v), pinned.keys, inputs.key_positions)
        return sparse_linear_attention(
            inputs.q, inputs.k, inputs.v,
            q_norm=inputs.q_norm, k_norm=inputs.k_norm, positions=inputs.positions, rope_base=inputs.rope_base, scale=inputs.scale,
            keep_ratio=keep_ratio, negligible_ratio=config.negligible_ratio, order=self.order(layout, inputs.v),
            pinned_tokens=pinned.queries, pinned_keys=None if inputs.crossed else pinned.keys, keys=keys, mask=mask,
            linear="none" if proj is None else config.linear_branch, proj=proj,
            feature_map=config.feature_map, block_means=config.block_means, block_choice=config.chosen_by,
            block_q=config.block_q, block_k=config.block_k, backend=config.attention_backend,
        )  # fmt: skip

    @property
    def is_watched(self) -> bool:
        """Whether somebody observes its attention, or takes the place of it to watch."""
        return bool(self._observers) or any(watches for _, watches in self._substitutes)

    @property
    def is_seen_whole(self) -> bool:
        """Whether somebody observes its attention, or takes the place of it: who does sees all heads at once."""
        return bool(self._observers or self._substitutes)

    @property
    def is_substituted(self) -> bool:
        """Whether somebody takes the place of its attention."""
        return bool(self._substitutes)

    @property
    def is_replaced(self) -> bool:
        """Whether somebody takes the place of its attention for more than to watch, as where views are spread over processes."""
        return any(not watches for _, watches in self._substitutes)

    def extra_repr(self) -> str:
        config = self.state.config
        if not self.sparse:
            return f"scope={self.site.scope}, dense, fused norm and rotary embedding"
        return (
            f"scope={self.site.scope}, keep_ratio={self.keep_ratio}, negligible_ratio={config.negligible_ratio}, "
            f"blocks={config.block_q}x{config.block_k}, linear_branch={config.linear_branch}, block_means={config.block_means}, "
            f"block_choice={config.chosen_by}, backend={config.attention_backend}"
        )

    def pays(self, v: Tensor, pinned: Pinned, queries: int | None = None, prepared: int | None = None) -> bool:
        """Whether this site is to run sparse for values `v` ``[B, H, N, D]``.

        Never where nothing is to be dropped, from `Lite3RConfig.dense_below` tokens on where that is set, and else where it is expected
        to be faster (`lite3r_plugin.costs.attention`): never on a CPU. An unknown GPU may be measured for that, some seconds, once.

        Args:
            v: The values.
            pinned: Queries that attend to all of the N keys, and those of them to which all queries attend.
            queries: How many queries there are, where they are other tokens.
            prepared: Tokens whose queries, keys and values are prepared in this call; None: all.
        """
        config, (batch, num_heads, tokens, dim) = self.state.config, v.shape
        if self.keep_ratio == 1:
            return False
        if config.dense_below is not None:
            return tokens >= config.dense_below
        compiling = torch.compiler.is_compiling()
        may_measure = not compiling and not (v.is_cuda and torch.cuda.is_current_stream_capturing())
        rule = break_even(v.device, *self.shares, may_measure)
        queries = tokens if queries is None else queries
        prepared = (queries + 2 * tokens) // 3 if prepared is None else prepared
        return rule.pays(batch * num_heads * dim, queries, pinned.queries, tokens, pinned.keys, prepared)

    def _attend(self, inputs: AttentionInputs) -> Tensor:
        if self.sparse and self.state.config.attention_backend == "triton":
            use_triton("triton", inputs.v)  # raises also where this length runs dense
        proj, pinned = self.projection(inputs.v), self.pinned_in(inputs)
        if inputs.mask is not None:
            return self._attend_masked(inputs, proj)
        queries, keys = inputs.q.shape[-2], inputs.v.shape[-2]
        v = inputs.v if inputs.num_heads is None else inputs.v[:, :1].expand(-1, inputs.num_heads, -1, -1)  # some run as all would
        if not self.pays(v, pinned, queries):
            return self.dense(inputs, proj if self.begin_dense() else None)
        self.begin_sparse(queries, pinned, keys)
        if self.trains_in_te():
            return self.sparse_linear(inputs, None) + self._branch_in_te(inputs)
        return self.sparse_linear(inputs, proj)

    @property
    def _preparing(self) -> str:
        """The backend of norm and rotary embedding."""
        return self.state.config.attention_backend if self.sparse else "auto"

    def _take_over(self, stream: Stream, inputs: AttentionInputs, past: tuple[Tensor, Tensor], cache: KeyValueCache) -> bool:
        """Prepare what came before, of which nothing is known but the tensors; whether it is of calls like this one."""
        k, v = (in_a_row(x, cache) for x in past)
        calls, rest = divmod(v.shape[2], inputs.v.shape[2])
        like_these = (*v.shape[:2], v.shape[3], v.dtype) == (*inputs.v.shape[:2], inputs.v.shape[3], inputs.v.dtype)
        if rest or not calls or k.shape != v.shape or not like_these:
            return False
        layout, pin = stream.layout, self.state.config.pin
        positions = stream.positions if stream.positions is None else stream.positions.repeat(1, calls, 1)
        stream.keys.extend(
            k, k, v, order=self.order(of_calls(layout, calls), v), positions=positions, rope_base=inputs.rope_base, backend=self._preparing,
            pinned_tokens=pinned_keys(layout, pin, first=True) + (calls - 1) * pinned_keys(layout, pin, first=False),
            k_norm=None if cache.finished else inputs.k_norm,
        )  # fmt: skip
        stream.cached(k, v, 0)
        return True

    def _attend_to_all_of(
        self,
        inputs: AttentionInputs,
        past: tuple[Tensor, Tensor] | None,
        cache: KeyValueCache,
        layout: TokenLayout | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `attend_to_past` of tokens with that layout, with nothing kept."""
        everything, k, v = self._everything(inputs, past, cache, layout)
        tokens = inputs.v.shape[2]
        return self.attend(everything, args, kwargs), in_calls(k, cache, tokens), in_calls(v, cache, tokens)

    def _everything(
        self, inputs: AttentionInputs, past: tuple[Tensor, Tensor] | None, cache: KeyValueCache, layout: TokenLayout | None
    ) -> tuple[AttentionInputs, Tensor, Tensor]:
        """The inputs with the keys and values of all tokens so far, and these as they are cached, ``[B, H, N, D]``."""
        tokens = inputs.v.shape[2]
        if cache.finished:
            q, k = self.finished(inputs)
            inputs = dataclasses.replace(inputs, q=q, k=k, q_norm=None, k_norm=None, positions=None, rope_base=None)
        k, v = inputs.k, inputs.v
        if past is not None:
            k, v = (torch.cat((in_a_row(x, cache), new), 2) for x, new in zip(past, (k, v), strict=True))
        calls, pin = v.shape[2] // tokens, self.state.config.pin
        positions = None if inputs.positions is None else inputs.positions.repeat(1, calls, 1)
        whole = of_calls(layout, calls) if calls * tokens == v.shape[2] else None
        kept = pinned_keys(layout, pin, True) + (calls - 1) * pinned_keys(layout, pin, False)
        everything = dataclasses.replace(
            inputs, k=k.to(v.dtype), v=v, crossed=True, key_positions=positions, layout=layout, key_layout=whole,
            pinned=Pinned(pinned_queries(layout, pin, past is None), 0 if whole is None else kept),
        )  # fmt: skip
        return everything, k, v

    def _attend_masked(self, inputs: AttentionInputs, proj: Tensor | None) -> Tensor:
        """Attention with a mask. Sparse it pays where it does without one, or more: a mask leaves less to compute, which dense attention
        does not make use of."""
        branch = self.keep_ratio == 1 and self.state.config.linear_branch == "all"
        sparse = self.pays(inputs.v, self.pinned(inputs.layout))
        if not sparse and not branch:
            self.begin_dense()
            return self.dense(inputs)
        asked = torch.compiler.is_compiling() and self.state.config.dense_below is not None  # then a compiler breaks its graph for it
        if sparse and _is_recorded(inputs.v) and not asked:
            self.note("its mask cannot be looked at while a graph is recorded")
            return self.dense(inputs)
        mask = self.recognised(inputs)
        if mask is None:
            learned = inputs.mask is not None and learns(inputs.mask)
            self.note("its mask learns, for which the sparse form has no gradient" if learned else NO_SPARSE_FORM)
            return self.dense(inputs)
        if sparse:
            self.count("sparse", self._masked_density(mask, inputs.layout))
        else:
            self.begin_dense()
        return self._sparse_linear(inputs, proj, mask, self.keep_ratio)

    def recognised(self, inputs: AttentionInputs) -> SegmentMask | None:
        """The sparse form of the mask of a call; None where it has no mask, or that no sparse form."""
        if inputs.mask is None:
            return None
        if _is_recorded(inputs.v):
            return frame_causal(inputs.mask, inputs.layout)
        return self.state.masks.of(inputs.mask, inputs.layout, None if self._tracker is None else self._tracker.forward)

    def _masked_density(self, mask: SegmentMask, layout: TokenLayout | None) -> float:
        """The density of a call with a mask over the views of a sequence with that layout."""
        config = self.state.config
        key = (mask.before, mask.after, mask.sink, layout, self.keep_ratio)
        if self._density is None or self._density[0] != key:
            share = masked_density(self.allowed(mask, layout), self.keep_ratio, *self.pinned(layout), config.block_q, config.block_k)
            self._density = key, share
        return self._density[1]

    def allowed(self, mask: SegmentMask, layout: TokenLayout | None) -> Allowed:
        """What a mask over the views of a sequence with that layout allows its tokens in order, on the CPU."""
        on_cpu = mask._replace(queries=mask.queries.cpu(), keys=None)
        order = self.order(layout, on_cpu.queries)
        return on_cpu.ordered(order, order)

    def begin_dense(self) -> bool:
        """Count a call that runs dense. Whether the linear branch over all tokens is to be added."""
        self.count("dense")
        return self.keep_ratio == 1 and self.state.config.linear_branch == "all"

    def begin_sparse(self, queries: int, pinned: Pinned, keys: int, exact: int = 0) -> None:
        """Count a call that runs sparse, of so many queries and keys; `exact` queries attend to all, and not the rest of their block."""
        config = self.state.config
        if not torch.compiler.is_compiling():
            share = density(queries, keys, self.keep_ratio, *pinned, config.block_q, config.block_k)
            self.count("sparse", share + (1 - share) * exact / max(queries, 1))

    def trains_in_te(self) -> bool:
        """Whether TransformerEngine runs `proj_lin` in this call."""
        return self.te_projection is not None and torch.is_grad_enabled() and may_be_read(self.proj_lin)

    def _branch_in_te(self, inputs: AttentionInputs) -> Tensor:
        q, k = self.finished(inputs)
        identity = torch.eye(q.shape[-1], device=q.device)
        branch = linear_attention(q, k, inputs.v, proj=identity, feature_map=self.state.config.feature_map)
        return self.te_projection(branch, self.proj_lin.weight)

    def projection(self, like: Tensor) -> Tensor | None:
        """The weight of the linear branch, on the device of `like` ``[..., D]``. While training for FP8 it is rounded to FP8; its
        input, which the attention kernels make and use at once, is not."""
        if not self.sparse or self.state.config.linear_branch == "none":
            return None
        weight = branch_weight(self.proj_lin, like, self.site)
        return fake_quantize(weight) if self.state.phase == "fp8_qat" else weight

    def layout(self, tokens: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TokenLayout | None:
        """The layout of the running forward's sequence of `tokens` tokens, which are queries. Raises `LayoutError`."""
        return self._tokens.layout(self.site.fqn, tokens, args, kwargs)

    def pinned(self, layout: TokenLayout | None) -> Pinned:
        """How many tokens of a sequence, the first in `order`, are always kept."""
        return pinned_tokens(layout, self.state.config.pin) if layout is not None else NOTHING

    def pinned_in(self, inputs: AttentionInputs) -> Pinned:
        """The queries and the keys of a call that are always kept, which may be of two sequences."""
        if inputs.pinned is not None:
            return inputs.pinned
        return Pinned(self.pinned(inputs.layout).queries, self.pinned(inputs.key_layout if inputs.crossed else inputs.layout).keys)

    def order(self, layout: TokenLayout | None, like: Tensor) -> Tensor | None:
        """The order ``[N]`` of the tokens of a sequence, on the device of `like`."""
        return None if layout is None else self.state.orders.get(layout, like.device)

    @property
    def _tracker(self) -> LayoutTracker | None:
        return self._tokens.tracker

    def finished(self, inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
        """Queries and keys, normed and rotated, in the dtype of values."""
        dtype = inputs.v.dtype
        if inputs.q_norm is None and inputs.k_norm is None and inputs.rope_base is None:
            return inputs.q.to(dtype), inputs.k.to(dtype)
        if inputs.crossed:  # the kernel takes queries and keys of the same tokens
            q, k = (
                norm_rope(x, x, q_norm=norm, k_norm=None, positions=positions, rope_base=inputs.rope_base, triton=False)[0]
                for x, norm, positions in (
                    (inputs.q, inputs.q_norm, inputs.positions),
                    (inputs.k, inputs.k_norm, inputs.key_positions),
                )
            )
            return q.to(dtype), k.to(dtype)
        norms = (x for norm in (inputs.q_norm, inputs.k_norm) if norm is not None for x in (norm.weight, norm.bias))
        learns = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (inputs.q, inputs.k, *norms))
        backend = "naive" if learns else self.state.config.attention_backend if self.sparse else "auto"  # torch has gradients of this
        q, k = norm_rope(
            inputs.q, inputs.k, q_norm=inputs.q_norm, k_norm=inputs.k_norm, positions=inputs.positions, rope_base=inputs.rope_base,
            triton=use_triton(backend, inputs.v),
        )  # fmt: skip
        return q.to(dtype), k.to(dtype)

    def count(self, what: str, share: float | None = None) -> None:
        """Count a call in `calls` as `what`, with its density."""
        if not torch.compiler.is_compiling():  # a changing int attribute would recompile the caller on every call
            setattr(self.calls, what, getattr(self.calls, what) + 1)
            self.calls.density = self.calls.density if share is None else share


def _see_nothing(site: SparseLinearAttention, inputs: AttentionInputs, out: Tensor) -> None:
    """An observer."""


def _in_its_own_place(site: SparseLinearAttention, inputs: AttentionInputs) -> Tensor:
    """A substitute: what the site does without one, or dense attention where it waits for its keep ratio."""
    return site.dense(inputs) if site.state.config.waits else site._attend(inputs)


def _is_recorded(v: Tensor) -> bool:
    """Whether this call is compiled or captured, to be run again with other tensors."""
    return torch.compiler.is_compiling() or (v.is_cuda and torch.cuda.is_current_stream_capturing())


def _without_gradients(inputs: AttentionInputs, past: tuple[Tensor, Tensor] | None) -> bool:
    """Whether autograd follows nothing of this."""
    return not torch.is_grad_enabled() or not any(x.requires_grad for x in (inputs.q, inputs.k, inputs.v, *(past or ())))


@dataclasses.dataclass(frozen=True)
class _LayoutOf:
    """Where the layout of tokens comes from: from the arguments of the site's own forward, or from a module that is watched."""

    function: LayoutFunction | None
    tracker: LayoutTracker | None

    @classmethod
    def source(cls, state: ModelState, source: Source | None) -> _LayoutOf:
        if isinstance(source, LayoutFunction) and source.module is None:
            return cls(source, None)
        return cls(None, None if source is None else state.trackers.get(source))

    def layout(self, fqn: str, tokens: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TokenLayout | None:
        """The layout of a sequence of `tokens` tokens, None where nothing says. Raises `LayoutError`."""
        if self.function is not None:
            return checked(call(self.function, args, kwargs), fqn, tokens)
        return None if self.tracker is None else self.tracker.layout(fqn, tokens)


def _without(items: tuple[Any, ...], item: Any) -> tuple[Any, ...]:
    """`items` without `item`, if it is among them."""
    return tuple(other for other in items if other is not item)
