"""The module that takes the place of a host's attention module.

It shares the host's tables of parameters, buffers, children and hooks, so whatever replaces a child (PEFT, `.to`,
quantisation) is seen by both, `state_dict` keys stay as they were plus ``proj_lin.weight``, and the host itself is
always there, whole, to run the dense model or to be put back.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapter.sites import AttentionSite, TokenLayout
from ..config import Lite3RConfig, Precision
from ..costs.attention import break_even, shares_of
from ..ops.block_map import density
from ..ops.dispatch import use_triton
from ..ops.fp8 import fake_quantize
from ..ops.qk_norm_rope import norm_rope
from ..ops.sla import linear_attention, sparse_linear_attention
from ..tokens.tracker import GridTracker, order_for, pinned_tokens
from ..wrapper import StandIn
from .inputs import Heads
from .styles import projected as projections


@dataclass
class CallCounts:
    """Forward calls of a site outside `torch.compile`, by what ran, and the density of the last sparse one.

    The density is the share of (query block, key block) pairs that were computed exactly, pinned ones included.
    """

    sparse: int = 0
    dense: int = 0
    disabled: int = 0
    density: float | None = None


@dataclass
class ModelState:
    """What the sites of one model share.

    Attributes:
        adapter: Name of the model adapter.
        config: The configuration: what was asked for, in the end.
        phase: What the Linears of the transformer blocks are now: in full precision, rounded to FP8 in training, or in FP8.
        skipped: Sites that the adapter named but that were not swapped, with the reason.
        trackers: The grid trackers, by image module.
        sites: All sites that the adapter named.
        blocks: The transformer blocks around them, by name.
        notes: What `describe` is to say besides, such as why something runs in another way than asked, by what it is about.
        swapped: How many attention modules were taken the place of.
    """

    adapter: str
    config: Lite3RConfig
    phase: Precision = "full"
    skipped: dict[str, str] = field(default_factory=dict)
    trackers: dict[str, GridTracker] = field(default_factory=dict)
    sites: tuple[AttentionSite, ...] = ()
    blocks: dict[str, nn.Module] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)
    swapped: int = 0


class SparseLinearAttention(StandIn):
    """Attention of one site: sparse softmax over critical key blocks plus a linear branch through `proj_lin`.

    Args:
        host: The module to stand in for.
        site: Its description.
        state: What the sites of the model share.
        sparse: False for a site that stays dense and only has its norm and rotary embedding fused.

    Attributes:
        proj_lin: The ``[D, D]`` map of the linear branch, without bias, shared by all heads, zero at the start
            (absent at sites that stay dense and with ``linear_branch="none"``).
        keep_ratio: The keep ratio of this site; 1 where it stays dense.
        enabled: False runs the host's own forward.
        observer: Takes the place of `attend` while it is set, as calibration does to see queries, keys and values.
        calls: What ran so far.
        te_projection: Runs `proj_lin` in TransformerEngine where gradients are wanted, or None.
    """

    def __init__(self, host: nn.Module, site: AttentionSite, state: ModelState, sparse: bool) -> None:
        super().__init__(host)
        self.site = site
        self.state = state
        self.sparse = sparse
        # Looked up here, lest code that is compiled for one block depend on its name.
        self.keep_ratio = state.config.keep_ratio_of(site.fqn) if sparse else 1.0
        self.shares = shares_of(state.config, site.fqn)
        self.enabled = True
        self.observer: Callable[[SparseLinearAttention, Heads], Tensor] | None = None
        self.calls = CallCounts()
        self.attended_to_itself = False  # seen to be no cross-attention, at a `Routed` site with several arguments
        self.argument_names = tuple(inspect.signature(host.forward).parameters)
        self.te_projection: Any = None
        if sparse and state.config.linear_branch != "none":
            like = next((p for p in host.parameters() if p.is_floating_point()), torch.empty(0))
            dtype = torch.float32 if state.phase == "fp8_qat" else like.dtype  # steps are smaller than BF16's
            self.proj_lin = nn.Linear(site.head_dim, site.head_dim, bias=False, device=like.device, dtype=dtype)
            nn.init.zeros_(self.proj_lin.weight)
            self.proj_lin.train(host.training)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the host's forward. Raises `UnsupportedAttentionError` for masks, causal order and attention dropout."""
        if not self.enabled:
            self._count("disabled")
            return self.run_host(*args, **kwargs)
        return projections.run(self, *args, **kwargs)

    def release(self) -> nn.Module:
        """Give back the host, as it was before."""
        self._modules.pop("proj_lin", None)
        return super().release()

    def round_projection(self) -> None:
        """Put into `proj_lin`, for good, the weight that training for FP8 used."""
        if (weight := self._projection()) is not None:
            with torch.no_grad():
                self.proj_lin.weight.copy_(weight)

    def attend(self, heads: Heads) -> Tensor:
        """Attention over the site's tokens. Returns ``[B, H, N, D]``."""
        if self.observer is not None:
            return self.observer(self, heads)
        config, tokens = self.state.config, heads.v.shape[-2]
        if self.sparse and config.attention_backend == "triton":
            use_triton("triton", heads.v)  # raises also where this length runs dense
        pinned = self._pinned(self._layout(tokens))
        out = self._attend(heads, pinned)
        if (tracker := self._tracker()) is not None:
            tracker.watch(out)
        return out

    def _attend(self, heads: Heads, pinned: int) -> Tensor:
        config, tokens = self.state.config, heads.v.shape[-2]
        proj = self._projection()
        if not self._pays(heads.v, pinned):
            self._count("dense")
            return self.dense(heads, proj if self.keep_ratio == 1 and config.linear_branch == "all" else None)
        if not torch.compiler.is_compiling():
            self._count("sparse", density(tokens, self.keep_ratio, pinned, config.block_q, config.block_k))
        if self.te_projection is not None and proj is not None and torch.is_grad_enabled():
            return self.sparse_linear(heads, None) + self._branch_in_te(heads)
        return self.sparse_linear(heads, proj)

    def dense(self, heads: Heads, proj: Tensor | None = None) -> Tensor:
        """Attention of all tokens to all, plus the linear branch over all of them through `proj`, if there is one."""
        q, k = self._finished(heads)
        out = F.scaled_dot_product_attention(q, k, heads.v, scale=heads.scale)
        if proj is not None:
            out = out + linear_attention(q, k, heads.v, proj=proj, feature_map=self.state.config.feature_map)
        return out

    def sparse_linear(self, heads: Heads, proj: Tensor | None) -> Tensor:
        """Sparse attention as configured, plus the linear branch through `proj`, if there is one, whatever pays."""
        config, layout = self.state.config, self._layout(heads.v.shape[-2])
        return sparse_linear_attention(
            heads.q, heads.k, heads.v,
            q_norm=heads.q_norm, k_norm=heads.k_norm, positions=heads.positions, rope_base=heads.rope_base, scale=heads.scale,
            keep_ratio=self.keep_ratio, negligible_ratio=config.negligible_ratio,
            order=None if layout is None else order_for(layout, heads.v.device),
            pinned_tokens=self._pinned(layout), linear="none" if proj is None else config.linear_branch, proj=proj,
            feature_map=config.feature_map, block_means=config.block_means,
            block_q=config.block_q, block_k=config.block_k, backend=config.attention_backend,
        )  # fmt: skip

    def extra_repr(self) -> str:
        config = self.state.config
        if not self.sparse:
            return f"scope={self.site.scope}, dense, fused norm and rotary embedding"
        return (
            f"scope={self.site.scope}, keep_ratio={self.keep_ratio}, negligible_ratio={config.negligible_ratio}, "
            f"blocks={config.block_q}x{config.block_k}, linear_branch={config.linear_branch}, block_means={config.block_means}, "
            f"backend={config.attention_backend}"
        )

    def _pays(self, v: Tensor, pinned: int) -> bool:
        """Whether to run sparse: asked for, or expected to be faster."""
        config, (batch, num_heads, tokens, dim) = self.state.config, v.shape
        if self.keep_ratio == 1:
            return False
        if config.dense_below is not None:
            return tokens >= config.dense_below
        compiling = torch.compiler.is_compiling()
        may_measure = not compiling and not (v.is_cuda and torch.cuda.is_current_stream_capturing())
        return break_even(v.device, self.shares, may_measure).pays(batch * num_heads * dim, tokens, pinned)

    def _branch_in_te(self, heads: Heads) -> Tensor:
        q, k = self._finished(heads)
        identity = torch.eye(q.shape[-1], device=q.device)
        branch = linear_attention(q, k, heads.v, proj=identity, feature_map=self.state.config.feature_map)
        return self.te_projection(branch, self.proj_lin.weight)

    def _projection(self) -> Tensor | None:
        """The weight of the linear branch. While training for FP8 it is rounded to FP8; its input, which the attention
        kernels make and use at once, is not."""
        if not self.sparse or self.state.config.linear_branch == "none":
            return None
        weight = self.proj_lin.weight
        if type(self.proj_lin) is not nn.Linear:  # an adapter around it, such as a LoRA: what it does to the unit vectors
            weight = self.proj_lin(torch.eye(weight.shape[1], device=weight.device, dtype=weight.dtype)).mT
        return fake_quantize(weight) if self.state.phase == "fp8_qat" else weight

    def _tracker(self) -> GridTracker | None:
        if not self.sparse or self.site.tokens is None:
            return None
        return self.state.trackers[self.site.tokens.image_module]

    def _layout(self, tokens: int) -> TokenLayout | None:
        tracker = self._tracker()
        return None if tracker is None else tracker.layout(self.site.fqn, tokens)

    def _pinned(self, layout: TokenLayout | None) -> int:
        config = self.state.config
        return pinned_tokens(layout, config.pin) if layout is not None else 0

    def _finished(self, heads: Heads) -> tuple[Tensor, Tensor]:
        dtype = heads.v.dtype
        if heads.q_norm is None and heads.k_norm is None and heads.rope_base is None:
            return heads.q.to(dtype), heads.k.to(dtype)
        norms = (x for norm in (heads.q_norm, heads.k_norm) if norm is not None for x in (norm.weight, norm.bias))
        learns = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (heads.q, heads.k, *norms))
        backend = "naive" if learns else self.state.config.attention_backend if self.sparse else "auto"  # torch has gradients of this
        q, k = norm_rope(
            heads.q, heads.k, q_norm=heads.q_norm, k_norm=heads.k_norm, positions=heads.positions, rope_base=heads.rope_base,
            triton=use_triton(backend, heads.v),
        )  # fmt: skip
        return q.to(dtype), k.to(dtype)

    def _count(self, what: str, share: float | None = None) -> None:
        if not torch.compiler.is_compiling():  # a changing int attribute would recompile the caller on every call
            setattr(self.calls, what, getattr(self.calls, what) + 1)
            self.calls.density = self.calls.density if share is None else share
