"""Sparse-linear attention: the whole operator, from q, k, v in host order to the output in host order.

To be read in this order; a call goes down through it:

    api.py         the public entry, and what it refuses
    signature.py   the arguments, declared once: names, types, what may need a gradient; schemas are derived from them
    operators.py   the operators of `torch.library` that compilers see
    forward.py     the forward pass, in torch operators or in Triton, without and with what a backward pass needs
    saved.py       what is kept for a backward pass, by name
    cache.py       keys that come part by part, for streams of frames
    backward.py    the backward pass, and the function of eager autograd
    naive.py       the definition, in plain torch, over ordered tokens; wrong numbers are judged here
    kernels/       its Triton twin, over ordered and padded tokens; its `__init__` says which file holds which kernel

The pass before attention is `ops.qk_norm_rope`, the choice of blocks `ops.block_map`.
"""

from ..block_map import SegmentMask
from .api import KeyTokens, linear_attention, sparse_linear_attention
from .cache import KeyCache
from .naive import merge

__all__ = ["KeyCache", "KeyTokens", "SegmentMask", "linear_attention", "merge", "sparse_linear_attention"]
