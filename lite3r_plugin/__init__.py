"""Lite3R: sparse-linear attention for feed-forward 3D reconstruction models and other ViT backbones, in one line."""

from .adapter.hookspecs import hookimpl
from .adapter.layouts import LayoutFunction, TokenLayout, TokenSource, Views
from .adapter.sites import AttentionSite, FusedQKV, KeyValueCache, PreNormBlock, Rope2D, Routed, SeparateQKV
from .apply.checkpoint import load_lite3r, save_lite3r
from .apply.memory import plan_memory
from .apply.profile import KeepRatioProfile
from .apply.report import describe
from .apply.verbs import apply_lite3r, convert, lite3r_disabled, remove_lite3r
from .config import Lite3RConfig
from .diagnosis import doctor
from .errors import Lite3RError
from .training.calibrate import calibrate
from .training.config import DistillConfig
from .training.distill import distill
from .training.ratios import choose_keep_ratios
from .version import __version__

__all__ = [
    "AttentionSite",
    "DistillConfig",
    "FusedQKV",
    "KeepRatioProfile",
    "KeyValueCache",
    "LayoutFunction",
    "Lite3RConfig",
    "Lite3RError",
    "PreNormBlock",
    "Rope2D",
    "Routed",
    "SeparateQKV",
    "TokenLayout",
    "TokenSource",
    "Views",
    "__version__",
    "apply_lite3r",
    "calibrate",
    "choose_keep_ratios",
    "convert",
    "describe",
    "distill",
    "doctor",
    "hookimpl",
    "lite3r_disabled",
    "load_lite3r",
    "plan_memory",
    "remove_lite3r",
    "save_lite3r",
]


def __dir__() -> list[str]:
    return sorted(__all__)  # what completion offers
