"""The kernel of the pass before attention against its definition: on a GPU as compiled, elsewhere interpreted at small sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from numerics import assert_as_accurate, relative_error
from pairs import grid
from sla_cases import BLOCKS, DEVICE, GPU, LENGTHS, norms, random_order, random_qkv

from lite3r_plugin.ops.qk_norm_rope import naive

kernels = pytest.importorskip("lite3r_plugin.ops.qk_norm_rope.kernels")

DIMS = (64, 80) if GPU else (32, 80)
NORMS = ("none", "layer", "rms", "layer without affine")


@pytest.mark.parametrize(("tokens", "dim", "rope", "norm"), grid(LENGTHS, DIMS, (False, True), NORMS))
def test_prepare_qkv(tokens: int, dim: int, rope: bool, norm: str) -> None:
    dtype = torch.float16
    q, k, v = random_qkv(tokens, dim, dtype)
    head_norm = norms(dim)[norm]
    options: dict[str, Any] = dict(q_norm=head_norm, k_norm=head_norm, order=random_order(tokens), **BLOCKS)
    if rope:
        options |= dict(positions=torch.randint(0, 40, (2, tokens, 2), device=DEVICE), rope_base=100.0)
    result = kernels.prepare_qkv(q, k, v, **options)
    same = naive.prepare_qkv(q, k, v, **options)
    reference = naive.prepare_qkv(q.double(), k.double(), v.double(), **options)
    for name, got, torch_result, exact in zip(result._fields, result, same, reference, strict=True):
        assert got.dtype == (torch.float32 if "mean" in name else dtype)
        assert_as_accurate(got if "mean" in name else got[:, :, :tokens], torch_result, exact)
    for padded in result[:3]:
        assert padded.shape[2] % BLOCKS["block_q"] == 0
        assert not padded[:, :, tokens:].any()
    q2, k2 = kernels.norm_rope(
        q, k, q_norm=head_norm, k_norm=head_norm, positions=options.get("positions"), rope_base=options.get("rope_base")
    )
    plain = naive.norm_rope(q.double(), norm=head_norm, positions=options.get("positions"), rope_base=options.get("rope_base"))
    assert_as_accurate(q2, plain.to(dtype), plain)
    assert k2.shape == k.shape


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("largest", [8, 1000, 10**6, 2**30])
def test_angles_of_any_position(dim: int, largest: int) -> None:
    """In FP32, with frequencies good to 2^-22, as exp2 is on a GPU: no angle is so large that another error comes to that."""
    q, k, _ = random_qkv(64, dim, torch.float32)
    where: dict[str, Any] = dict(positions=torch.randint(largest // 2, largest, (2, 64, 2), device=DEVICE), rope_base=100.0)
    found, _ = kernels.norm_rope(q, k, q_norm=None, k_norm=None, **where)
    reference = naive.norm_rope(q.double(), **where)
    error = relative_error(found, reference)
    assert error <= 2 * relative_error(naive.norm_rope(q, **where), reference) + largest * 2**-22
    torch.testing.assert_close(found.norm(), q.norm(), rtol=1e-4, atol=0)  # it turns, whatever it can know of the angle
