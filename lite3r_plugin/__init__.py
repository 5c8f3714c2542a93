"""Lite3R: sparse-linear attention for feed-forward 3D reconstruction models and other ViT backbones, in one line."""

from .apply import apply_lite3r, lite3r_disabled, remove_lite3r
from .calibrate import calibrate
from .checkpoint import load_lite3r, save_lite3r
from .config import Lite3RConfig
from .conversion import convert
from .errors import Lite3RError
from .hookspecs import hookimpl
from .report import describe
from .sites import AttentionSite, FusedQKV, PreNormBlock, Rope2D, Routed, SeparateQKV, TokenLayout, TokenSource

__version__ = "0.1.0"

__all__ = [
    "AttentionSite",
    "FusedQKV",
    "Lite3RConfig",
    "Lite3RError",
    "PreNormBlock",
    "Rope2D",
    "Routed",
    "SeparateQKV",
    "TokenLayout",
    "TokenSource",
    "__version__",
    "apply_lite3r",
    "calibrate",
    "convert",
    "describe",
    "hookimpl",
    "lite3r_disabled",
    "load_lite3r",
    "remove_lite3r",
    "save_lite3r",
]
