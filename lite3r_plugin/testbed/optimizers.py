"""The optimizers of a training run."""

from __future__ import annotations

import torch
from torch import nn

from .losses import TrainingModel
from .settings import TrainingConfig


def make_optimizers(model: TrainingModel, config: TrainingConfig, device: torch.device) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024), with steps of AdamW's size, for the matrices of the transformer blocks; AdamW for the rest.

    Weights of linear maps and convolutions decay; biases, norms, gains and tokens do not.
    """
    bed = model.model
    blocks = (*bed.aggregator.frame_blocks, *bed.aggregator.global_blocks, *bed.camera_head.trunk)
    hidden = [m.weight for block in blocks for m in block.modules() if isinstance(m, nn.Linear)]
    taken = {id(p) for p in hidden}
    rest = [p for p in model.parameters() if id(p) not in taken]
    decays = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    groups = [
        {"params": [p for p in rest if id(p) in decays], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if id(p) not in decays], "weight_decay": 0.0},
    ]
    return [
        torch.optim.Muon(hidden, config.learning_rate, config.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, config.learning_rate, (0.9, 0.95), fused=device.type == "cuda"),
    ]
