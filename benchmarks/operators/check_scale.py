"""Checks the whole operator on a very long sequence: its memory, and sampled query blocks against plain torch in FP32.

    python benchmarks/operators/check_scale.py --views 1000 --keep-ratio 0.02

N = views x 1374 tokens (518 x 518 pixels, 5 special tokens) in the order and with the pinned tokens that a model has;
q, k and v are views of one qkv tensor, so that offsets pass 2**31. Exits with 1 when something is wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

import torch
from torch import Tensor

from lite3r_plugin import TokenLayout, Views
from lite3r_plugin.ops.block_map import block_map, kept_blocks
from lite3r_plugin.ops.qk_norm_rope import prepare_qkv
from lite3r_plugin.ops.qk_norm_rope.naive import block_means, block_sizes
from lite3r_plugin.ops.sla import sparse_linear_attention
from lite3r_plugin.ops.sla.naive import phi
from lite3r_plugin.tokens.layout import pinned_tokens, token_order

SPECIAL, GRID = 5, (37, 37)
BLOCK_Q, BLOCK_K = 128, 64
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-4}  # relative, of a block: rounding of p, of phi, of the output


def reference(q: Tensor, k: Tensor, v: Tensor, chosen: Tensor, proj: Tensor, linear: str) -> Tensor:
    """Output in FP32 of one query block ``[n, D]`` to the keys of one head ``[N, D]`` with critical key blocks `chosen`."""
    q, k, v = (x.float() for x in (q, k, v))
    tokens, scale = len(k), q.shape[-1] ** -0.5
    sizes = block_sizes(tokens, BLOCK_K, k.device)
    critical = torch.zeros(len(sizes), dtype=torch.bool, device=k.device).scatter(0, chosen.long(), True)
    near = critical.repeat_interleave(BLOCK_K)[:tokens]
    others = ~critical
    mean_k, mean_v = block_means(k, BLOCK_K)[others], block_means(v, BLOCK_K)[others]
    scores = torch.cat((q @ k[near].mT * scale, q @ mean_k.mT * scale + sizes[others].log()), -1)
    out = scores.softmax(-1) @ torch.cat((v[near], mean_v))
    inside = ~near if linear == "marginal" else torch.ones_like(near)
    if not inside.any():
        return out
    features = phi(k[inside], "softmax")
    branch = phi(q, "softmax") @ (features.mT @ v[inside]) / (phi(q, "softmax") @ features.sum(0))[:, None]
    return out + branch @ proj.float().mT


def wrong_choices(q_mean: Tensor, k_mean: Tensor, chosen: Tensor, pinned: int) -> int:
    """How many of the `chosen` key blocks are not among the best, beyond what FP32 can tell apart."""
    expected = block_map(q_mean[None, None, None], k_mean[None, None], kept=len(chosen), pinned=pinned)[0][0, 0, 0]
    scores = k_mean @ q_mean
    doubtful = scores[expected.long()].min() - 1e-4 * scores.abs().max()
    return int(((scores[chosen.long()] < doubtful) & (chosen >= pinned)).sum())


def check(
    views: int, heads: int, dim: int, keep_ratio: float, linear: str, dtype: torch.dtype, device: torch.device, samples: int
) -> dict[str, Any]:  # fmt: skip
    """Run the operator and compare `samples` query blocks. Returns what was seen."""
    layout = TokenLayout((Views(GRID, views, SPECIAL),))
    tokens, pinned = layout.num_tokens, pinned_tokens(layout, "reference").keys
    generator = torch.Generator(device).manual_seed(0)
    qkv = torch.randn(1, tokens, 3, heads, dim, device=device, dtype=dtype, generator=generator)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    proj = torch.randn(dim, dim, device=device, generator=generator) * 0.1
    order = token_order(layout, device)
    options: dict[str, Any] = dict(
        keep_ratio=keep_ratio,
        order=order,
        pinned_tokens=pinned,
        linear=linear,
        proj=proj,
        block_means=True,
        block_q=BLOCK_Q,
        block_k=BLOCK_K,
    )
    seen: dict[str, Any] = dict(
        views=views, tokens=tokens, heads=heads, head_dim=dim, keep_ratio=keep_ratio, linear=linear, dtype=str(dtype)
    )
    cuda = device.type == "cuda"
    if cuda:
        sparse_linear_attention(q[:, :, :9999], k[:, :, :9999], v[:, :, :9999], **options | dict(order=None))  # compiles the kernels
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    start = time.perf_counter()
    out = sparse_linear_attention(q, k, v, **options)
    if cuda:
        torch.cuda.synchronize()
        ordered = 3 * -(-tokens // BLOCK_Q) * BLOCK_Q * heads * dim * dtype.itemsize
        seen["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        seen["ordered_qkv_gib"] = ordered / 2**30
        used = torch.cuda.max_memory_allocated() - before - ordered - out.numel() * out.element_size()
        seen["workspace_gib"] = used / 2**30
    seen["seconds"] = time.perf_counter() - start
    prepared = prepare_qkv(q, k, v, order=order, block_q=BLOCK_Q, block_k=BLOCK_K, triton=cuda)
    pinned_keys, rows = -(-pinned // BLOCK_K), prepared.q_mean.shape[-2]
    maps = dict(kept=kept_blocks(prepared.k_mean.shape[-2], keep_ratio, pinned_keys), pinned=pinned_keys)
    if cuda:
        from lite3r_plugin.ops.block_map.kernels import block_map_with_bits

        indices = block_map_with_bits(prepared.q_mean, prepared.k_mean, **maps, bits=False).kv_indices
    else:
        indices, _ = block_map(prepared.q_mean, prepared.k_mean, **maps)
    seen["worst_error"], seen["wrong_choices"] = 0.0, 0
    first = -(-pinned // BLOCK_Q)
    for sample in range(samples):
        head = heads - 1 if sample == 0 else (7 * sample) % heads
        row = rows - 1 - sample * (rows - 1) // max(1, samples - 1)  # the last, which is short, to the first
        keys, values = (x[0, head, :tokens] for x in (prepared.k, prepared.v))
        block = slice(row * BLOCK_Q, min((row + 1) * BLOCK_Q, tokens))
        chosen = indices[0, head, row]
        if row < first:  # pinned: it attends to all keys
            chosen = torch.arange(prepared.k_mean.shape[-2], device=device)
        else:
            seen["wrong_choices"] += wrong_choices(prepared.q_mean[0, head, row], prepared.k_mean[0, head], chosen, pinned_keys)
        expected = reference(prepared.q[0, head, block], keys, values, chosen, proj, linear)
        found = out[0, head, order[block].long()].float()
        error = float((found - expected).norm() / expected.norm())
        seen["worst_error"] = max(seen["worst_error"], error) if error == error else error
    limit = TOLERANCE[dtype]
    seen["ok"] = seen["worst_error"] <= limit and seen["wrong_choices"] == 0 and seen.get("workspace_gib", 0) < 4e9 / 2**30
    return seen


def main(arguments: list[str] | None = None) -> int:
    """Parse, check, print. Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--views", type=int, default=1000)
    parser.add_argument("--keep-ratio", type=float, default=0.02)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--linear", choices=("all", "marginal"), default="marginal")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--samples", type=int, default=6)
    args = parser.parse_args(arguments)
    device = torch.device("cuda", 0) if args.device == "cuda" else torch.device(args.device)
    with torch.no_grad():
        seen = check(args.views, args.heads, args.head_dim, args.keep_ratio, args.linear, getattr(torch, args.dtype), device, args.samples)
    print(json.dumps(seen, indent=1))
    return 0 if seen["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
