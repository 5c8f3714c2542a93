"""Compiles the FP8 kernels ahead of time, without a GPU. Run as a script; `test_aot.py` does, in a fresh process.

Usage: python aot.py [--some] CAPABILITY [CAPABILITY ...]   (80, 89, 90, ...; some: every third variant)
"""

from __future__ import annotations

import inspect
import itertools
import sys
from collections.abc import Iterator
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lite3r_plugin.ops.fp8 import kernels as rows
from lite3r_plugin.ops.weight_only import kernels as weight_only

SHARED_MEMORY = {80: 163, 86: 99, 89: 99, 90: 227}  # KiB of a program
TYPES = {"Data": "*fp8e4nv", "W": "*u8", "Scale": "*fp32", "Infinities": "*i64", "eps": "fp32"}
NO_ROW = dict(
    HEAD_DIM=0, RESIDUAL=False, GAIN=False, NORM=False, WEIGHT=False, BIAS=False, ACTIVATION=0, COUNT=True, INTERPRETED=False
)  # fmt: skip


def variants(capability: int) -> Iterator[tuple[str, Any, str, dict[str, Any], dict[str, int]]]:
    """(label, kernel, dtype, constants, options) of everything that the package launches on such a GPU."""
    for dtype, torch_dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)):
        if capability >= 89:
            norm = dict(NORM=True, WEIGHT=True, BIAS=True)
            for width, constants in (
                (1024, {}),
                (1024, norm),
                (768, dict(norm, RESIDUAL=True, GAIN=True)),
                (1024, dict(HEAD_DIM=64)),
                (4096, dict(ACTIVATION=1)),
                (4096, dict(ACTIVATION=2)),
                (rows_max(), dict(ACTIVATION=3)),
            ):
                sizes = dict(C=width, BLOCK=triton.next_power_of_2(width))
                yield "rows", rows._rows_kernel, dtype, NO_ROW | sizes | constants, dict(num_warps=rows.warps(width))
        for count in (1, 64, 4096):
            constants: dict[str, Any] = weight_only.launch_options(count, torch_dtype) | dict(BIAS=True, PRECISION="tf32")
            options = {name: constants.pop(name) for name in ("num_warps", "num_stages")}
            yield "weight_only", weight_only._linear_kernel, dtype, constants, options


def rows_max() -> int:
    """The widest row that the kernels are given."""
    from lite3r_plugin.ops.fp8 import MAX_WIDTH

    return MAX_WIDTH


def main(capabilities: list[int], step: int = 1) -> None:
    """Compile variants for all capabilities; prints one line each."""
    for capability in capabilities:
        for label, kernel, dtype, constants, options in itertools.islice(variants(capability), None, None, step):
            types = {}
            for name in inspect.signature(kernel.fn).parameters:
                pointer = name[0].isupper() and name not in ("M", "N", "K")
                types[name] = "constexpr" if name in constants else TYPES.get(name, f"*{dtype}" if pointer else "i32")
            aligned = {(i,): [["tt.divisibility", 16]] for i, (n, t) in enumerate(types.items()) if t[0] == "*" or "stride" in n}
            source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=aligned)
            compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(options))
            ptx, shared = compiled.asm["ptx"], compiled.metadata.shared
            print(f"sm_{capability} {label} {dtype} {constants} {options} shared={shared} ptx={len(ptx)}")
            if shared > SHARED_MEMORY.get(capability, 227) * 1024:
                raise SystemExit(f"{label} {constants} needs {shared} bytes of shared memory, more than sm_{capability} has")
            if label == "rows" and "cvt.rn.satfinite.e4m3x2" not in ptx:
                raise SystemExit(f"{label} {constants} does not convert with saturation")


if __name__ == "__main__":
    main([int(a) for a in sys.argv[1:] if a != "--some"] or [90], 3 if "--some" in sys.argv else 1)
