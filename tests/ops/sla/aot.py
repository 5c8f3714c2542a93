"""Compiles every Triton kernel ahead of time, without a GPU. Run as a script; `test_aot.py` does, in a fresh process.

Usage: python aot.py [--some] CAPABILITY [CAPABILITY ...]   (80, 89, 90, ...; some: every third variant)
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lite3r_plugin.ops.block_map import kernels as block_map
from lite3r_plugin.ops.qk_norm_rope import kernels as qk_norm_rope
from lite3r_plugin.ops.sla.kernels import forward, linear, marginal, softmax

INDEX_POINTERS = {
    "Order": "*i32", "Indices": "*i32", "AllIndices": "*i32", "Bits": "*i32", "Skipped": "*i32", "Failed": "*i32", "Positions": "*i64",
}  # fmt: skip
INDEX_POINTERS |= {"Kinds": "*i8", "Counts": "*i32", "LeftOut": "*i32", "Used": "*i32"}
FP32_POINTERS = {
    "QMean", "KMean", "VMean", "Scores", "State", "Total", "Totals", "OutTotals", "Mu", "Lse", "QW", "QB", "KW", "KB", "Proj",
}  # fmt: skip
FP32_POINTERS |= {"Mean", "Variance"}
FP32_SCALARS = {"log2_base", "q_eps", "k_eps", "scale", "scale_log2"}


def signature(kernel: Any, dtype: str, constants: dict[str, Any], label: str) -> dict[str, str]:
    """Argument types of a launch whose tensors have `dtype`."""
    own = set()
    if label == "sparse_linear":
        own = {"State"} if constants["LINEAR"] == linear.LINEAR["marginal"] else set()
    elif label == "block_states":
        own = {"State"}
    types = {}
    for name in inspect.signature(kernel.fn).parameters:
        if name in constants or name in ("Mask", "Pairs", "Scales"):
            types[name] = "constexpr"
        elif name in INDEX_POINTERS:
            types[name] = INDEX_POINTERS[name]
        elif name in FP32_POINTERS - own:
            types[name] = "*fp32"
        elif name[0].isupper() and name not in ("M", "N", "H"):
            types[name] = f"*{dtype}"
        else:
            types[name] = "fp32" if name in FP32_SCALARS else "i32"
    return types


def variants() -> list[tuple[str, Any, str, dict[str, Any], dict[str, int]]]:
    """(label, kernel, dtype, constants, options) of everything that the package launches."""
    found = []
    for dim in (64, 80, 128):
        half, padded = triton.next_power_of_2(dim // 2), triton.next_power_of_2(dim)
        for dtype in ("bf16", "fp32") if dim <= 64 else ("bf16",):
            precision, torch_dtype = ("tf32x3", torch.float32) if dtype == "fp32" else ("ieee", torch.bfloat16)
            for rope, norm, pool in ((True, 1, True), (True, 2, False)):
                constants = dict(
                    D=dim, HALF=half, ROWS=128 if pool else 64, BLOCK_K=64, Q_NORM=norm, K_NORM=norm, ROPE=rope,
                    ORDERED=pool, POOL=pool, PART=0 if norm == 1 else 1, HEADS=2,
                )  # fmt: skip
                found.append(("prepare", qk_norm_rope._prepare_kernel, dtype, constants, dict(num_warps=8)))
            forms = (("all", True, True, False), ("marginal", False, False, False), ("all", True, True, True))
            for branch, is_softmax, means, save in forms:
                constants = dict(
                    D=dim, DP=padded, BLOCK_Q=128, BLOCK_K=64, LINEAR=linear.LINEAR[branch], SOFTMAX=is_softmax,
                    CENTRED=not save and not means, MEANS=means, ORDERED=True, SAVE_LSE=save, SAVE_LINEAR=save, FIXED=True, RETRY=False,
                    PRECISION=precision,
                )  # fmt: skip
                constants |= dict(Used=None) if save or constants["CENTRED"] else {}
                options = forward.launch_options(128, 64, dim, torch_dtype)
                constants |= {name: options.pop(name) for name in ("TILE_Q", "TILE_K")}
                found.append(("sparse_linear", forward._sparse_linear_kernel, dtype, constants, options))
            constants = dict(D=dim, DP=padded, ROWS=softmax.MEAN_ROWS)
            found.append(("padded_means", softmax._padded_means_kernel, dtype, constants, dict(num_warps=4)))
            for label, tiles, centred, folded in (
                ("linear_state", 2, False, False), ("block_states", 1, True, False), ("block_states", 1, False, True),
            ):  # fmt: skip
                options = linear.state_options(torch_dtype, tiles)
                constants = dict(D=dim, DP=padded, TILE=64, SOFTMAX=True, CENTRED=centred, FOLDED=folded, PRECISION=precision)
                constants |= dict(Used=None) if centred else {}
                found.append((label, linear._linear_state_kernel, dtype, constants, options))
            found.append(("is_used", linear._is_used_kernel, dtype, dict(D=dim, DP=padded), dict(num_warps=4)))
            for transposed in (False, True):
                options = marginal.sums_options(torch_dtype)
                constants = dict(D=dim, TRANSPOSED=transposed, PRECISION=precision) | (dict(Used=None) if transposed else {})
                constants |= {name: options.pop(name) for name in ("TILE_OUT", "TILE_IN", "TILE")}
                found.append(("marginal_sums", marginal._marginal_sums_kernel, dtype, constants, options))
    for width in (32, 1024, 32768):
        for spread in ({}, dict(Variances=None, Sizes=None)):  # by error and by means
            constants = dict(WIDTH=width) | spread
            found.append(("select_masked", block_map._select_masked_kernel, "fp32", constants, block_map.launch_options(width)))
            for skipped in (False, True):
                constants = dict(WIDTH=width, BITS=True, SKIPPED=skipped) | spread
                found.append(("select", block_map._select_kernel, "fp32", constants, block_map.launch_options(width)))
    for dim, block in ((64, 32), (80, 64), (128, 128)):
        constants = dict(D=dim, DP=triton.next_power_of_2(dim), BLOCK=block)
        found.append(("variance", block_map._variance_kernel, "bf16", constants, dict(num_warps=4)))
    return found


def main(capabilities: list[int], step: int = 1) -> None:
    """Compile variants for all capabilities; prints one line each."""
    for label, kernel, dtype, constants, options in variants()[::step]:
        types = signature(kernel, dtype, constants, label)
        aligned = {(i,): [["tt.divisibility", 16]] for i, t in enumerate(types.values()) if t.startswith("*")}
        nothing = {name: None for name in ("Mask", "Pairs", "Scales") if name in types}
        source = ASTSource(fn=kernel, signature=types, constexprs=constants | nothing, attrs=aligned)
        for capability in capabilities:
            compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(options))
            shared = compiled.metadata.shared
            limit = {80: 163, 86: 99, 89: 99, 90: 227}.get(capability, 227) * 1024
            print(f"sm_{capability} {label} {dtype} {constants} shared={shared} ptx={len(compiled.asm['ptx'])}")
            if shared > limit:
                raise SystemExit(f"{label} {constants} needs {shared} bytes of shared memory; sm_{capability} has {limit}")


if __name__ == "__main__":
    main([int(a) for a in sys.argv[1:] if a != "--some"] or [90], 3 if "--some" in sys.argv else 1)
