"""Definition of a Linear in FP32 on few rows, such as one camera token for each view.

Y = X W^T + bias        products and sums in FP32: nothing is rounded to TF32 or less; W may be stored in BF16 or FP16
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x weight^T + bias``.

    Args:
        x: ``[..., C]``, FP32 (or FP64).
        weight: ``[C_out, C]`` in x's dtype, or in a narrower one, of which a copy in x's is made.
        bias: ``[C_out]`` in x's dtype, or None.

    Returns:
        ``[..., C_out]`` in x's dtype.
    """
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x, weight.to(x.dtype), bias)
