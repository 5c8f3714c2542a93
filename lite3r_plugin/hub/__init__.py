"""Checkpoints on the Hugging Face Hub: pushing them with a card of measured numbers, and converting what the authors published."""

from .official import OfficialConversion, convert_official
from .push import push_to_hub

__all__ = ["OfficialConversion", "convert_official", "push_to_hub"]


def __dir__() -> list[str]:
    return sorted(__all__)  # what completion offers
