"""Models that can be benchmarked."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter.models import ModelEntry
from ..adapter.weights import RANDOM

DEPTH_KEYS = ("depth",)
POSE_KEYS = ("pose_enc", "extrinsics", "camera_poses", "pose")


@dataclass(frozen=True)
class BenchModel:
    """A model under test.

    Attributes:
        name: Its name.
        build: Makes it with random weights, on the default device.
        summary: One line about it, for the conditions.
        run: ``run(model, images [1, S, 3, H, W])``, its outputs.
    """

    name: str
    build: Callable[[], nn.Module]
    summary: str = ""
    run: Callable[[nn.Module, Tensor], Any] = lambda model, images: model(images)

    @classmethod
    def of(cls, entry: ModelEntry) -> BenchModel:
        """The model of an adapter's entry."""
        return cls(entry.name, functools.partial(_build_random, entry), entry.summary, entry.run)


def _build_random(entry: ModelEntry) -> nn.Module:
    return entry.build(RANDOM, torch.get_default_device())


def build(model: BenchModel, device: torch.device, seed: int) -> nn.Module:
    """A fresh `model` on `device`, in evaluation mode, always with the same random weights."""
    torch.manual_seed(seed)
    with torch.device(device):
        module = model.build()
    return module.to(device).eval().requires_grad_(False)


def make_images(views: int, resolution: int | tuple[int, int], device: torch.device, seed: int) -> Tensor:
    """Images ``[1, S, 3, H, W]`` in [0, 1]: coarse noise enlarged, so that they are smooth as photographs are.

    `resolution`: H and W, or one number for both.
    """
    size = (resolution, resolution) if isinstance(resolution, int) else resolution
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(views, 3, 16, 16, generator=generator, device="cpu")
    images = nn.functional.interpolate(coarse.to(device), size=size, mode="bicubic", align_corners=False)
    return images.clamp(0, 1)[None]


def tensors(outputs: Any) -> dict[str, Tensor]:
    """The floating-point tensors of a model's outputs by name; nested ones as ``"name.0"``."""
    if isinstance(outputs, Tensor):
        return {"output": outputs} if outputs.is_floating_point() else {}
    items = outputs.items() if hasattr(outputs, "items") else enumerate(outputs) if isinstance(outputs, (list, tuple)) else ()
    found = {}
    for key, value in items:
        for inner, tensor in tensors(value).items():
            found[str(key) if inner == "output" else f"{key}.{inner}"] = tensor
    return found


def reference(outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The outputs that models are compared by, in FP32 on the CPU: depth and poses, or the only output."""
    names = [name for name in outputs if name in DEPTH_KEYS + POSE_KEYS] or list(outputs)[:1]
    return {name: outputs[name].float().cpu() for name in names}


def output_differences(outputs: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Relative L2 error of each expected output (``NAME_rel_l2``), and for poses also the largest absolute error (``NAME_max_abs``).

    Args:
        outputs: `tensors` of the model that is judged.
        expected: What `reference` made of the outputs of the model that it is compared with.
    """
    errors = {}
    for name, there in expected.items():
        here = outputs[name].float().cpu()
        errors[f"{name}_rel_l2"] = float((here - there).norm() / there.norm().clamp_min(torch.finfo(torch.float32).tiny))
        if name in POSE_KEYS:
            errors[f"{name}_max_abs"] = float((here - there).abs().max())
    return errors
