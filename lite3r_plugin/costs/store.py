"""Keeps measured costs of attention from process to process."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

import torch

from ..errors import InputError
from ..files import write_atomically
from ..version import __version__
from .model import AttentionCosts

logger = logging.getLogger(__name__)
# The least and the most that any GPU can come near to, in the units of `AttentionCosts`.
PLAUSIBLE = {"dense": (1e-12, 1e-2), "slowdown": (1e-2, 1e3), "per_token": (0.0, 1.0), "per_call": (0.0, 1e3)}
VERSIONS = {"lite3r": __version__, "torch": torch.__version__}


def users_folder() -> Path:
    """The folder of the user's cache where measurements are kept; it is made."""
    from huggingface_hub import cached_assets_path

    return cached_assets_path("lite3r-plugin", namespace="attention_costs")


class CostStore:
    """One JSON file for each kind of GPU. What was measured with other versions counts as not there.

    Args:
        folder: Where the files are; by default `users_folder`, looked up when it is needed.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder

    def load(self, name: str) -> AttentionCosts | None:
        """The costs of the GPU `name`; None where there are none, or damaged ones, so that they are measured again."""
        try:
            stored = json.loads(self._file(name).read_text())
            costs = AttentionCosts(**stored["costs"]) if stored["versions"] == VERSIONS else None
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None
        return costs if costs is not None and _is_plausible(costs) else None

    def save(self, name: str, costs: AttentionCosts) -> None:
        """Keep `costs` of the GPU `name`, or warn that they cannot be kept."""
        try:
            write_atomically(self._file(name), json.dumps({"versions": VERSIONS, "costs": dataclasses.asdict(costs)}, indent=1) + "\n")
        except (OSError, InputError) as error:
            logger.warning("The measurement cannot be kept, so the next process repeats it: %s", error)

    def _file(self, name: str) -> Path:
        return (self.folder or users_folder()) / f"{name.replace('/', '-')}.json"


def _is_plausible(costs: AttentionCosts) -> bool:
    return all(type(x := getattr(costs, name)) in (int, float) and low <= x <= high for name, (low, high) in PLAUSIBLE.items())
