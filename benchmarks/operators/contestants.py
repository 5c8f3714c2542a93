"""The kinds of attention that `bench_attention.py` times, on the same q, k, v and with the same kept blocks."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from roofline import Work
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lite3r_plugin import AttentionSite, Lite3RConfig, Routed
from lite3r_plugin.attention.inputs import AttentionInputs
from lite3r_plugin.attention.module import SparseLinearAttention
from lite3r_plugin.attention.state import ModelState
from lite3r_plugin.ops.block_map import block_map, kept_blocks
from lite3r_plugin.ops.qk_norm_rope import prepare_qkv
from lite3r_plugin.ops.sla import sparse_linear_attention
from lite3r_plugin.tokens.layout import NOTHING

BLOCK_Q, BLOCK_K = 128, 64
MAX_INDEX_BYTES = 8e9  # of SAF3R's indices, one for each query and kept key


@dataclass(frozen=True)
class Problem:
    """One sequence: q, k, v ``[1, H, N, D]`` leaves, and the key blocks that are kept, ``[1, H, query blocks, kept]``."""

    q: Tensor
    k: Tensor
    v: Tensor
    proj: Tensor
    keep_ratio: float
    indices: Tensor

    @property
    def sizes(self) -> tuple[int, int, int]:
        """H, N, D."""
        _, heads, tokens, dim = self.q.shape
        return heads, tokens, dim


@dataclass(frozen=True)
class Contestant:
    """One method.

    Attributes:
        name: Its name.
        run: The forward pass.
        forward, backward: What it does at least; no `backward`: it is not timed.
        learns: What gets a gradient.
        same_as: Methods with the same word here compute the same function: their outputs are compared.
        times: How often `run` would run for all heads.
        graph: Whether a CUDA graph of it is timed too.
    """

    name: str
    run: Callable[[], Tensor]
    forward: Work
    backward: Work | None = None
    learns: tuple[Tensor, ...] = ()
    same_as: str | None = None
    times: int = 1
    graph: bool = True


def make_problem(tokens: int, heads: int, dim: int, keep_ratio: float, device: torch.device, dtype: torch.dtype) -> Problem:
    """Random normal q, k, v, views of one qkv tensor as in a model."""
    generator = torch.Generator(device).manual_seed(tokens)
    qkv = torch.randn(1, tokens, 3, heads, dim, device=device, dtype=dtype, generator=generator)
    q, k, v = (x.detach().requires_grad_() for x in qkv.permute(2, 0, 3, 1, 4).unbind(0))
    proj = (torch.randn(dim, dim, device=device, generator=generator) * 0.1).requires_grad_()
    kept = kept_blocks(-(-tokens // BLOCK_K), keep_ratio, 0)
    with torch.no_grad():
        prepared = prepare_qkv(q, k, v, block_q=BLOCK_Q, block_k=BLOCK_K, triton=device.type == "cuda")
        if device.type == "cuda":
            from lite3r_plugin.ops.block_map.kernels import block_map_with_bits

            indices = block_map_with_bits(prepared.q_mean, prepared.k_mean, kept=kept, bits=False).kv_indices
        else:
            indices, _ = block_map(prepared.q_mean, prepared.k_mean, kept=kept)
    return Problem(q, k, v, proj, keep_ratio, indices)


def dense(p: Problem) -> Iterator[Contestant]:
    """SDPA by cuDNN and by flash; by whatever there is on a CPU."""
    heads, tokens, dim = p.sizes
    pairs, tensor = tokens**2 * heads, heads * tokens * dim * p.q.element_size()
    work = Work(4 * pairs * dim, pairs, 4 * tensor), Work(10 * pairs * dim, pairs, 8 * tensor)
    names = (
        {SDPBackend.CUDNN_ATTENTION: "SDPA cuDNN", SDPBackend.FLASH_ATTENTION: "SDPA flash"} if p.q.is_cuda else {SDPBackend.MATH: "SDPA"}
    )
    for backend, name in names.items():
        yield Contestant(name, functools.partial(_sdpa, p, backend), *work, learns=(p.q, p.k, p.v), same_as="dense")


def _sdpa(p: Problem, backend: SDPBackend) -> Tensor:
    with _backend(p, backend):
        return F.scaled_dot_product_attention(p.q, p.k, p.v)


def _backend(p: Problem, backend: SDPBackend) -> contextlib.AbstractContextManager[None]:
    return sdpa_kernel(backend) if p.q.is_cuda else contextlib.nullcontext()


def sparse_work(p: Problem, means: bool, linear: bool, whole: bool = True) -> tuple[Work, Work]:
    """Leading terms of a forward and of a backward pass for q, k and v; not `whole`: given the kept blocks, of the kernel alone."""
    heads, tokens, dim = p.sizes
    rows, kept = p.indices.shape[-2:]
    columns = -(-tokens // BLOCK_K)
    tensor = heads * tokens * dim * p.q.element_size()
    pairs = heads * tokens * (kept * BLOCK_K + (columns if means else 0))
    branch = 2 * heads * tokens * dim**2 if linear else 0
    features = 2 * heads * tokens * dim if linear else 0
    scores = 2 * heads * rows * columns * dim if whole else 0
    lists = 2 * heads * rows * (4 * kept + columns / 8) + (8 * heads * rows * columns if whole else 0)
    passes = (6 if whole else 0) + (2 if linear else 0) + 4  # pass before attention, linear state, attention
    return (
        Work(4 * pairs * dim + 2 * branch + scores, pairs + features, passes * tensor + lists),
        Work(10 * pairs * dim + 6 * branch, 2 * pairs + features, 22 * tensor + lists),
    )


def ours(p: Problem) -> Iterator[Contestant]:
    """The whole operator; its backward pass for q, k, v and Proj, and for Proj alone; and a site that decides by itself."""
    backend = "triton" if p.q.is_cuda else "naive"
    options: dict[str, Any] = dict(keep_ratio=p.keep_ratio, block_q=BLOCK_Q, block_k=BLOCK_K, backend=backend)
    full = dict(linear="marginal", proj=p.proj, block_means=True)  # the defaults

    def run(detach: bool = False, **more: Any) -> Tensor:
        q, k, v = (x.detach() for x in (p.q, p.k, p.v)) if detach else (p.q, p.k, p.v)
        return sparse_linear_attention(q, k, v, **options, **more)

    everything = (p.q, p.k, p.v, p.proj)
    heads, tokens, dim = p.sizes
    forward, backward = sparse_work(p, means=True, linear=True)
    tensor = heads * tokens * dim * p.q.element_size()
    only_proj = Work(2 * heads * tokens * dim**2, 0, 2 * tensor)
    yield Contestant("ours", functools.partial(run, **full), forward, backward, everything)
    yield Contestant("ours, Proj learns", functools.partial(run, detach=True, **full), forward, only_proj, (p.proj,), graph=False)
    over_all = functools.partial(run, detach=True, **{**full, "linear": "all"})
    yield Contestant("ours, branch over all tokens", over_all, forward)
    yield Contestant("ours, sparse alone", run, sparse_work(p, False, False)[0], same_as="sparse")
    site = _policy(p)
    work = forward if site.pays(p.q, NOTHING) else next(dense(p)).forward

    def decide() -> Tensor:
        with _backend(p, SDPBackend.CUDNN_ATTENTION):
            return site.attend(AttentionInputs(p.q, p.k, p.v), (), {})

    yield Contestant("ours, by policy (cuDNN)", decide, work)


def _policy(p: Problem) -> SparseLinearAttention:
    heads, _, dim = p.sizes
    site = AttentionSite("site", "global", dim, Routed(heads))
    state = ModelState("bench", Lite3RConfig(keep_ratio=p.keep_ratio, block_q=BLOCK_Q, block_k=BLOCK_K))
    return SparseLinearAttention(nn.Linear(1, 1, device=p.q.device, dtype=p.q.dtype), site, state, sparse=True)


def published_sla(p: Problem) -> Iterator[Contestant]:
    """The operator of the SLA paper (repository thu-ml/SLA): its own map, 64 x 64 blocks, linear branch over all tokens."""
    from sparse_linear_attention import SparseLinearAttention as Published

    module = Published(p.q.shape[-1], p.keep_ratio).to(p.q.device)
    nn.init.normal_(module.proj_l.weight, std=0.1)
    forward, backward = sparse_work(p, means=False, linear=True)
    yield Contestant("published SLA", lambda: module(p.q, p.k, p.v), forward, backward, (p.q, p.k, p.v))


def flex(p: Problem) -> Iterator[Contestant]:
    """FlexAttention, compiled, given our kept blocks as full blocks of a BlockMask: the forward kernel alone.

    Its backward pass in torch 2.11 has no kernel for blocks of 64 keys on an H100 unless it is autotuned, which takes minutes.
    """
    from torch.nn.attention.flex_attention import BlockMask

    heads, tokens, _ = p.sizes
    rows, kept = p.indices.shape[-2:]
    columns = -(-tokens // BLOCK_K)
    none = torch.zeros(1, heads, rows, columns, dtype=torch.int32, device=p.q.device)
    full = F.pad(p.indices, (0, columns - kept))
    counts = torch.full((1, heads, rows), kept, dtype=torch.int32, device=p.q.device)
    mask = BlockMask.from_kv_blocks(
        torch.zeros_like(counts), none, counts, full, BLOCK_SIZE=(BLOCK_Q, BLOCK_K), seq_lengths=(tokens, tokens)
    )
    tiles = dict(BLOCK_M=BLOCK_Q, BLOCK_N=BLOCK_K)
    work, _ = sparse_work(p, means=False, linear=False, whole=False)
    q, k, v = (x.detach() for x in (p.q, p.k, p.v))
    run = lambda: _compiled_flex()(q, k, v, block_mask=mask, kernel_options=tiles)  # noqa: E731
    yield Contestant("FlexAttention, blocks given", run, work, same_as="sparse")


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def saf3r(p: Problem) -> Iterator[Contestant]:
    """SAF3R's kernel (repository jndeng/SAF3R): a list of keys for each query, here those of our blocks; one head of H, times H."""
    from saf3r.triton.sparse_topk_attention import fused_sparse_topk_attention, fused_sparse_topk_attention_2

    heads, tokens, _ = p.sizes
    kept = p.indices.shape[-1] * BLOCK_K
    if 4 * tokens * kept > MAX_INDEX_BYTES:
        raise RuntimeError(f"its indices take {4e-9 * tokens * kept:.0f} GB")
    keys = (p.indices[0, 0, :, :, None] * BLOCK_K + torch.arange(BLOCK_K, device=p.q.device, dtype=torch.int32)).flatten(1)
    keys = keys.clamp(max=tokens - 1).repeat_interleave(BLOCK_Q, 0)[:tokens].contiguous()
    kernel = fused_sparse_topk_attention if kept <= 2048 else fused_sparse_topk_attention_2
    q, k, v = (x.detach()[0, 0].contiguous() for x in (p.q, p.k, p.v))
    work = sparse_work(p, means=False, linear=False, whole=False)[0]
    yield Contestant("SAF3R, keys given", lambda: kernel(q, k, v, keys), work, times=heads, graph=False)


METHODS: dict[str, Callable[[Problem], Iterator[Contestant]]] = dict(
    dense=dense, ours=ours, sla=published_sla, flex=flex, saf3r=saf3r
)  # fmt: skip
