"""A deeper testbed that computes the same function: the start of a larger model from the weights of a smaller one."""

from __future__ import annotations

import copy
import dataclasses

import torch
from torch import nn

from .model import Testbed


@torch.no_grad()
def deeper(model: Testbed) -> Testbed:
    """`model` with one more pair of blocks before the last, a copy of the pair before it whose branches end in zeros.

    The rest of the copies is of use from the first step on, because only the last map of each branch has to be learnt anew.
    """
    grown = copy.deepcopy(model)
    grown.config = dataclasses.replace(model.config, depth=model.config.depth + 1)
    at = model.config.depth - 1
    for blocks in (grown.aggregator.frame_blocks, grown.aggregator.global_blocks):
        blocks.insert(at, _silent(copy.deepcopy(blocks[max(at - 1, 0)])))
    return grown


def _silent(block: nn.Module) -> nn.Module:
    for name in ("attn.proj", "mlp.2"):
        for parameter in block.get_submodule(name).parameters():
            nn.init.zeros_(parameter)
    return block
