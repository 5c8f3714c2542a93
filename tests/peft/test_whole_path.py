"""The whole path, on a trained model: apply, calibrate, train, merge, convert, save, load; and back to the dense model before it."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lite3r_plugin import apply_lite3r, calibrate, convert, describe, lite3r_disabled, load_lite3r, remove_lite3r, save_lite3r
from lite3r_plugin.apply.lookup import lite3r_modules
from lite3r_plugin.config import Fp8Filter
from lite3r_plugin.errors import CheckpointError
from lite3r_plugin.peft import add_lora, lora_disabled, merge_lora
from lite3r_plugin.scene.procedural import ProcScenes, TextureBank
from lite3r_plugin.testbed import Testbed


@pytest.fixture(scope="module")
def images() -> list[Tensor]:
    """Three rendered scenes of two views, ``[1, 2, 3, 64, 64]`` each."""
    return list(ProcScenes(TextureBank.procedural(24, 32, seed=5), seed=5)(3, 2, 64, 64)["rgb"][:, None])


def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    found = model(x)
    return [value for value in found.values() if isinstance(value, Tensor) and value.is_floating_point()]


def change(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest relative change of an output."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))


def trained(images: list[Tensor], fp8_filter: Fp8Filter) -> nn.Module:
    """A few steps of distillation by hand, of the linear branches and LoRA; the model trains for FP8."""
    model = apply_lite3r(
        Testbed.from_pretrained(), precision="fp8_qat", fp8_filter=fp8_filter, keep_ratio=0.15, dense_below=0, block_q=32, block_k=16
    )
    calibrate(model, images[:2], judged=1)
    model.requires_grad_(False)
    add_lora(model, rank=4)
    for site in lite3r_modules(model).values():
        if site.sparse:
            site.proj_lin.requires_grad_()
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(learning, 2e-4)
    losses = []
    for step in range(4):
        x = images[0]
        with torch.no_grad(), lite3r_disabled(model), lora_disabled(model):
            targets = outputs(model, x)
        loss = sum(((a - b).square().mean() / b.square().mean() for a, b in zip(outputs(model, x), targets, strict=True)), torch.zeros(()))
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in learning) or not step
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    return model


@pytest.mark.slow
@pytest.mark.parametrize("fp8_filter", ["inner", ("*",)])
def test_the_whole_path(images: list[Tensor], fp8_filter: Fp8Filter, tmp_path: Path) -> None:
    model, all_round = trained(images, fp8_filter), fp8_filter != "inner"
    dense = Testbed.from_pretrained()
    with torch.no_grad():
        expected = outputs(model, images[2])

        before = remove_lite3r(copy.deepcopy(model))
        assert list(before.state_dict()) == list(dense.state_dict())
        assert all(torch.equal(value, dense.state_dict()[name]) for name, value in before.state_dict().items())
        assert change(outputs(before, images[2]), outputs(dense, images[2])) == 0

        moved = outputs(model, images[2] * (1 + 1e-6))  # roundings to FP8 flip, as they do from one backend to another
        flips = max(1e-2, 3 * change(moved, expected))
        merge_lora(model)
        merged = change(outputs(model, images[2]), expected)
        assert merged == 0 if all_round else merged < flips
        with pytest.raises(CheckpointError, match="had LoRA merged into them, and this checkpoint would not hold them"):
            save_lite3r(model, tmp_path / "early")
        assert any("had LoRA merged into" in note for note in describe(model).notes)

        convert(model)
        converted = outputs(model, images[2])
        assert change(converted, outputs(dense, images[2])) > 0
        assert change(converted, expected) < flips

        save_lite3r(model, tmp_path / "converted", whole=not all_round)
        loaded = load_lite3r(dense, tmp_path / "converted")
        assert change(outputs(loaded, images[2]), converted) == 0


def test_merged_in_full_precision_it_is_saved_whole(images: list[Tensor], tmp_path: Path) -> None:
    model = apply_lite3r(Testbed.from_pretrained(), keep_ratio=0.15, dense_below=0, block_q=32, block_k=16)
    add_lora(model, rank=4)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    merge_lora(model)
    with pytest.raises(CheckpointError, match="whole=True"):
        save_lite3r(model, tmp_path)
    save_lite3r(model, tmp_path, whole=True)
    loaded = load_lite3r(Testbed.from_pretrained(), tmp_path)
    with torch.no_grad():
        assert change(outputs(loaded, images[0]), outputs(model, images[0])) == 0
