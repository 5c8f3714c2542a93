"""The Linear of a converted model: its weight is stored in FP8 and nowhere else."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import Fp8Backend
from ..errors import ConvertedError
from ..ops.fp8 import E4M3, Quantized, dequantize, fake_quantize, passes
from ..wrapper import must_be_called
from .backends import BACKENDS
from .backends.base import in_fp8
from .qat import compute_dtype


class Fp8Linear(nn.Module):
    """``y = x W^T + b`` with W in FP8, one scale for each output row (see `ops.fp8.naive`).

    Moving the module never changes the dtype of the FP8 weight or of its scales.

    Args:
        in_features, out_features: C and C_out.
        bias: The bias ``[C_out]``, which this module shares and which no longer learns, or None.
        backend: What runs it: ``"scaled_mm"``, ``"te"``, ``"weight_only"`` or ``"emulated"``.
        dtype: Of the weight before it was quantised.
        device: Of the (uninitialised) weight.

    Attributes:
        weight_data: ``[C_out, C]`` E4M3, a buffer: code that reads a model's dtype off its parameters finds no FP8.
        weight_scale: ``[C_out, 1]`` FP32, a buffer.
        infinities: How many infinities in the inputs were saturated, a buffer of one integer.
    """

    weight_data: Tensor
    weight_scale: Tensor
    infinities: Tensor
    bias: nn.Parameter | None

    def __init__(
        self, in_features: int, out_features: int, bias: nn.Parameter | None, backend: Fp8Backend, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.dtype = in_features, out_features, dtype
        self.backend = backend
        self.register_buffer("weight_data", torch.empty(out_features, in_features, dtype=E4M3, device=device))
        self.register_buffer("weight_scale", torch.empty(out_features, 1, dtype=torch.float32, device=device))
        self.register_buffer("infinities", torch.zeros(1, dtype=torch.int64, device=device), persistent=False)
        # The same parameter, which another module may share.
        if bias is not None:
            bias.requires_grad_(False)
        self.register_parameter("bias", bias)

    @classmethod
    def quantized(cls, linear: nn.Linear, backend: Fp8Backend) -> Fp8Linear:
        """`linear` with its weight quantised; a new module, which shares its bias."""
        weight = linear.weight.detach()
        rows = BACKENDS[backend].quantize(weight)
        made = cls(linear.in_features, linear.out_features, linear.bias, backend, weight.dtype, torch.device("meta"))
        made.weight_data, made.weight_scale = rows.data, rows.scale
        made.infinities = torch.zeros(1, dtype=torch.int64, device=weight.device)
        return made.train(linear.training)

    @property
    def backend(self) -> Fp8Backend:
        """What runs it. Another one may be set: the stored weight serves all."""
        return self._runner.name

    @backend.setter
    def backend(self, name: Fp8Backend) -> None:
        self._runner = BACKENDS[name]()

    @property
    def weight(self) -> Tensor:
        """The weight in `dtype`, made anew by each access: for code that looks at it, or computes with it by itself.

        What is written to it is lost: an adapter cannot be merged into it.
        """
        return dequantize(self.fp8_weight)

    @property
    def fp8_weight(self) -> Quantized:
        """The weight ``[C_out, C]`` with its scales ``[C_out, 1]``, as it is stored."""
        return Quantized(self.weight_data, self.weight_scale, self.dtype)

    @property
    def takes_fp8(self) -> bool:
        """Whether `forward` takes an input that is in FP8 already. Who watches or wraps it is to see a tensor."""
        return self._runner.takes_fp8 and not must_be_called(self)

    def splits(self, outputs: int) -> bool:
        """Whether `part` is of use for so many outputs, and multiples of these."""
        return self._runner.splits and not outputs % self._runner.multiple and not must_be_called(self)

    def part(self, rows: Sequence[slice]) -> Fp8Linear:
        """The Linear that makes the outputs `rows` of this one, in that order, from copies of their weights."""
        data, scale = (_rows_of(x, rows) for x in (self.weight_data.view(torch.uint8), self.weight_scale))
        bias = None if self.bias is None else nn.Parameter(_rows_of(self.bias.detach(), rows), requires_grad=False)
        made = Fp8Linear(self.in_features, len(scale), bias, self.backend, self.dtype, torch.device("meta"))
        made.weight_data, made.weight_scale, made.infinities = data.view(E4M3), scale, self.infinities
        return made.train(self.training)

    def as_input(self, input: Tensor | Quantized) -> Tensor | Quantized:
        """`input` in FP8 where that is what runs: for those who give it to several parts."""
        if self._runner.takes_fp8 and isinstance(input, Tensor) and not self._wants_grad(input):
            return in_fp8(input, self)
        return input

    def forward(self, input: Tensor | Quantized) -> Tensor:
        """input: ``[..., C]``. Returns ``[..., C_out]`` in input's dtype or autocast's; FP8 inputs say theirs.

        Gradients pass through to the input, for which the weight is dequantised; the weight has none.

        Raises:
            BackendError: the tensors are where the backend, chosen at conversion, cannot run.
        """
        dtype = compute_dtype(self.weight_data.device, input.dtype)
        if isinstance(input, Tensor) and self._wants_grad(input):
            weight = dequantize(self.fp8_weight, dtype)
            bias = None if self.bias is None else self.bias.to(dtype)
            return F.linear(fake_quantize(input, infinities=self.infinities).to(dtype), weight, bias)
        return self._runner.run(self, input, dtype)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Zeros, for a module that was made on the meta device and is to be given weights: there are none to start from in FP8."""
        for tensor in (self.weight_data.view(torch.uint8), self.weight_scale, self.infinities, self.bias):
            if tensor is not None:
                tensor.zero_()

    def of_heads(self, input: Tensor) -> Tensor:
        """`forward` of an attention output ``[B, H, N, D]``, its heads put side by side: ``[B, N, C_out]``."""
        if self.takes_fp8 and not self._wants_grad(input):
            return self(passes(input).heads_quantize(input, infinities=self.infinities))
        return self(input.transpose(1, 2).flatten(2))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, backend={self.backend}"

    def _wants_grad(self, input: Tensor) -> bool:
        return torch.is_grad_enabled() and (input.requires_grad or (self.bias is not None and self.bias.requires_grad))

    def _apply(self, fn: Any, recurse: bool = True) -> Fp8Linear:
        exact = (self.weight_data, self.weight_scale)

        def move(t: Tensor) -> Tensor:
            moved = fn(t)
            return t.to(moved.device) if moved.dtype != t.dtype and any(t is e for e in exact) else moved

        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.weight_data.device)).dtype
        super()._apply(move, recurse)
        return self

    # Plain pickle brings back no FP8 tensor (torch.save does).
    def __deepcopy__(self, memo: dict[int, Any]) -> Fp8Linear:
        made = memo[id(self)] = self.__class__.__new__(self.__class__)
        if id(self.weight_data) not in memo:  # else it is to be shared, or was copied
            memo[id(self.weight_data)] = self.weight_data.clone()
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_buffers": {**self._buffers, "weight_data": self.weight_data.view(torch.uint8)}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._buffers["weight_data"] = self.weight_data.view(E4M3)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        if f"{prefix}weight" in state_dict:
            raise ConvertedError(
                f"{prefix}weight is a weight of the original model, but this Linear holds FP8: load original weights before "
                "convert(model), or leave out those that load_lite3r has brought"
            )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _rows_of(x: Tensor, rows: Sequence[slice]) -> Tensor:
    return torch.cat([x[row] for row in rows])
