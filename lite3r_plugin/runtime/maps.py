"""Dense heads with kernels for their feature maps, whatever code they are written in.

While the forward of a head runs, the functions of torch that it calls on maps with channels side by side are exchanged for one pass of
memory each: bilinear interpolation, and the bias of a convolution, which torch adds by a pass of its own after cuDNN. Everything else
of the head is the host's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.overrides import TorchFunctionMode, handle_torch_function, has_torch_function

from ..adapter.rewrites import ExactRewrite, Trial
from ..adapter.trials import RandomCopies, in_trial
from ..ops import feature_maps
from ..ops.feature_maps import naive
from ..wrapper import RewrittenMethod, is_plain_tensor
from .modes import operators_are_transformed

LEAST = 1 << 20
"""Elements of a map: over fewer, a pass of torch's is expected to be over before Python has started another kernel. Not measured."""


class MapKernels(RewrittenMethod):
    """The forward of a dense head, or a method with all that is in it, with `lite3r_plugin.ops.feature_maps` for large maps.

    They run on a GPU, for maps in BF16, FP16 or FP32 whose channels lie side by side, as those of DPT heads do. Torch's own functions run
    where gradients are wanted, in code that is compiled, traced or transformed (`torch.func`), under dispatch modes (but for tensors
    without data), and on tensors of other classes. Dtypes stay. A bias is added as torch adds it after cuDNN, to the bit; interpolation
    sums in FP32, as torch does, and differs by the last rounding.
    """

    def rewritten(self, *args: Any, **kwargs: Any) -> Any:
        """As the host's method."""
        if torch.compiler.is_compiling():
            return self.run_host(*args, **kwargs)
        with _Exchange():
            return self.run_host(*args, **kwargs)


def map_kernels(fqn: str, inputs: Callable[[Any], tuple[Any, ...]], method: str = "forward") -> ExactRewrite:
    """`MapKernels` of a `method` of the head `fqn`.

    In the trial a copy with random weights runs with the definitions of the kernels, since these need a GPU.

    Args:
        fqn: Its name.
        inputs: From the head to the arguments of its method in a small call: FP32, on the CPU.
        method: The method, in which all of its feature maps are made.
    """

    def trial(head: nn.Module) -> Trial:
        return Trial(random_head(head), [inputs(head)])

    words = "up-sampling and biases of its feature maps by kernels of one pass, where channels lie side by side on a GPU"
    return ExactRewrite(fqn, words, lambda head: MapKernels(head, method), trial, method, kernels=True)


def random_head(head: nn.Module) -> Any:
    """A copy of a head for a trial, with random weights, in FP32 on the CPU."""
    copied = RandomCopies().of(head, {})
    for parameter in copied.parameters():
        if parameter.dim() == 1:
            parameter.mul_(0.1)  # lest exponentials at the end of a head enlarge what was rounding
    return copied


def add_embedding(x: Tensor, across: Tensor, down: Tensor) -> Tensor:
    """`x` ``[N, C, H, W]`` plus `across` ``[W, C / 2]`` and `down` ``[H, C / 2]``, by one kernel in the forward of a `MapKernels`."""
    if has_torch_function((x, across, down)):
        return handle_torch_function(add_embedding, (x, across, down), x, across, down)
    return naive.add_embedding(x, across, down)


def upsample_with_embedding(x: Tensor, size: tuple[int, int], across: Tensor, down: Tensor) -> Tensor | None:
    """`x` ``[N, C, H, W]`` at another size, interpolated with aligned corners, plus the embedding `across` and `down` of that size.

    Returns:
        ``[N, C, *size]`` by one kernel in the forward of a `MapKernels`; None elsewhere, and where the kernel does not run.
    """
    if has_torch_function((x, across, down)):
        return handle_torch_function(upsample_with_embedding, (x, across, down), x, size, across, down)
    return None


