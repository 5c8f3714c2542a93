"""FP8 rows: quantise, and the operations that end in a quantisation, in one pass."""

from __future__ import annotations

from .naive import E4M3, E5M2, Quantized, dequantize, fake_quantize, quantize

__all__ = ["E4M3", "E5M2", "Quantized", "dequantize", "fake_quantize", "quantize"]
