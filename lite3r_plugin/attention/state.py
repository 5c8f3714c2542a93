"""What the attention modules of one model share, and what each of them counts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..adapter.sites import AttentionSite
from ..config import Lite3RConfig, Precision
from ..tokens.cache import OrderCache
from ..tokens.tracker import LayoutTracker, Source
from ..wrapper import RewrittenMethod, RewrittenModule
from .masks import Masks
from .streams import Positions


@dataclass
class CallCounts:
    """Forward calls of a site outside `torch.compile`, by what ran, and the density of the last sparse one.

    Attributes:
        sparse: Calls that ran sparse attention.
        dense: Calls that ran dense attention, because that is faster at their length or nothing was to be dropped.
        host: Calls that ran dense in the host's own code, which asked for what has no sparse form.
        reason: Why the last of those did.
        disabled: Calls that ran the host's own forward, inside `lite3r_disabled`.
        density: The share of (query block, key block) pairs that were computed exactly, pinned ones included; in (0, 1].
            None before the first sparse call.
    """

    sparse: int = 0
    dense: int = 0
    host: int = 0
    reason: str | None = None
    disabled: int = 0
    density: float | None = None


@dataclass
class ModelState:
    """What the sites of one model share.

    Attributes:
        adapter: Name of the model adapter.
        config: The configuration: what was asked for, in the end.
        phase: What the Linears of the transformer blocks are now: in full precision, rounded to FP8 in training, or in FP8.
        skipped: Sites that the adapter named but that were not swapped, with the reason.
        routed: Sites whose q, k and v the host's own forward makes, although the adapter says how, with the reason.
        trackers: What the watched modules were given, by the source that the sites name.
        orders: The token orders of the model's layouts.
        positions: The coordinates of the tokens of a frame of a stream, which is given anew for each frame.
        masks: What the masks that sites were given turned out to be.
        sites: All sites that the adapter named.
        blocks: The transformer blocks around them, by name.
        warned: Reasons for which sites ran in the host's own code, of which a warning was given.
        notes: What `describe` is to say besides, such as why something runs in another way than asked, by what it is about.
        hosts: The attention modules that were taken the place of.
        rewrites: What exact rewrites have put in.
        rewritten: What they did, in words.
        not_rewritten: Exact rewrites that were left out, in words, with the reason.
        lora: What `lite3r_plugin.peft.add_lora` put around Linears: each has the Linear as its `base_layer`.
        fast: What lies over the forward of the model, where the whole of it runs in another way (`lite3r_plugin.runtime.fast`).
        planner: What plans the memory of its forwards, where there is a limit (`lite3r_plugin.runtime.memory`).
        changed: Modules whose own weights were trained, or had LoRA merged into them: they are no longer those of the host.
        adapted: Modules inside of LoRA of PEFT that `distill` trained, each with what tells whether its weight has changed since.
        model: What Lite3R was applied to.
    """

    adapter: str
    config: Lite3RConfig
    phase: Precision = "full"
    skipped: dict[str, str] = field(default_factory=dict)
    routed: dict[str, str] = field(default_factory=dict)
    trackers: dict[Source, LayoutTracker] = field(default_factory=dict)
    orders: OrderCache = field(default_factory=OrderCache)
    positions: Positions = field(default_factory=Positions)
    masks: Masks = field(default_factory=Masks)
    sites: tuple[AttentionSite, ...] = ()
    blocks: dict[str, nn.Module] = field(default_factory=dict)
    warned: set[str] = field(default_factory=set)
    notes: dict[str, list[str]] = field(default_factory=dict)
    hosts: tuple[nn.Module, ...] = ()
    rewrites: tuple[RewrittenModule | RewrittenMethod, ...] = ()
    rewritten: tuple[str, ...] = ()
    not_rewritten: dict[str, str] = field(default_factory=dict)
    lora: tuple[nn.Module, ...] = ()
    fast: RewrittenMethod | None = None
    planner: RewrittenMethod | None = None
    changed: tuple[nn.Module, ...] = ()
    adapted: tuple[tuple[nn.Module, Any], ...] = ()
    model: nn.Module | None = None
