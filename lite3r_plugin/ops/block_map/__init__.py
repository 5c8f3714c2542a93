"""Which key blocks each query block attends to exactly, and which not at all.

`naive` is the definition, `kernels` its Triton twin, which gives bit sets as well; `transpose_kernels` turns these into what a
backward pass needs.
"""

from .naive import block_map, density, kept_blocks, negligible_blocks

__all__ = ["block_map", "density", "kept_blocks", "negligible_blocks"]
