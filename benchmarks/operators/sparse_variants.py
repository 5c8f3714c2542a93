"""What was tried for the sparse kernel, side by side on one GPU: the softmax over critical blocks alone, BF16, 16 heads of 64, keep 0.1.

    python benchmarks/operators/sparse_variants.py --tokens 43968

A small kernel with switches: an online softmax or a fixed reference; one tile of keys after the other, or the scores of the
next tile multiplied under the exponentials of this one; keys and values by pointers or by TMA; queries and keys in BF16
or, cast without care, in FP8 (one factor for each block, as its scale would be). Per line: milliseconds, TFLOP/s, registers,
spills and how far the output is from the package's kernel. `tune_sparse.py` times that one, with its branches.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
import triton
import triton.language as tl
from roofline import queued_ms
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from lite3r_plugin.ops.block_map import kept_blocks
from lite3r_plugin.ops.block_map.kernels import block_map_with_bits
from lite3r_plugin.ops.qk_norm_rope import prepare_qkv
from lite3r_plugin.ops.sla.kernels.forward import sparse_linear_attention
from lite3r_plugin.ops.sla.kernels.linear import LOG2_E
from lite3r_plugin.ops.sla.kernels.softmax import accumulate

HEADS, DIM, BLOCK_Q, BLOCK_K, KEEP = 16, 64, 128, 64, 0.1
FOUR, EIGHT = dict(num_warps=4, maxnreg=168), dict(num_warps=8, maxnreg=128)
PLAIN = dict(FIXED=False, PIPELINED=False, TMA=False, FP8=False)
VARIANTS: list[tuple[dict[str, bool], dict[str, int]]] = [
    (PLAIN, FOUR),
    (PLAIN | dict(FIXED=True), FOUR),
    (PLAIN | dict(FIXED=True, TMA=True), FOUR),
    (PLAIN | dict(FIXED=True), EIGHT),
    (PLAIN | dict(FIXED=True, PIPELINED=True), EIGHT),  # what the package does
    (PLAIN | dict(FIXED=True, PIPELINED=True, TMA=True), EIGHT),
    (PLAIN | dict(FIXED=True, PIPELINED=True), dict(num_warps=4)),
    (PLAIN | dict(FIXED=True, PIPELINED=True, FP8=True), EIGHT),
]


@triton.jit
def _rows(X, Descriptor, row, D: tl.constexpr, ROWS: tl.constexpr, TMA: tl.constexpr):
    if TMA:
        return Descriptor.load([row, 0])
    return tl.load(X + (row + tl.arange(0, ROWS))[:, None].to(tl.int64) * D + tl.arange(0, D)[None, :])


@triton.jit(do_not_specialize=["N", "rows", "kept"])
def _kernel(
    Q, K, V, KTiles, VTiles, Scales, Indices, Out, N, padded, heads, rows, kept, scale,
    D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    FIXED: tl.constexpr, PIPELINED: tl.constexpr, TMA: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) // rows
    row = tl.program_id(0) % rows
    base = head * padded
    n = row * BLOCK_Q + tl.arange(0, BLOCK_Q)
    lanes = tl.arange(0, BLOCK_K)
    d = tl.arange(0, D)
    q = tl.load(Q + (base + n)[:, None].to(tl.int64) * D + d[None, :])
    chosen = Indices + (head.to(tl.int64) * rows + row) * kept
    acc = tl.zeros([BLOCK_Q, D], tl.float32)
    weight = tl.zeros([BLOCK_Q], tl.float32)
    block = tl.load(chosen + kept - 1)  # the last block may hold padding
    score = tl.dot(q, tl.trans(_rows(K, KTiles, base + block * BLOCK_K, D, BLOCK_K, TMA)))
    score = tl.where((block * BLOCK_K + lanes < N)[None, :], score, float("-inf"))
    factor = scale
    if FP8:
        factor = scale * tl.load(Scales + block)
    top = tl.max(score, 1) * factor if FIXED else tl.full([BLOCK_Q], float("-inf"), tl.float32)
    if PIPELINED:
        for i in range(0, kept - 1):
            following = tl.load(chosen + i)
            next_factor = scale
            if FP8:
                next_factor = scale * tl.load(Scales + following)
            next_score = tl.dot(q, tl.trans(_rows(K, KTiles, base + following * BLOCK_K, D, BLOCK_K, TMA)))
            v = _rows(V, VTiles, base + block * BLOCK_K, D, BLOCK_K, TMA)
            top, weight, acc = accumulate(score, lanes, v, factor, top, weight, acc, False, FIXED, "ieee")
            score = next_score
            block = following
            factor = next_factor
        top, weight, acc = accumulate(
            score, lanes, _rows(V, VTiles, base + block * BLOCK_K, D, BLOCK_K, TMA), factor, top, weight, acc, False, FIXED, "ieee"
        )
    else:
        top, weight, acc = accumulate(
            score, lanes, _rows(V, VTiles, base + block * BLOCK_K, D, BLOCK_K, TMA), factor, top, weight, acc, False, FIXED, "ieee"
        )
        for i in range(0, kept - 1):
            block = tl.load(chosen + i)
            if FP8:
                factor = scale * tl.load(Scales + block)
            score = tl.dot(q, tl.trans(_rows(K, KTiles, base + block * BLOCK_K, D, BLOCK_K, TMA)))
            v = _rows(V, VTiles, base + block * BLOCK_K, D, BLOCK_K, TMA)
            top, weight, acc = accumulate(score, lanes, v, factor, top, weight, acc, False, FIXED, "ieee")
    to = ((head // heads).to(tl.int64) * N + n) * heads + head % heads
    tl.store(Out + to[:, None] * D + d[None, :], (acc / weight[:, None]).to(Out.dtype.element_ty), mask=(n < N)[:, None])


@torch.no_grad()
def compare(tokens: int, device: torch.device) -> None:
    """Print one line for each variant."""
    torch.manual_seed(0)
    q, k, v = torch.randn(1, tokens, 3, HEADS, DIM, device=device, dtype=torch.bfloat16).permute(2, 0, 3, 1, 4).unbind(0)
    p = prepare_qkv(q, k, v, block_q=BLOCK_Q, block_k=BLOCK_K, triton=True)
    columns = -(-tokens // BLOCK_K)
    kept = kept_blocks(columns, KEEP, 0)
    indices = block_map_with_bits(p.q_mean, p.k_mean, kept=kept, bits=False).kv_indices
    expected = sparse_linear_attention(p.q, p.k, p.v, indices, tokens=tokens).float()
    rows, padded, flops = indices.shape[-2], p.q.shape[-2], 4 * tokens * kept * BLOCK_K * DIM * HEADS
    scales = torch.ones(columns, device=device)

    def tiles(x: Tensor, tma: bool) -> Any:
        return TensorDescriptor.from_tensor(x.reshape(-1, DIM), [BLOCK_K, DIM]) if tma else x

    for switches, options in VARIANTS:
        q, k = (x.to(torch.float8_e4m3fn) if switches["FP8"] else x for x in p[:2])
        out = torch.full((1, tokens, HEADS, DIM), float("nan"), device=device, dtype=torch.bfloat16)
        arguments = (
            q, k, p.v, tiles(k, switches["TMA"]), tiles(p.v, switches["TMA"]), scales, indices, out,
            tokens, padded, HEADS, rows, kept, DIM**-0.5 * LOG2_E.value,
        )  # fmt: skip

        def run(arguments: Any = arguments, more: Any = switches | options) -> Any:
            return _kernel[(rows * HEADS,)](*arguments, D=DIM, BLOCK_Q=BLOCK_Q, BLOCK_K=BLOCK_K, num_stages=3, **more)

        binary = run()
        ms = queued_ms(run, device)
        error = float((out.transpose(1, 2).float() - expected).norm() / expected.norm())
        names = " ".join(name for name, on in switches.items() if on) or "online"
        found = f"{ms:.3f} ms, {flops / ms / 1e9:.0f} TFLOP/s, {binary.n_regs} registers, {binary.n_spills} spills, differs by {error:.1e}"
        print(f"{tokens} {names} {options}: {found}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="43968")
    for size in parser.parse_args().tokens.split(","):
        compare(int(size), torch.device("cuda", 0))
