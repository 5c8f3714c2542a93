"""PEFT and Lite3R: LoRA beside the linear branches."""

from .lora import add_lora, lora_disabled, merge_lora

__all__ = ["add_lora", "lora_disabled", "merge_lora"]
