"""Quantisation-aware training: Linears that round to FP8 and back in forward, and pass gradients straight through."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import WeightsError
from ..ops.fp8 import Quantized, dequantize, fake_quantize, quantize
from ..wrapper import HostWrapper, is_plain_tensor
from .cache import TensorCache


class FakeQuantLinear(HostWrapper, nn.Linear):
    """Stands in for a Linear: inputs rounded to FP8 token by token, the weight output row by output row.

    A weight that does not learn is quantised once, and kept in FP8 beside the original. One that learns is quantised in each
    forward, without gradients as well: fused optimisers change a tensor without counting a version of it.

    Attributes:
        enabled: False runs the host's own forward.
        infinities: How many infinities in the inputs were saturated, a buffer of one integer.
    """

    infinities: Tensor

    def __init__(self, host: nn.Linear) -> None:
        super().__init__(host)
        self.enabled = True
        self._rounded: TensorCache[Quantized] = TensorCache()
        self.register_buffer("infinities", torch.zeros(1, dtype=torch.int64, device=host.weight.device), persistent=False)

    def forward(self, input: Tensor, deltas: Sequence[Tensor] = ()) -> Tensor:
        """input: ``[..., C]``. Returns ``[..., C_out]`` as the host does, also under autocast.

        Args:
            input: The input.
            deltas: ``[C_out, C]`` each, what adapters add to the weight: it is their sum that is rounded, as it is once they are merged.
        """
        if not self.enabled:
            return self.run_host(input)
        weight = fake_quantize(folded(self._plain_weight(), deltas)) if deltas else self._weight()
        return F.linear(fake_quantize(input, infinities=self.infinities), weight, self.bias)

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and "_rounded" in self.__dict__:  # who asks for it may write to its data, as merging a LoRA does
            self._rounded.forget()
        return super().__getattr__(name)

    def reset_parameters(self) -> None:
        """The host's own, and no infinities: what was made on the meta device may be initialised by it."""
        self.host.reset_parameters()
        self.infinities.zero_()

    def _weight(self) -> Tensor:
        weight = self._plain_weight()
        if weight.requires_grad:
            self._rounded.forget()
            return fake_quantize(weight)
        with torch.no_grad():
            return dequantize(self._rounded.get(weight, lambda: quantize(weight)), compute_dtype(weight.device, weight.dtype))

    def _plain_weight(self) -> Tensor:
        weight = self._parameters.get("weight")
        if weight is None:  # made from others, by a parametrisation or by pruning
            weight = self.weight
        if not is_plain_tensor(weight):
            raise WeightsError(
                f"a Linear that rounds to FP8 in training was given a {type(weight).__name__} as its weight, which it cannot read: shard "
                "by fully_shard of FSDP2, whose forward sees plain weights, and quantise instead of precision='fp8_qat', not on top of it"
            )
        return weight


def folded(weight: Tensor, deltas: Iterable[Tensor]) -> Tensor:
    """`weight` ``[C_out, C]`` with `deltas` added one after the other, each sum in the dtype of `weight`: as adapters are merged."""
    for delta in deltas:
        weight = (weight + delta).to(weight.dtype)
    return weight


def compute_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a Linear computes on `device` when it is given `dtype`: autocast's, or that one."""
    if torch.is_autocast_enabled(device.type) and dtype != torch.float64:
        return torch.get_autocast_dtype(device.type)
    return dtype
