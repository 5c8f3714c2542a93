"""Which key blocks each query block attends to exactly, and which not at all.

`naive` is the definition, `mask` which pairs may be seen at all, `kernel_mask` that as kernels read it, `kernels` the Triton twin, which
gives bit sets as well; `transpose_kernels` turns these into what a backward pass needs.
"""

from .mask import Allowed, SegmentMask
from .naive import KeySpread, block_map, density, kept_blocks, key_spread, masked_block_map, masked_density, negligible_blocks

__all__ = [
    "Allowed", "KeySpread", "SegmentMask", "block_map", "density", "kept_blocks", "key_spread", "masked_block_map", "masked_density",
    "negligible_blocks",
]  # fmt: skip
