"""Which key blocks each query block attends to exactly, and which not at all. `kernels` is the Triton twin; it gives bit sets as well."""

from .naive import block_map, density, kept_blocks, negligible_blocks

__all__ = ["block_map", "density", "kept_blocks", "negligible_blocks"]
