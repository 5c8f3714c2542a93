"""What a backend of FP8 Linears is."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from ...config import Fp8Backend
from ...errors import BackendError
from ...ops.fp8 import Quantized, passes

UNIT = 16
"""FP8 matrix units take multiples of it."""


class StoredLinear(Protocol):
    """What a backend sees of an `Fp8Linear`: weight ``[C_out, C]`` E4M3, scales ``[C_out, 1]`` FP32, bias ``[C_out]`` or None,
    and the counter of saturated infinities, ``[1]`` int64."""

    weight_data: Tensor
    weight_scale: Tensor
    bias: nn.Parameter | None
    infinities: Tensor

    @property
    def fp8_weight(self) -> Quantized:
        """The weight with its scales."""
        ...


class Backend:
    """Runs one FP8 Linear; each has an instance of its own, which may remember what it made of the Linear's tensors.

    Attributes:
        name: As in `Lite3RConfig.fp8_backend`.
        takes_fp8: Whether `run` takes an input that is in FP8 already.
        needs_gpu: Whether it runs on CUDA tensors only.
        multiple: Of what it takes numbers of inputs and outputs.
        splits: Whether it runs some rows of a weight as it does all: nothing is made of a weight that would be made anew each time.
    """

    name: Fp8Backend
    takes_fp8: bool = False
    needs_gpu: bool = True
    multiple: int = 1
    splits: bool = True

    @staticmethod
    def why_not(device: torch.device, inputs: int, outputs: int) -> str | None:
        """The reason why it cannot run a Linear ``inputs -> outputs`` on `device`, or None when it can."""
        raise NotImplementedError

    @staticmethod
    def quantize(weight: Tensor) -> Quantized:
        """A weight ``[C_out, C]`` in high precision as this backend stores it: one scale for each output row."""
        return passes(weight).quantize(weight)

    def run(self, linear: StoredLinear, x: Tensor | Quantized, dtype: torch.dtype) -> Tensor:
        """The Linear without gradients: ``[..., C] -> [..., C_out]`` in `dtype`. An `x` in FP8 only where it `takes_fp8`.

        Raises:
            BackendError: the tensors are where the backend, chosen at conversion, cannot run, or `x` is in FP8 in vain.
        """
        where = x.data.device if isinstance(x, Quantized) else x.device
        if self.needs_gpu and where.type != "cuda":
            raise BackendError(
                f'the Linears were converted for the backend "{self.name}" on a GPU and got a tensor on {where}; convert(model) again'
            )
        if isinstance(x, Quantized) and not self.takes_fp8:
            raise BackendError(f'the backend "{self.name}" takes no input in FP8')
        return self._run(linear, x, dtype)

    def _run(self, linear: StoredLinear, x: Tensor | Quantized, dtype: torch.dtype) -> Tensor:
        raise NotImplementedError


def in_fp8(x: Tensor | Quantized, linear: StoredLinear) -> Quantized:
    """`x` ``[..., C]`` with one scale for each row; infinities that saturate are counted."""
    return x if isinstance(x, Quantized) else passes(x).quantize(x, infinities=linear.infinities)


def why_no_fp8_units(device: torch.device, inputs: int, outputs: int) -> str | None:
    """The reason why `device` multiplies no FP8 matrices of this size, or None when it does."""
    if device.type != "cuda":
        return f"the model is on {device}, not on a CUDA GPU"
    if torch.cuda.get_device_capability(device) < (8, 9):
        return "the GPU is older than compute capability 8.9 and has no FP8"
    if inputs % UNIT or outputs % UNIT:
        return f"its FP8 matrix products need multiples of {UNIT}, not {inputs} -> {outputs}"
    return None
