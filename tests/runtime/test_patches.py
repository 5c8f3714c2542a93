"""The convolution of patches as a matrix product."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from lite3r_plugin.adapter import ExactRewrite
from lite3r_plugin.errors import AdapterError
from lite3r_plugin.runtime.patches import PatchProduct, patch_products

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def rewritten(convolution: nn.Conv2d) -> nn.Conv2d:
    """The convolution with a product in its place."""
    vars(convolution)["forward"] = PatchProduct(convolution)
    return convolution


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [14, (2, 3)])
@pytest.mark.parametrize("bias", [True, False])
def test_it_gives_what_the_convolution_does(window: Any, bias: bool, dtype: torch.dtype, device: str) -> None:
    convolution = nn.Conv2d(3, 16, window, window, bias=bias).to(device, dtype)
    product = rewritten(nn.Conv2d(3, 16, window, window, bias=bias).to(device, dtype))
    product.load_state_dict(convolution.state_dict())
    height, width = convolution.kernel_size
    for rows, columns, rest in ((1, 1, 0), (3, 2, 0), (2, 5, 1)):
        for layout in (torch.contiguous_format, torch.channels_last):
            images = torch.randn(2, 3, rows * height + rest, columns * width + rest, device=device, dtype=dtype).to(memory_format=layout)
            found, expected = product(images), convolution(images)
            assert found.shape == expected.shape == (2, 16, rows, columns)
            assert found.dtype == dtype
            tolerance = 1e-5 if dtype == torch.float32 else 0.02
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
            if device == "cpu" or dtype != torch.float32:  # there it is the convolution's
                found.flatten(2).transpose(1, 2).view(2, -1)  # tokens, side by side
    with torch.autocast(device, torch.bfloat16):
        assert product(images).dtype == convolution(images).dtype == torch.bfloat16


def test_gradients_are_those_of_the_convolution() -> None:
    convolution, product = nn.Conv2d(3, 8, 4, 4), rewritten(nn.Conv2d(3, 8, 4, 4))
    product.load_state_dict(convolution.state_dict())
    images = torch.randn(2, 3, 9, 8)
    grads = [torch.autograd.grad(m(images).square().sum(), list(m.parameters())) for m in (convolution, product)]
    for expected, found in zip(*grads, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_tensors_without_data_take_the_same_way() -> None:
    """By them memory is planned."""
    product = rewritten(nn.Conv2d(3, 8, 4, 4))
    with FakeTensorMode(allow_non_fake_inputs=True):
        found = product(torch.empty(2, 3, 8, 12))
    assert found.shape == (2, 8, 2, 3)
    assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", [(3, 3, 8), (1, 2, 8, 8), (1, 3, 3, 8), (0, 3, 8, 8)])
def test_what_is_no_batch_of_images_is_left_to_the_convolution(shape: tuple[int, ...]) -> None:
    convolution, product = nn.Conv2d(3, 8, 4, 4), rewritten(nn.Conv2d(3, 8, 4, 4))
    product.load_state_dict(convolution.state_dict())
    images = torch.randn(shape)
    outcomes = []
    for module in (convolution, product):
        try:
            outcomes.append((module(images), None))
        except RuntimeError as error:
            outcomes.append((None, str(error)))
    (expected, complaint), found = outcomes[0], outcomes[1]
    assert found[1] == complaint
    if complaint is None:
        torch.testing.assert_close(found[0], expected)


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(3, 8, 4, 2), nn.Conv2d(3, 8, 4, 4, padding=1), nn.Conv2d(3, 8, 2, 4), nn.Conv2d(3, 9, 4, 4, groups=3),
        nn.Conv2d(3, 8, 2, 2, dilation=2), nn.Conv2d(3, 8, 1), nn.ConvTranspose2d(3, 8, 4, 4), type("Own", (nn.Conv2d,), {})(3, 8, 4, 4),
    ],
    ids=str,
)  # fmt: skip
def test_other_convolutions_are_refused(module: nn.Module) -> None:
    assert patch_products("x", nn.Sequential(module)) == []
    with pytest.raises(AdapterError):
        PatchProduct(module)


class Embedding(nn.Module):
    """Patches as tokens, by a view that a fork has."""

    def __init__(self, by: str) -> None:
        super().__init__()
        self.by, self.proj = by, nn.Conv2d(3, 8, 4, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.proj(images)
        if self.by == "rows":
            return x.view(len(x), -1)
        if self.by == "memory":
            return torch.as_strided(x, (4,), (1,))
        return x.flatten(2).transpose(1, 2)


@pytest.mark.parametrize(("by", "reason"), [("tokens", None), ("rows", "takes no channels side by side"), ("memory", "differs")])
def test_the_code_around_it_is_tried_too(by: str, reason: str | None) -> None:
    (rewrite,) = patch_products("embedding", Embedding(by))
    assert rewrite.trial is not None
    if reason is None:
        rewrite.trial(nn.Conv2d(3, 8, 4, 4))
    else:
        with pytest.raises(AdapterError, match=reason):
            rewrite.trial(nn.Conv2d(3, 8, 4, 4))


def test_it_is_put_in_by_name_and_described() -> None:
    embedding = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Identity())
    (found,) = patch_products("encoder", embedding)
    assert isinstance(found, ExactRewrite)
    assert found.fqn == "encoder.0"
    assert found.keeps_dtype
    assert not found.kernels
    (alone,) = patch_products("encoder", embedding[0])
    assert alone.fqn == "encoder"
