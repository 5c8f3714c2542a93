"""What a model adapter is written with: descriptions of attention sites, hooks, the plugin manager, how models are built."""

from ..wrapper import RewrittenMethod, RewrittenModule, forward_parameters
from .hookspecs import hookimpl
from .layouts import LayoutFunction, TokenLayout, TokenSource, Views
from .models import ModelEntry
from .outputs import ModelOutputs, OutputsFunction
from .plugins import AdapterInfo, AdapterWarning, find_outputs, find_rewrites, find_sites, get_manager, list_adapters, model_entries
from .rewrites import ExactRewrite, Trial
from .sites import AttentionSite, FusedQKV, KeyValueCache, PreNormBlock, Projections, Rope2D, Routed, SeparateQKV
from .trials import like

__all__ = [
    "AdapterInfo",
    "AdapterWarning",
    "AttentionSite",
    "ExactRewrite",
    "FusedQKV",
    "KeyValueCache",
    "LayoutFunction",
    "ModelEntry",
    "ModelOutputs",
    "OutputsFunction",
    "PreNormBlock",
    "Projections",
    "RewrittenMethod",
    "RewrittenModule",
    "Rope2D",
    "Routed",
    "SeparateQKV",
    "TokenLayout",
    "TokenSource",
    "Trial",
    "Views",
    "find_outputs",
    "find_rewrites",
    "find_sites",
    "forward_parameters",
    "get_manager",
    "hookimpl",
    "like",
    "list_adapters",
    "model_entries",
]


def __dir__() -> list[str]:
    return sorted(__all__)  # what completion offers
