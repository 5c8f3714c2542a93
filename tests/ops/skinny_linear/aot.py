"""Compiles the kernel for few rows ahead of time, without a GPU. Run as a script; `test_aot.py` does, in a fresh process.

Usage: python aot.py CAPABILITY [CAPABILITY ...]   (80, 90, ...)
"""

from __future__ import annotations

import inspect
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lite3r_plugin.ops.skinny_linear.kernels import GROUP, LAUNCH, _linear_kernel


def main(capabilities: list[int]) -> None:
    """Compile for all capabilities and dtypes of weights; prints a line each, with what is exchanged between threads, and how they load."""
    for capability in capabilities:
        for dtype in ("fp32", "bf16", "fp16"):
            constants = dict(K=2048, ROWS=GROUP, BLOCK_N=LAUNCH.block_n, BLOCK_K=LAUNCH.block_k, BIAS=True)
            types = {}
            for name in inspect.signature(_linear_kernel.fn).parameters:
                pointer = {"X": "*fp32", "W": f"*{dtype}", "Bias": "*fp32", "Out": "*fp32"}
                types[name] = "constexpr" if name in constants else pointer.get(name, "i32")
            aligned = {(i,): [["tt.divisibility", 16]] for i, (n, t) in enumerate(types.items()) if t[0] == "*" or "stride" in n}
            source = ASTSource(fn=_linear_kernel, signature=types, constexprs=constants, attrs=aligned)
            compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(num_warps=LAUNCH.warps))
            loop = compiled.asm["ttgir"].partition("scf.for")[2].partition("scf.yield")[0]
            exchanged, words = loop.count("convert_layout"), "ld.global.v2" if dtype != "fp32" else "ld.global.v4"
            print(f"sm_{capability} {dtype} exchanged={exchanged} vectors={words in compiled.asm['ptx']} loop={bool(loop)}")


if __name__ == "__main__":
    main([int(a) for a in sys.argv[1:]] or [90])
