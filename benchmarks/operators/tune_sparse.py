"""Times the sparse kernel with other tiles, warps, stages and registers than `launch_options` gives it, on one GPU.

    python benchmarks/operators/tune_sparse.py --tokens 43968,137400

Per line: milliseconds of the kernel without branches, and with block means and the linear branch (its state included), each
as a CUDA graph; the first one's TFLOP/s; and how far the output is from that of the first line. BF16, 16 heads of 64, keep 0.1.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from roofline import queued_ms
from torch import Tensor

from lite3r_plugin.ops.block_map import kept_blocks
from lite3r_plugin.ops.block_map.kernels import block_map_with_bits
from lite3r_plugin.ops.qk_norm_rope import prepare_qkv
from lite3r_plugin.ops.sla.kernels import forward
from lite3r_plugin.runtime.graphs import capture

HEADS, DIM, BLOCK_Q, BLOCK_K, KEEP = 16, 64, 128, 64, 0.1
VARIANTS: list[dict[str, int]] = [
    dict(TILE_Q=128, TILE_K=64, num_warps=8, num_stages=3, maxnreg=128),  # what launch_options gives
    dict(TILE_Q=128, TILE_K=64, num_warps=8, num_stages=4, maxnreg=128),
    dict(TILE_Q=128, TILE_K=64, num_warps=8, num_stages=3),
    dict(TILE_Q=128, TILE_K=64, num_warps=4, num_stages=3),
    dict(TILE_Q=128, TILE_K=64, num_warps=4, num_stages=3, maxnreg=168),
    dict(TILE_Q=64, TILE_K=64, num_warps=4, num_stages=3, maxnreg=168),
]


def graphed_ms(call: Callable[[], Any], device: torch.device) -> float:
    """Median milliseconds of a replay."""
    graph, _ = capture(call, device)
    return queued_ms(graph.replay, device)


@torch.no_grad()
def tune(tokens: int, device: torch.device) -> None:
    """Print one line for each variant."""
    torch.manual_seed(0)
    q, k, v = torch.randn(1, tokens, 3, HEADS, DIM, device=device, dtype=torch.bfloat16).permute(2, 0, 3, 1, 4).unbind(0)
    proj = torch.randn(DIM, DIM, device=device) * 0.1
    kept = kept_blocks(-(-tokens // BLOCK_K), KEEP, 0)
    p = prepare_qkv(q, k, v, block_q=BLOCK_Q, block_k=BLOCK_K, triton=True)
    indices, bits, _ = block_map_with_bits(p.q_mean, p.k_mean, kept=kept)
    whole: dict[str, Any] = dict(bits=bits, means=(p.k_mean, p.v_mean), linear="all", proj=proj)
    chosen, first = forward.launch_options, None
    flops = 4 * tokens * kept * BLOCK_K * DIM * HEADS

    def run(**more: Any) -> Tensor:
        return forward.sparse_linear_attention(p.q, p.k, p.v, indices, tokens=tokens, **more)

    for options in VARIANTS:
        forward.launch_options = lambda *_, options=options: dict(options)
        try:
            out = run(**whole).float()
            first = out if first is None else first
            alone, full = graphed_ms(run, device), graphed_ms(lambda: run(**whole), device)
            error = float((out - first).norm() / first.norm())
            print(f"{tokens} {options}: {alone:.3f} {full:.3f} ms, {flops / alone / 1e9:.0f} TFLOP/s, differs by {error:.1e}", flush=True)
        finally:
            forward.launch_options = chosen


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", default="43968,137400")
    for size in parser.parse_args().tokens.split(","):
        tune(int(size), torch.device("cuda", 0))
