"""Sizes of launches. Triton's functions of that kind serve kernels too, and take microseconds of Python a call."""

from __future__ import annotations


def power_of_2(n: int) -> int:
    """The least power of two from `n`, which is positive, on."""
    return 1 << (n - 1).bit_length()


def cover(n: int, size: int) -> int:
    """How many parts of `size` cover `n`."""
    return -(-n // size)
