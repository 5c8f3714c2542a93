"""Whether an attention module does what its projections say: tried before it is replaced, since what a fork does shows in no name."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from ..adapter.sites import AttentionSite
from ..adapter.trials import RandomCopies, require_equal, structure, trial
from ..config import Lite3RConfig
from ..errors import AdapterError, short
from .module import SparseLinearAttention
from .state import ModelState
from .styles.projected import ProjectedStyle
from .styles.registry import style_of

BATCH, TOKENS, KEYS = 2, 5, 7
_DENSE = Lite3RConfig(keep_ratio=1.0, linear_branch="none", attention_backend="naive")


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a trial found.

    Attributes:
        refused: Why the host's own forward must make q, k and v; None where the site does what it does.
        attention_calls: How often the host's forward calls `scaled_dot_product_attention`; None where it could not be run.
    """

    refused: str | None
    attention_calls: int | None


class Trials:
    """Compares sites with the forwards of their hosts, once for those that are alike in all but the values of parameters."""

    def __init__(self) -> None:
        self._copies = RandomCopies()
        self._verdicts: dict[Hashable, Verdict] = {}

    def of(self, site: AttentionSite, host: nn.Module) -> Verdict:
        """What the trial of `site` found, whose module is `host`. Nothing in the host changes."""
        style = style_of(site, host)
        if not isinstance(style, ProjectedStyle):
            return Verdict(None, None)
        names = (*style.input_linears, style.spec.out)
        linears = {linear: linear for linear in map(host.get_submodule, names) if _has_sizes(linear)}
        sizes = tuple((linear.in_features, linear.out_features, linear.bias is None) for linear in linears)
        key = (structure(host, linears), sizes, site.projections, site.head_dim)
        if key not in self._verdicts:
            try:
                with trial():
                    copied = self._copies.of(host, self._copies.linears(linears))
                    self._verdicts[key] = self._try(site, style, copied)
            except AdapterError as error:
                self._verdicts[key] = Verdict(str(error), None)
        return self._verdicts[key]

    def _try(self, site: AttentionSite, style: ProjectedStyle, host: nn.Module) -> Verdict:
        ours = SparseLinearAttention(host, dataclasses.replace(site, tokens=None, block=None), ModelState("", _DENSE), sparse=True)
        first: Any = host.get_submodule(next(iter(style.input_linears)))
        width = getattr(first, "in_features", math.prod(style.shape))
        failed, calls = "", None
        for series in self._calls(style, host):
            pasts: tuple[Any, Any] = None, None
            for given in series:
                x = self._copies.tokens(BATCH, TOKENS, width)
                of_host, of_ours = (given if past is None or style.cache is None else given | {style.cache.past: past} for past in pasts)
                with _Counted() as counted:
                    try:
                        expected = host.forward(x.clone(), **of_host)
                    except Exception as error:  # whatever a fork's own code raises
                        failed = failed or f"its forward cannot be tried ({short(error)})"
                        break
                calls = counted.calls
                try:
                    found = ours(x, **of_ours)
                    require_equal(style.compared(expected), style.compared(found), "the host's own forward")
                except AdapterError as error:
                    return Verdict(str(error), calls)
                except Exception as error:
                    return Verdict(f"it cannot take the place of the host's own forward ({short(error)})", calls)
                if len(series) > 1:
                    pasts = expected[1], found[1]
        return Verdict(failed if calls is None else None, calls)

    def _calls(self, style: ProjectedStyle, host: nn.Module) -> Iterator[tuple[dict[str, Any], ...]]:
        """Arguments besides the hidden states to try the forward with, call by call; in a series a call goes on with the cache."""
        names = style.names
        keys: dict[str, Any] = {}
        for linear, part in zip(list(style.input_linears)[1:], ("key", "value"), strict=False):
            if part in names:
                keys[names[part]] = self._copies.tokens(BATCH, KEYS, getattr(host.get_submodule(linear), "in_features", 1))
        positions = {
            names[part]: self._copies.positions(BATCH, tokens, 2)
            for part, tokens in (("positions", TOKENS), ("key_positions", KEYS))
            if part in names
        }
        yield (keys | positions,)
        if positions:
            yield (keys | dict.fromkeys(positions) if keys else keys,)
        if "mask" in names:
            least = torch.finfo(torch.float32).min
            yield (positions | {names["mask"]: torch.full((TOKENS, TOKENS), least, device="cpu").triu(1)},)
        if (cache := style.cache) is not None:
            begin: dict[str, Any] = {cache.past: [None, None]} if cache.wanted is None else {cache.wanted: True}
            others = {name: self._copies.positions(BATCH, TOKENS, 2) for name in positions}
            yield begin | positions, begin | others, begin | others


def _has_sizes(module: Any) -> bool:
    return all(hasattr(module, name) for name in ("in_features", "out_features", "bias"))


class _Counted(TorchFunctionMode):
    """Counts the calls of `scaled_dot_product_attention`."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += func is F.scaled_dot_product_attention
        return func(*args, **(kwargs or {}))
