"""The fusion blocks of the DPT heads of VGGT and Depth Anything 3."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lite3r_plugin.adapter import ExactRewrite, RewrittenModule, Trial
from lite3r_plugin.errors import AdapterError
from lite3r_plugin.runtime.maps import random_head
from lite3r_plugin.wrapper import calls_are_seen, has_forward_hooks

INTERPOLATE = "custom_interpolate"
"""The function beside the class of a block that it makes maps larger with."""


class MixedFirst(RewrittenModule):
    """A fusion block whose 1 x 1 convolution comes before the up-sampling, and not after it.

    Of the two one mixes channels and the other pixels, with weights that sum to one, so that they may change places; the convolution then
    has a quarter of the pixels. The host's own code runs where somebody watches the convolution.

    Raises:
        AdapterError: the convolution is no such one, or the function for the up-sampling cannot be found.
    """

    def __init__(self, host: nn.Module) -> None:
        super().__init__(host)
        convolution: Any = host.out_conv
        if not isinstance(convolution, nn.Conv2d) or (convolution.kernel_size, convolution.stride) != ((1, 1), (1, 1)):
            raise AdapterError("its last module is no 1 x 1 convolution")
        self._interpolate: Any = getattr(type(host).forward, "__globals__", {}).get(INTERPOLATE)
        if self._interpolate is None:
            raise AdapterError(f"there is no {INTERPOLATE} where its class is")

    def rewritten(self, *maps: Tensor, size: Any = None) -> Tensor:
        """As the host's: one map ``[N, C, h, w]``, or two to be joined, to ``[N, C', *size]``."""
        block: Any = self
        if len(maps) != 1 + bool(block.has_residual) or calls_are_seen() or has_forward_hooks(block.out_conv):
            return self.run_host(*maps, size=size)
        x = maps[0]
        if block.has_residual:
            x = block.skip_add.add(x, block.resConfUnit1(maps[1]))
        x = block.out_conv(block.resConfUnit2(x))
        size = block.size if size is None else size
        grown = {"scale_factor": 2} if size is None else {"size": size}
        return self._interpolate(x, **grown, mode="bilinear", align_corners=block.align_corners)


def fusion_blocks(fqn: str, head: nn.Module) -> list[ExactRewrite]:
    """`MixedFirst` of the fusion blocks inside of the DPT head `fqn`."""
    words = "1 x 1 convolutions before the up-sampling, where there are fewer pixels"
    return [
        ExactRewrite(f"{fqn}.{name}" if fqn else name, words, MixedFirst, _trial)
        for name, inside in head.named_modules()
        if name and all(hasattr(inside, part) for part in ("out_conv", "resConfUnit2", "skip_add", "has_residual", "size"))
    ]


def _trial(block: nn.Module) -> Trial:
    generator, own = torch.Generator("cpu").manual_seed(0), random_head(block)
    channels, count = own.out_conv.in_channels, 1 + bool(own.has_residual)
    sizes = [(1, channels, 3, 4), (2, channels, 2, 3)]
    return Trial(own, [tuple(torch.randn(*size, generator=generator, device="cpu") for _ in range(count)) for size in sizes])
