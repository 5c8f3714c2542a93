"""The pieces of exact rewrites, each against what it takes the place of."""

from __future__ import annotations

import hosts
import pytest
import torch
from held_weights import lend
from torch import Tensor, nn

from lite3r_plugin.errors import InputError, WeightsError
from lite3r_plugin.ops.qk_norm_rope.naive import rotate
from lite3r_plugin.runtime.exact import MAX_POSITIONS, TableRope, cache_position_embedding, finish_in_fp32, token_positions, use_table_rope

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: dict(rtol=1e-4, atol=1e-4), torch.bfloat16: dict(rtol=2e-2, atol=4e-2)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tables_rotate_as_the_definition(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 20, 16).to(dtype)
    positions = torch.randint(MAX_POSITIONS, (2, 20, 2))
    rotated = TableRope(16, 100.0, x)(x, positions)
    assert rotated.dtype == dtype
    torch.testing.assert_close(rotated, rotate(x.double(), positions, 100.0).to(dtype), **TOLERANCE[dtype])


def test_every_user_of_a_rotary_embedding_gets_the_tables() -> None:
    model = hosts.VGGT(encoder=False).eval().aggregator
    images = torch.rand(1, 2, 3, 42, 56)
    expected = model(images)
    use_table_rope(model)
    tables = {id(module.rope) for module in model.modules() if isinstance(getattr(module, "rope", None), nn.Module)}
    assert tables == {id(model.rope)}
    assert isinstance(model.rope, TableRope)
    torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tables_of_the_meta_device_are_computed_once_they_are_somewhere(dtype: torch.dtype) -> None:
    table = TableRope(16, 100.0, torch.empty(0, device="meta", dtype=dtype)).to_empty(device="cpu")
    for values in table.buffers():
        values.fill_(7)
    table.reset_parameters()
    expected = TableRope(16, 100.0, torch.empty(0, dtype=dtype))
    assert all(torch.equal(*pair) for pair in zip(table.buffers(), expected.buffers(), strict=True))


def test_tables_need_to_know_where_they_are_used() -> None:
    with pytest.raises(WeightsError, match="exact rewrites first, offload then"):
        use_table_rope(lend(hosts.VGGT(encoder=False)).aggregator)


def test_positions_count_patches_from_one() -> None:
    positions = token_positions(2, 2, 3, 1, CPU)
    assert positions.shape == (2, 7, 2)
    assert positions[1].tolist() == [[0, 0], [1, 1], [1, 2], [1, 3], [2, 1], [2, 2], [2, 3]]
    assert torch.equal(positions, hosts.grid_positions(2, 2, 3, 1))
    with pytest.raises(InputError, match=f"images of 2 x {MAX_POSITIONS} patches are too large"):
        token_positions(1, 2, MAX_POSITIONS, 0, CPU)


class Head(nn.Module):
    """Adds an FP32 embedding of the size alone, as DPT heads do, and counts how often it is computed."""

    computed = 0

    def embed(self, x: Tensor, width: int, height: int, ratio: float = 0.1) -> Tensor:
        type(self).computed += 1
        return x + ratio * torch.linspace(0, width / height, x.shape[-1], dtype=torch.float64).float()

    def forward(self, x: Tensor) -> Tensor:
        return self.embed(x, 8, 6, 0.5)


def test_a_position_embedding_is_computed_once_for_each_size_and_dtype() -> None:
    head, other = Head(), Head()
    x = torch.randn(2, 4, 3, 5)
    expected = head(x)
    cache_position_embedding(head, "embed")
    Head.computed = 0
    for images in (x, x[:1], -x):
        torch.testing.assert_close(head(images), images + (expected - x)[:1])
    assert Head.computed == 1
    assert head(x.bfloat16()).dtype == torch.bfloat16
    assert Head.computed == 2
    assert other(x.bfloat16()).dtype == torch.float32  # another instance is as it was
    assert torch.equal(other(x), expected)


def test_the_last_activation_gets_fp32() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sigmoid()).bfloat16()
    finish_in_fp32(model[0])
    assert model(torch.rand(2, 4).bfloat16()).dtype == torch.float32
