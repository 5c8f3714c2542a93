"""Definition of a Linear in FP32 on few rows, such as one camera token for each view.

Y = X W^T + bias        products and sums in FP32: nothing is rounded to TF32 or less
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x weight^T + bias``.

    Args:
        x: ``[..., C]``, FP32 (or FP64).
        weight: ``[C_out, C]`` in x's dtype.
        bias: ``[C_out]`` in x's dtype, or None.

    Returns:
        ``[..., C_out]`` in x's dtype.
    """
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x, weight, bias)
