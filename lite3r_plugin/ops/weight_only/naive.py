"""Definition of a Linear whose weight alone is in FP8, for GPUs that compute in no FP8.

    Y = (X data^T) * scale + bias        data, scale: the weight's rows, as in `ops.fp8.naive`

E4M3 numbers are exact in every dtype of X. Products and sums are in FP32, rounded once at the end.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..fp8 import Quantized


def linear(x: Tensor, weight: Quantized, bias: Tensor | None) -> Tensor:
    """``x weight'^T + bias``.

    Args:
        x: ``[..., C]``.
        weight: ``[C_out, C]``, E4M3, finite.
        bias: ``[C_out]`` or None.

    Returns:
        ``[..., C_out]`` in x's dtype.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        out = F.linear(x.to(wide), weight.data.to(wide)) * weight.scale.flatten()
    return (out if bias is None else out + bias).to(x.dtype)
