"""LoRA around a Linear: whoever reads its weight gets what it learned, and in training for FP8 the sum is rounded."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn

from ..errors import ConfigError
from ..fp8.qat import FakeQuantLinear, folded
from ..ops.dispatch import without_autocast


class SummedLora(lora.Linear):
    """PEFT's LoRA, but for modules that compute with the weight of a Linear by themselves, as timm's EVA-02: they get ``W + s B A``."""

    @property
    def weight(self) -> Tensor:
        """``W + s B A`` ``[C_out, C]`` of the active adapters, in the dtype of W; W where they are merged or switched off."""
        base: Tensor = self.get_base_layer().weight  # pyright: ignore[reportAssignmentType]
        return folded(base, self.deltas(base))

    def deltas(self, like: Tensor) -> list[Tensor]:
        """``s B A`` ``[C_out, C]`` of each adapter that is to be added, without the autocast of the device of `like`."""
        if self.merged or self.disable_adapters:
            return []
        with without_autocast(like):
            return [self.get_delta_weight(name) for name in self.active_adapters if name in self.lora_A]


class QatLora(SummedLora):
    """``y = Q(x) Q(W + s B A)^T + b`` with Q the rounding to FP8 of `FakeQuantLinear`, around which it is.

    What is merged and converted then computes what was trained; stock LoRA, ``Q(x) Q(W)^T + s x A^T B^T``, does not: merging rounds the
    sum. The deltas of several active adapters are summed. A weight that does not learn is not rounded on its own.

    Raises:
        ConfigError: the adapter does more than add ``s B A`` to the weight: dropout, a bias, DoRA or another variant of LoRA.
    """

    rounds_sum = True

    def update_layer(self, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        super().update_layer(adapter_name, *args, **kwargs)
        extra = []
        if isinstance(self.lora_dropout[adapter_name], nn.Dropout):
            extra.append("lora_dropout")
        if self.lora_bias.get(adapter_name):
            extra.append("lora_bias")
        if adapter_name in self.lora_variant:
            extra.append(type(self.lora_variant[adapter_name]).__name__)
        if extra:
            raise ConfigError(
                f"{', '.join(extra)} cannot be used while a model trains for FP8, where W + BA is rounded as one weight: leave it out of "
                'the LoRA configuration, or train with precision="full"'
            )

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x: ``[..., C]``. Returns ``[..., C_out]`` as the Linear inside does, also under autocast."""
        base = self.base_layer
        rounds = isinstance(base, FakeQuantLinear) and base.enabled and not self.disable_adapters
        if rounds and kwargs.get("adapter_names") is not None:
            raise ConfigError("adapter_names cannot be used while a model trains for FP8: switch adapters by set_adapter")
        deltas = self.deltas(x) if rounds else []
        return base(x, deltas) if deltas else super().forward(x, *args, **kwargs)


def made_around(linear: nn.Linear, adapter: str, rank: int, alpha: float) -> lora.Linear:
    """LoRA around `linear`, not put in yet: one adapter, FP32 (FP64 for an FP64 Linear), trainable, zero at the start."""
    kind = QatLora if isinstance(linear, FakeQuantLinear) else SummedLora
    config = lora.LoraConfig(r=rank, lora_alpha=alpha)  # pyright: ignore[reportArgumentType]
    layer = kind(linear, adapter, config=config, r=rank, lora_alpha=alpha)  # pyright: ignore[reportArgumentType]
    for part in (layer.lora_A, layer.lora_B):
        part.to(torch.promote_types(linear.weight.dtype, torch.float32))
    return layer.train(linear.training)
