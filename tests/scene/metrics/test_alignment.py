"""Sim(3) and SE(3) against evo, and against transforms that are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lite3r_plugin.errors import InputError
from lite3r_plugin.scene.metrics import fit_similarity

SEEDS = st.integers(0, 10_000)


@pytest.mark.parametrize("with_scale", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_equals_evo(seed: int, with_scale: bool) -> None:
    geometry = pytest.importorskip("evo.core.geometry")
    source, target = np.random.default_rng(seed).normal(size=(2, 20, 3))
    rotation, translation, scale = geometry.umeyama_alignment(source.T, target.T, with_scale)
    mine = fit_similarity(torch.tensor(source), torch.tensor(target), with_scale)
    np.testing.assert_allclose(mine.rotation.numpy(), rotation, atol=1e-12)
    np.testing.assert_allclose(mine.translation.numpy(), translation, atol=1e-12)
    assert mine.scale == pytest.approx(scale, abs=1e-12)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(seed=SEEDS, degrees=st.floats(0, 180), scale=st.floats(1e-3, 1e3))
def test_finds_a_known_transform(seed: int, degrees: float, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    points, axis, shift = torch.randn(10, 3, generator=generator), torch.randn(3, generator=generator), torch.randn(3, generator=generator)
    x, y, z = (axis / axis.norm()).double()
    rotation = torch.linalg.matrix_exp(torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]], dtype=torch.float64) * np.deg2rad(degrees))
    found = fit_similarity(points, scale * points.double() @ rotation.T + shift)
    assert found.scale == pytest.approx(scale, rel=1e-9)
    torch.testing.assert_close(found.rotation, rotation, atol=1e-9, rtol=0)
    torch.testing.assert_close(found.translation, shift.double(), atol=1e-9 * scale + 1e-9, rtol=0)


def test_a_mirror_image_is_not_reached() -> None:
    points = torch.randn(20, 3)
    found = fit_similarity(points, points * torch.tensor([1.0, 1.0, -1.0]))
    assert torch.linalg.det(found.rotation) == pytest.approx(1)


def test_no_other_transform_is_closer() -> None:
    source, target = torch.randn(2, 30, 3, dtype=torch.float64)
    best = fit_similarity(source, target)
    error = (best(source) - target).square().sum()
    for _ in range(50):
        step = torch.randn(3, 3, dtype=torch.float64) * 1e-2
        rotation = torch.linalg.matrix_exp(step - step.T) @ best.rotation
        other = (best.scale + 1e-2 * torch.randn(())) * source @ rotation.T + best.translation + 1e-2 * torch.randn(3)
        assert error <= (other - target).square().sum()


def test_points_on_a_line_and_at_one_place() -> None:
    line = torch.linspace(0, 1, 5)[:, None] * torch.tensor([1.0, 2.0, 3.0])
    turned = 2 * line[:, [1, 2, 0]] + 1
    torch.testing.assert_close(fit_similarity(line, turned)(line), turned.double(), atol=1e-6, rtol=0)
    torch.testing.assert_close(fit_similarity(torch.ones(5, 3), turned)(torch.ones(1, 3))[0], turned.mean(0).double())


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        (torch.ones(2, 3), torch.ones(3, 3), "two sets of points"),
        (torch.ones(0, 3), torch.ones(0, 3), "N > 0"),
        (torch.ones(4, 2), torch.ones(4, 2), r"\[N, 3\]"),
        (torch.full((4, 3), torch.nan), torch.ones(4, 3), "finite"),
    ],
)
def test_bad_input(source: torch.Tensor, target: torch.Tensor, message: str) -> None:
    with pytest.raises(InputError, match=message):
        fit_similarity(source, target)
