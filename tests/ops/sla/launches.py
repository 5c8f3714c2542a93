"""Runs the whole operator, forward and backward, as on a GPU that is not there: kernels are compiled for it, not launched.

What `aot.py` cannot see, this does: the arguments of the real launches, how many there are, and what they need. Run as a
script; `test_aot.py` does, in a fresh process.

Usage: python launches.py CAPABILITY [--in-turn]     (80, 89, 90, ...; in turn: but for the first, only cases that fit into none smaller)
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from lite3r_plugin.ops import dispatch, sla
from lite3r_plugin.ops.dispatch import SHARED_KIB, shared_kib
from lite3r_plugin.ops.qk_norm_rope import HeadNorm
from lite3r_plugin.ops.sla.kernels import backward_options, operands

CAPABILITY = int(sys.argv[1])
LIMIT = SHARED_KIB.get(divmod(CAPABILITY, 10), 99)
SMALLEST = SHARED_KIB.get((8, 9), 99)
LAUNCHES: list[tuple[str, int, bool]] = []
CASES = [  # dtype, head dimension, linear branch, what learns, block of keys if not 64, whether keys are other tokens, is masked, choice
    (torch.bfloat16, 64, "all", "all"),
    (torch.bfloat16, 64, "all", "proj"),
    (torch.bfloat16, 64, "none", "nothing"),
    (torch.bfloat16, 128, "marginal", "all"),
    (torch.float16, 64, "marginal", "all"),
    (torch.bfloat16, 64, "all", "all", 128),
    (torch.float32, 64, "marginal", "all"),
    (torch.float32, 128, "marginal", "nothing"),
    (torch.float32, 128, "marginal", "nothing", 128),
    (torch.bfloat16, 64, "all", "all", 64, True),
    (torch.bfloat16, 64, "marginal", "nothing", 64, True),
    (torch.bfloat16, 64, "marginal", "all", 64, False, True),
    (torch.float32, 128, "marginal", "nothing", 64, False, True),
    (torch.bfloat16, 64, "all", "all", 64, False, True),
    (torch.bfloat16, 64, "none", "nothing", 64, False, False, "error"),
    (torch.bfloat16, 64, "none", "nothing", 64, False, True, "error"),
]


class Utils:
    """Loads nothing."""

    def load_binary(self, *_: Any) -> tuple[int, ...]:
        return 1, 1, 32, 0, 1024

    def get_device_properties(self, _: int) -> dict[str, int]:
        return dict(max_shared_mem=LIMIT * 1024, multiprocessor_count=132, max_num_regs=65536, warpSize=32)


class Launcher:
    """Takes the place of a launch."""

    def __init__(self, _: Any, metadata: Any) -> None:
        self.seen = metadata.name, metadata.shared, bool(metadata.tensordesc_meta)

    def __call__(self, *_: Any) -> None:
        LAUNCHES.append(self.seen)


class Driver:
    """A GPU on paper."""

    utils = Utils()
    launcher_cls = Launcher

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: Any = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", CAPABILITY, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def run(
    dtype: torch.dtype, dim: int, linear: str, learns: str, block_k: int = 64, cross: bool = False, masked: bool = False,
    block_choice: str = "mean", *, tokens: int,
) -> dict[str, Any]:  # fmt: skip
    """One forward (and backward) pass: kernels launched by each, most shared memory of one in KiB, those that load by TMA.

    If `cross`, with half as many keys as queries, and the log-sum-exp. If `masked`, frame-causal.
    """
    LAUNCHES.clear()
    qkv = torch.randn(1, tokens, 3, 2, dim, dtype=dtype)
    q, k, v = (x.detach().requires_grad_(learns == "all") for x in qkv.permute(2, 0, 3, 1, 4).unbind(0))
    weight, bias = (torch.ones(dim, dtype=dtype).requires_grad_(learns == "all") for _ in range(2))
    proj = torch.zeros(dim, dim, dtype=dtype, requires_grad=learns != "nothing") if linear != "none" else None
    norm = HeadNorm("layer", weight, bias, 1e-5)
    few = tokens // 2 if cross else tokens
    keys = sla.KeyTokens(torch.randperm(few).int(), 9, torch.randint(0, 37, (1, few, 2))) if cross else None
    mask = sla.SegmentMask(torch.arange(tokens) // 300, torch.arange(few) // 150) if masked else None
    with torch.set_grad_enabled(learns != "nothing"):
        out = sla.sparse_linear_attention(
            q, k[:, :, :few], v[:, :, :few], keep_ratio=0.1, order=torch.randperm(tokens).int(), pinned_tokens=70, q_norm=norm, k_norm=norm,
            positions=torch.randint(0, 37, (1, tokens, 2)), rope_base=100.0, linear=linear, proj=proj, block_means=True, block_k=block_k,
            keys=keys, mask=mask, return_lse=cross, block_choice=block_choice, backend="triton",
        )  # fmt: skip
        forward = len(LAUNCHES)
        if learns != "nothing":
            torch.autograd.backward(out, [torch.ones_like(x) for x in out] if cross else torch.ones_like(out))
    names = [name for name, *_ in LAUNCHES]
    shared = max(-(-shared // 1024) for _, shared, _ in LAUNCHES)
    return dict(forward=names[:forward], backward=names[forward:], shared=shared, tma=sorted({name for name, _, tma in LAUNCHES if tma}))


def main() -> None:
    """Run all cases that this GPU takes, each short and long; print them as JSON."""
    driver.set_active(Driver())  # type: ignore[arg-type]
    dispatch.why_not_triton = lambda *_, **__: None
    backward_options.has_tma = lambda _: CAPABILITY == 90
    operands.LARGE = 0
    report = []
    for i, (dtype, dim, linear, learns, *blocks) in enumerate(CASES):
        allowed = shared_kib(dtype, dim, learns != "nothing")
        if allowed > LIMIT or ("--in-turn" in sys.argv and i and allowed <= SMALLEST < LIMIT):
            continue
        name = f"{dtype} {dim} {linear}, {learns} learns" + (", other keys" if any(blocks[1:2]) else "")
        name += (", masked" if any(blocks[2:3]) else "") + (", by error" if blocks[3:] else "")
        case = dict(case=name, allowed=allowed, block_k=(*blocks, 64)[0], **run(dtype, dim, linear, learns, *blocks, tokens=1000))
        longer = run(dtype, dim, linear, learns, *blocks, tokens=9001)
        case["as_many_when_long"] = all(case[key] == longer[key] for key in ("forward", "backward"))
        report.append(case)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
