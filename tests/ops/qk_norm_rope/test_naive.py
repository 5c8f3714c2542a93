"""The definition of the pass before attention against formulas in FP64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lite3r_plugin.ops.qk_norm_rope import HeadNorm
from lite3r_plugin.ops.qk_norm_rope import naive as prepare

B, H, D = 2, 2, 8
BLOCK_Q, BLOCK_K = 32, 16
LENGTHS = (1, 16, 31, 97, 160)
EXACT: dict[str, Any] = dict(rtol=1e-11, atol=1e-11)


def qkv(tokens: int) -> list[Tensor]:
    return [2 * torch.randn(B, H, tokens, D, dtype=torch.float64) for _ in range(3)]


@pytest.mark.parametrize("tokens", LENGTHS)
def test_block_means_of_short_last_blocks(tokens: int) -> None:
    x = qkv(tokens)[0]
    expected = torch.stack([block.mean(-2) for block in x.split(BLOCK_K, -2)], -2)
    torch.testing.assert_close(prepare.block_means(x, BLOCK_K), expected, **EXACT)


def test_rotation_in_complex_numbers() -> None:
    """A half of size h turns element pairs (i, i + h/2) by position * base ** (-2i / h)."""
    x, positions = qkv(9)[0], torch.randint(0, 40, (B, 9, 2))
    h = D // 2
    speeds = torch.tensor([100 ** (-2 * i / h) for i in range(h // 2)], dtype=torch.float64)
    halves = []
    for axis, half in enumerate(x.chunk(2, -1)):
        rotated = torch.complex(half[..., : h // 2], half[..., h // 2 :]) * torch.exp(1j * positions[:, None, :, axis, None] * speeds)
        halves += [rotated.real, rotated.imag]
    torch.testing.assert_close(prepare.rotate(x, positions, 100.0), torch.cat(halves, -1), **EXACT)


def test_scores_of_rotated_tokens_depend_on_their_distance_alone() -> None:
    q, k, _ = qkv(1)
    shift = torch.tensor([5, -3])

    def score(at: list[int], to: list[int], moved: Tensor) -> Tensor:
        a, b = (torch.tensor(p).expand(B, 1, 2) + moved for p in (at, to))
        return (prepare.rotate(q, a, 100.0) * prepare.rotate(k, b, 100.0)).sum(-1)

    torch.testing.assert_close(score([1, 2], [7, 4], 0 * shift), score([1, 2], [7, 4], shift), **EXACT)


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_norms_order_and_means(kind: Any) -> None:
    q, k, v = qkv(97)
    order = torch.randperm(97).int()
    weight, bias = torch.randn(D, dtype=torch.float64), torch.randn(D, dtype=torch.float64)
    norm = HeadNorm(kind, weight, bias if kind == "layer" else None, 1e-5)
    result = prepare.prepare_qkv(q, k, v, order=order, q_norm=norm, block_q=BLOCK_Q, block_k=BLOCK_K)
    centred = q - q.mean(-1, keepdim=True) if kind == "layer" else q
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight + (bias if kind == "layer" else 0)
    torch.testing.assert_close(result.q, normed[:, :, order.long()], **EXACT)
    assert torch.equal(result.k, k[:, :, order.long()])
    torch.testing.assert_close(result.q_mean, prepare.block_means(result.q, BLOCK_Q), **EXACT)
    torch.testing.assert_close(result.v_mean, prepare.block_means(v[:, :, order.long()], BLOCK_K), **EXACT)
