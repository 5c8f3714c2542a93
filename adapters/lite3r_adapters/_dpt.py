"""The fusion blocks of the DPT heads of VGGT and Depth Anything 3."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lite3r_plugin.adapter import ExactRewrite, RewrittenModule, Trial
from lite3r_plugin.errors import AdapterError
from lite3r_plugin.runtime.maps import random_head
from lite3r_plugin.wrapper import around_and_itself, calls_are_seen, must_be_called, tuner_around

INTERPOLATE = "custom_interpolate"
"""The function beside the class of a block that it makes maps larger with."""


class MixedFirst(RewrittenModule):
    """A fusion block whose 1 x 1 convolution comes before the up-sampling, and not after it.

    Of the two one mixes channels and the other pixels, with weights that sum to one, so that they may change places; the convolution then
    has a quarter of the pixels. The host's own code runs where somebody watches the convolution, adapts it, or has put another module in
    its place.

    Raises:
        AdapterError: the convolution is no such one, or the function for the up-sampling cannot be found.
    """

    def __init__(self, host: nn.Module) -> None:
        super().__init__(host)
        if not _mixes_channels(host.out_conv):
            raise AdapterError("its last module is no 1 x 1 convolution")
        if self._interpolate is None:
            raise AdapterError(f"there is no {INTERPOLATE} where its class is")

    @property
    def _interpolate(self) -> Any:
        """What is there now."""
        return getattr(type(self.host).forward, "__globals__", {}).get(INTERPOLATE)

    def rewritten(self, *maps: Tensor, size: Any = None) -> Tensor:
        """As the host's: one map ``[N, C, h, w]``, or two to be joined, to ``[N, C', *size]``."""
        block: Any = self
        convolution: Any = block.out_conv
        seen = calls_are_seen() or must_be_called(convolution) or convolution._backward_hooks or convolution._backward_pre_hooks
        if len(maps) != 1 + bool(block.has_residual) or seen or not _mixes_channels(convolution):
            return self.run_host(*maps) if size is None else self.run_host(*maps, size=size)
        x = maps[0]
        if block.has_residual:
            x = block.skip_add.add(x, block.resConfUnit1(maps[1]))
        x = convolution(block.resConfUnit2(x))
        size = block.size if size is None else size
        grown = {"scale_factor": 2} if size is None else {"size": size}
        return self._interpolate(x, **grown, mode="bilinear", align_corners=block.align_corners)


def _mixes_channels(module: Any) -> bool:
    """Whether `module` is a convolution that looks at one pixel at a time, and nothing more."""
    return type(module) is nn.Conv2d and (module.kernel_size, module.stride, module.padding) == ((1, 1), (1, 1), (0, 0))


def fusion_blocks(fqn: str, head: nn.Module) -> list[ExactRewrite]:
    """`MixedFirst` of the fusion blocks inside of the DPT head `fqn`. Copies that adapters keep (PEFT) are left alone."""
    words = "1 x 1 convolutions before the up-sampling, where there are fewer pixels"
    modules = dict(head.named_modules())
    return [
        ExactRewrite(f"{fqn}.{name}" if fqn else name, words, MixedFirst, _trial)
        for name, inside in modules.items()
        if name
        and all(hasattr(inside, part) for part in ("out_conv", "resConfUnit2", "skip_add", "has_residual", "size"))
        and tuner_around(modules, around_and_itself(name)) is None
    ]


def _trial(block: nn.Module) -> Trial:
    """Calls with the size of the result, as a head makes them, and without."""
    generator, own = torch.Generator("cpu").manual_seed(0), random_head(block)
    channels, count = own.out_conv.in_channels, 1 + bool(own.has_residual)
    sizes = [(1, channels, 3, 4), (2, channels, 2, 3)]
    inputs = [tuple(torch.randn(*size, generator=generator, device="cpu") for _ in range(count)) for size in sizes]
    return Trial(own, [*inputs, inputs[0]], [{}, {}, {"size": (5, 7)}])
