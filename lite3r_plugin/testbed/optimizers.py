"""The optimizers of a training run."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .losses import TrainingModel
from .settings import TrainingConfig


class Muon(torch.optim.Optimizer):
    """`torch.optim.Muon` (Jordan et al. 2024) with steps of AdamW's size, all matrices of one shape at once.

    One matrix after another, as torch does it, a step of a small model has more than a thousand launches, which took a ninth of its
    time on an H200.

    Args:
        matrices: Parameters with two dimensions.
        lr, weight_decay, momentum: As in `torch.optim.Muon` with ``adjust_lr_fn="match_rms_adamw"``.
    """

    def __init__(self, matrices: Iterable[Tensor], lr: float, weight_decay: float, momentum: float = 0.95) -> None:
        shapes: defaultdict[torch.Size, list[Tensor]] = defaultdict(list)
        for matrix in matrices:
            shapes[matrix.shape].append(matrix)
        groups = [{"params": same} for same in shapes.values()]
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One step; all matrices have gradients. A closure is not supported."""
        for group in self.param_groups:
            matrices, rate = group["params"], group["lr"]
            gradients = torch.stack([p.grad for p in matrices])
            state = self.state[matrices[0]]
            if "average" not in state:
                state["average"] = torch.zeros_like(gradients)
            average = state["average"]
            average.lerp_(gradients, 1 - group["momentum"])
            turned = _orthogonal(gradients.lerp(average, group["momentum"])).to(gradients.dtype)
            for matrix, step in zip(matrices, turned, strict=True):
                matrix.mul_(1 - rate * group["weight_decay"]).add_(step, alpha=-0.2 * math.sqrt(max(step.shape)) * rate)


def _orthogonal(x: Tensor, steps: int = 5, eps: float = 1e-7) -> Tensor:
    """Matrices ``[n, r, c]`` with all singular values near 1, by the Newton-Schulz iteration in BF16."""
    x = x.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        gram = torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315)
        x = torch.baddbmm(x, gram, x, beta=3.4445)
    return x.mT if tall else x


def make_optimizers(model: TrainingModel, config: TrainingConfig, device: torch.device) -> list[torch.optim.Optimizer]:
    """`Muon` for the matrices of the transformer blocks; AdamW for the rest.

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
    muon: torch.optim.Optimizer = Muon(hidden, config.learning_rate, config.weight_decay)
    return [muon, torch.optim.AdamW(groups, config.learning_rate, (0.9, 0.95), fused=device.type == "cuda")]
