"""The convolution that makes tokens of patches, as the matrix product that it is: an exact rewrite that families of models share."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from ..adapter.rewrites import ExactRewrite, Trial
from ..errors import AdapterError
from ..wrapper import RewrittenMethod, is_plain_tensor


class PatchProduct(RewrittenMethod):
    """The forward of a `torch.nn.Conv2d` whose windows lie side by side.

    cuDNN has no good algorithm for windows of 14 pixels: for 32 images of 518 pixels to width 1,024 in BF16 an H200 takes 2.6 ms, of 0.1 by
    arithmetic. The result has the channels of a patch side by side in memory, which is the order of tokens.

    Without half precision the host's own runs on a GPU: there a convolution may round to TF32 where a product may not.

    Raises:
        AdapterError: the module is no such convolution.
    """

    def __init__(self, module: nn.Module) -> None:
        if type(module) is not nn.Conv2d:
            raise AdapterError(f"it is a {type(module).__name__}, not a torch.nn.Conv2d")
        if not is_without_overlap(module):
            raise AdapterError("its windows do not lie side by side")
        super().__init__(module, "forward")

    def rewritten(self, input: Tensor) -> Tensor:
        """``[B, C, H, W]`` to ``[B, C_out, rows, columns]``, channels last."""
        module: Any = self.module
        weight, bias, (height, width) = module.weight, module.bias, module.kernel_size
        tensors = (input, weight) if bias is None else (input, weight, bias)
        known = all(is_plain_tensor(x) or isinstance(x, FakeTensor) for x in tensors)  # without data it is told what a forward holds
        if input.dim() != 4 or not known or (input.is_cuda and not _is_half(input)):
            return self.run_host(input)
        rows, columns = input.shape[2] // height, input.shape[3] // width
        if not rows or not columns or input.shape[1] != module.in_channels:
            return self.run_host(input)  # which says what is wrong
        windows = input[..., : rows * height, : columns * width].unflatten(3, (columns, width)).unflatten(2, (rows, height))
        patches = windows.permute(0, 2, 4, 1, 3, 5).flatten(3)  # [B, rows, columns, C height width]
        return F.linear(patches, weight.flatten(1), bias).permute(0, 3, 1, 2)


def _is_half(x: Tensor) -> bool:
    """Whether a product of `x` is computed in BF16 or FP16."""
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    return dtype in (torch.bfloat16, torch.float16)


def is_without_overlap(convolution: nn.Conv2d) -> bool:
    """Whether the windows lie side by side, and cover what there is but for a rest at the end."""
    return (
        convolution.kernel_size == convolution.stride
        and convolution.kernel_size != (1, 1)
        and convolution.padding in ((0, 0), "valid")
        and convolution.dilation == (1, 1)
        and convolution.groups == 1
    )


def patch_products(fqn: str, module: nn.Module) -> list[ExactRewrite]:
    """`PatchProduct` of the convolutions without overlap inside the patch embedding `module`, which is called `fqn`."""

    def trial(convolution: nn.Module) -> Trial:
        (height, width), generator = convolution.kernel_size, torch.Generator("cpu").manual_seed(0)  # pyright: ignore
        small = nn.Conv2d(3, 8, (height, width), (height, width), bias=convolution.bias is not None)
        sizes = [(1, 3, height, width), (2, 3, 2 * height + 1, 3 * width)]
        return Trial(small, [(torch.randn(*size, generator=generator, device="cpu"),) for size in sizes])

    words = "patches become tokens by a matrix product"
    return [
        ExactRewrite(".".join(filter(None, (fqn, name))), words, PatchProduct, trial)
        for name, inside in module.named_modules()
        if type(inside) is nn.Conv2d and is_without_overlap(inside)
    ]