class _Exchange(TorchFunctionMode):
    """Exchanges functions for those in `_INSTEAD`. It holds nothing, and a mode is its thread's own."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        instead = None if torch.compiler.is_compiling() else _INSTEAD.get(func)
        return (instead or func)(*args, **(kwargs or {}))


def _interpolate(
    x: Tensor, size: Any = None, scale_factor: Any = None, mode: str = "nearest", align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None, antialias: bool = False,
) -> Tensor:  # fmt: skip
    if mode == "bilinear" and not antialias and _are_plain(x) and x.dim() == 4:
        target, scales = _pair(size, int), _pair(scale_factor, float)
        if scales is not None and size is None:
            target = feature_maps.output_size(x, scales)
            scales = None if recompute_scale_factor else scales
        elif scale_factor is not None:
            target = None  # both: an error
        if target is not None and min(target) > 0 and _pays(x, x.shape[0] * x.shape[1] * target[0] * target[1]):
            return feature_maps.upsample(x, target, align_corners=bool(align_corners), scales=scales or (None, None))
    return F.interpolate(x, size, scale_factor, mode, align_corners, recompute_scale_factor, antialias)


def _convolution(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`function`, a convolution, with the bias in a pass of ours."""

    def convolve(input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        if (
            bias is None
            or not _are_plain(input, weight, bias)
            or (bias.dtype, bias.device) != (weight.dtype, input.device)
            or not _pays(input, LEAST)
        ):
            return function(input, weight, bias, *args, **kwargs)
        out = function(input, weight, None, *args, **kwargs)
        if bias.shape != out.shape[1:2]:
            return function(input, weight, bias, *args, **kwargs)  # which says what is wrong
        return (feature_maps if _pays(out, out.numel()) else naive).add_bias_(out, bias)

    return convolve


def _add_embedding(x: Tensor, across: Tensor, down: Tensor) -> Tensor:
    pays = _are_plain(x, across, down) and _pays(x, x.numel())
    return (feature_maps if pays else naive).add_embedding(x, across, down)


def _upsample_with_embedding(x: Tensor, size: tuple[int, int], across: Tensor, down: Tensor) -> Tensor | None:
    if not _are_plain(x, across, down) or not _pays(x, x.shape[0] * x.shape[1] * size[0] * size[1]):
        return None
    return feature_maps.upsample_with_embedding(x, size, across, down, align_corners=True)


_INSTEAD: dict[Any, Callable[..., Tensor | None]] = {
    F.interpolate: _interpolate,
    F.conv2d: _convolution(F.conv2d),
    F.conv_transpose2d: _convolution(F.conv_transpose2d),
    add_embedding: _add_embedding,
    upsample_with_embedding: _upsample_with_embedding,
}


def _are_plain(*tensors: Tensor) -> bool:
    """Whether these are numbers and nothing more: no other class, no gradients, nobody who records or transforms what becomes of them.

    Tensors without data take the way of those with data, as operators: what a forward will hold is told by them.
    """
    imagined = isinstance(tensors[0], FakeTensor)  # the map; weights may have data
    return (
        all(is_plain_tensor(x) or (imagined and isinstance(x, FakeTensor)) for x in tensors)
        and (imagined or not torch._C._len_torch_dispatch_stack())
        and not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))
        and not operators_are_transformed()
    )


def _pays(x: Tensor, elements: int) -> bool:
    """Whether a kernel takes the map `x`, and a pass that writes so many elements is worth it."""
    return in_trial() or (elements >= LEAST and feature_maps.takes(x))


def _pair(value: Any, kind: type) -> tuple[Any, Any] | None:
    """Of the number of both axes, or one of each; None where it is neither."""
    if isinstance(value, (int, float)):
        value = (value, value)
    fits = isinstance(value, (tuple, list)) and len(value) == 2 and all(isinstance(v, (int, float)) for v in value)
    return (kind(value[0]), kind(value[1])) if fits else None
