"""LoRA beside the linear branches: put in by `add_lora`, or held in adapters of PEFT, to which importing this package makes them known."""

from .config import Lite3RPeftConfig
from .lora import add_lora, lora_disabled, merge_lora
from .tuner import Lite3RTuner

__all__ = ["Lite3RPeftConfig", "Lite3RTuner", "add_lora", "lora_disabled", "merge_lora"]


def __dir__() -> list[str]:
    return sorted(__all__)  # what completion offers
