"""Which key blocks each query block attends to exactly. `kernels` is the Triton twin; it gives a bit set as well."""

from .naive import block_map, density, kept_blocks

__all__ = ["block_map", "density", "kept_blocks"]
