"""The convolution that makes tokens of patches, as the matrix product that it is: an exact rewrite that families of models share."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from ..adapter.rewrites import ExactRewrite, Trial
from ..adapter.trials import RandomCopies, require_equal
from ..errors import AdapterError, short
from ..wrapper import RewrittenMethod, around_and_itself, belongs_to_tuner, is_plain_tensor, keeps_copies


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
    """`PatchProduct` of the convolutions without overlap inside the patch embedding `module`, which is called `fqn`.

    One that the code around it does not take with channels side by side, in a trial of the whole embedding, is left alone; so are those
    that adapters consist of or keep (PEFT).
    """
    words, modules = "patches become tokens by a matrix product", dict(module.named_modules())
    return [
        ExactRewrite(".".join(filter(None, (fqn, name))), words, PatchProduct, functools.partial(_trial, module, name))
        for name, inside in modules.items()
        if type(inside) is nn.Conv2d and is_without_overlap(inside) and not _is_of_a_tuner(modules, name)
    ]


def _is_of_a_tuner(modules: Mapping[str, nn.Module], name: str) -> bool:
    around = list(around_and_itself(name))[:-1]
    return belongs_to_tuner(modules, name, around) or any(keeps_copies(modules[outer]) for outer in around)


def _trial(embedding: nn.Module, name: str, convolution: nn.Module) -> Trial:
    """Calls of a small convolution, after one of the whole embedding where its own code runs by itself."""
    (height, width), channels = convolution.kernel_size, convolution.in_channels  # pyright: ignore
    generator = torch.Generator("cpu").manual_seed(0)
    images = torch.randn(2, channels, 2 * height, 3 * width, generator=generator, device="cpu")  # pyright: ignore
    if name:
        host, copied = (RandomCopies().of(embedding, {}) for _ in range(2))
        try:
            expected = host(images)
        except Exception:  # it takes other arguments, or images of another size: no more can be told
            expected = None
        if expected is not None:
            inner = copied.get_submodule(name)
            vars(inner)["forward"] = PatchProduct(inner)
            try:
                found = copied(images)
            except Exception as error:
                raise AdapterError(f"the code around it takes no channels side by side: {short(error)}") from error
            require_equal(expected, found, "the embedding around it")
    small = nn.Conv2d(3, 8, (height, width), (height, width), bias=convolution.bias is not None)  # pyright: ignore
    sizes = [(1, 3, height, width), (2, 3, 2 * height + 1, 3 * width)]
    return Trial(small, [(torch.randn(*size, generator=generator, device="cpu"),) for size in sizes])  # pyright: ignore
