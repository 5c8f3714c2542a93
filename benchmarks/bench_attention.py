"""Times attention alone, whole operators on the same tensors in one process: dense SDPA, peers that are importable, ours.

    python benchmarks/bench_attention.py --views 2,4,8,16,32,64,100 --keep-ratio 0.1,0.2 --json FILE

"whole" is what a model pays: pooling, block map, sparse softmax, linear branch, projection; the parts are timed alone
as well. N = views x 1374 tokens (518 x 518 pixels, 5 special tokens), nothing pinned, random normal q, k, v.
Peer: the published SLA operator (repository thu-ml/SLA), if its package `sparse_linear_attention` is importable.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch.nn.attention import SDPBackend, sdpa_kernel

from lite3r_plugin.ops.block_map.kernels import block_map_with_bits
from lite3r_plugin.ops.block_map.naive import kept_blocks
from lite3r_plugin.ops.qk_norm_rope.kernels import prepare_qkv
from lite3r_plugin.ops.sla import kernels, sparse_linear_attention

TOKENS_PER_VIEW = 1374


def milliseconds(run: Any, budget: float = 0.15) -> float:
    """Median time of `run` on the GPU."""
    run()
    torch.cuda.synchronize()
    times: list[float] = []
    while (sum(times) < budget * 1e3 and len(times) < 50) or len(times) < 5:
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times)


def measure(views: int, ratios: list[float], heads: int, dim: int, block_q: int) -> list[dict[str, Any]]:
    """Times in ms for one sequence length."""
    tokens = views * TOKENS_PER_VIEW
    qkv = torch.randn(1, tokens, 3, heads, dim, device="cuda", dtype=torch.bfloat16)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    proj = torch.randn(dim, dim, device="cuda") * 0.02
    dense = {}
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        with sdpa_kernel(backend):
            dense[backend.name.split("_")[0].lower()] = milliseconds(lambda: F.scaled_dot_product_attention(q, k, v))
    records = []
    for ratio in ratios:
        record: dict[str, Any] = dict(views=views, tokens=tokens, keep_ratio=ratio, heads=heads, head_dim=dim, block_q=block_q, **dense)
        for label, options in {
            "sparse": {},
            "sparse+means": dict(block_means=True),
            "sparse+linear": dict(linear="all", proj=proj),
            "sparse+means+linear": dict(linear="all", proj=proj, block_means=True),
            "sparse+marginal": dict(linear="marginal", proj=proj),
        }.items():
            record[label] = milliseconds(
                lambda options=options, ratio=ratio: sparse_linear_attention(
                    q, k, v, keep_ratio=ratio, block_q=block_q, backend="triton", **options
                )
            )
        prepared = prepare_qkv(q, k, v, block_q=block_q, block_k=64)
        kept = kept_blocks(-(-tokens // 64), ratio, 0)
        indices, _ = block_map_with_bits(prepared.q_mean, prepared.k_mean, kept=kept)
        record["part prepare"] = milliseconds(lambda: prepare_qkv(q, k, v, block_q=block_q, block_k=64))
        record["part map"] = milliseconds(lambda: block_map_with_bits(prepared.q_mean, prepared.k_mean, kept=kept))  # noqa: B023
        record["part linear state"] = milliseconds(lambda: kernels.linear_state(prepared.k, prepared.v, tokens, "softmax"))  # noqa: B023
        record["part sparse"] = milliseconds(
            lambda: kernels.sparse_linear_attention(*prepared[:3], indices, tokens=tokens, block_q=block_q)  # noqa: B023
        )
        flops = 4 * tokens * kept * 64 * dim * heads
        record["sparse TFLOP/s"] = flops / record["part sparse"] / 1e9
        record["published SLA"] = _published_sla(q, k, v, ratio)
        records.append(record)
    return records


def _published_sla(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ratio: float) -> float | None:
    try:
        from sparse_linear_attention import SparseLinearAttention
    except ImportError:
        return None
    module = SparseLinearAttention(q.shape[-1], ratio).cuda()
    torch.nn.init.normal_(module.proj_l.weight, std=0.02)
    with torch.no_grad():
        return milliseconds(lambda: module(q, k, v))


def main() -> None:
    """Parse, measure, print, store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--views", default="2,4,8,16,32,64,100")
    parser.add_argument("--keep-ratio", default="0.1")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--block-q", type=int, default=128)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    records = []
    for views in map(int, args.views.split(",")):
        for record in measure(views, [float(r) for r in args.keep_ratio.split(",")], args.heads, args.head_dim, args.block_q):
            records.append(record)
            print("  ".join(f"{k}={v:.3f}" if isinstance(v, float) else f"{k}={v}" for k, v in record.items()), flush=True)
    if args.json:
        conditions = dict(
            gpu=torch.cuda.get_device_name(), torch=torch.__version__, triton=triton.__version__, cuda=torch.version.cuda,
            dtype="bfloat16", unit="ms, median",
        )  # fmt: skip
        args.json.write_text(json.dumps(dict(conditions=conditions, records=records), indent=1) + "\n")


if __name__ == "__main__":
    main()
