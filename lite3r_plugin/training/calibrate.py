"""Closed-form calibration: the best `proj_lin` of every sparse site, from a few unlabelled inputs and without a backward pass.

At a site, with t = O_dense - O_sparse the part that sparse attention misses and l the linear branch before Proj, both of a
token and head, Proj is the ridge least-squares solution

    W = argmin  mean |t - W l|^2 + r s |W|^2,      s = mean variance of l over its dimensions

for which sums of D x D numbers suffice. l hardly varies over tokens, so a small ridge r fits noise: r is chosen by
cross-validation over the inputs, and Proj stays zero where the best r does not reduce the error of inputs it was not fitted to.
All sites are fitted in one pass on the sparse model's own activations. On the testbed, fitting layer by layer, each behind the
calibrated ones before it, gave errors within 1 % of these at every site, at as many times the cost as there are sites.

Less error of attention is not always less error of what the model returns. So the fits are judged by that: each of the first inputs is
run with fits of all inputs but those of its fold, whole, halved, and left out in thirds of the depth, and compared with dense attention.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter.outputs import OutputsFunction
from ..apply.lookup import look_up
from ..apply.ranks import is_sharded
from ..attention.branch import branch_weight, why_not_written, write_branch
from ..attention.module import SparseLinearAttention
from ..config import plain_name
from ..errors import ConfigError, InputError, WeightsError, plural, shown
from ..ops.options import is_int
from ..wrapper import Changes
from .judge import Errors, Judge, Weights
from .outputs import OutputReader
from .record import AttentionSums, record
from .reporting import Listener, Report, reporting
from .teacher import evaluated

RIDGES = tuple(10.0 ** (i / 2) for i in range(-6, 7))
FOLDS = 8
SHARES = (1.0, 0.5, 0.0)
PARTS = 3
FEW = 4
KEPT = None
"""In place of a share of the fit: what the site came with."""


@dataclass(frozen=True)
class SiteCalibration:
    """What calibration did to a site.

    Attributes:
        fqn: Its name.
        before: Relative error of its attention, |O - O_dense| / |O_dense|, with zero Proj.
        after: The same with the Proj that it has now, as cross-validation expects it.
        ridge: The chosen r; None where no fit helps its attention.
        share: What Proj is now as a share of the fit: 0, 0.5 or 1; None where it is what the site came with.
    """

    fqn: str
    before: float
    after: float
    ridge: float | None
    share: float | None


@dataclass(frozen=True)
class Calibration:
    """Result of `calibrate`, one entry a site; printable.

    Attributes:
        sites: In the order of the forward pass.
        inputs: Number of inputs.
        judged: How many of them the outputs were compared on.
        before: Differences of the model's outputs from those with dense attention, by kind (``depth``: mean of |log ratio|; ``points``;
            ``cameras``; or ``outputs``: relative squared error), as the model came.
        after: The same with what it has now, each input with fits that have not seen it.
    """

    sites: tuple[SiteCalibration, ...]
    inputs: int
    judged: int
    before: Errors
    after: Errors

    def __str__(self) -> str:
        fitted = sum(bool(site.share) and site.ridge is not None for site in self.sites)
        few = f"; {plural(self.judged, 'is', 'are')} few to judge by, give {FEW} or more" if self.judged < FEW else ""
        lines = [f"calibrated {fitted} of {plural(len(self.sites), 'site')} on {plural(self.inputs, 'input')}{few}"]
        if self.after == self.before:
            lines.append("left as it came: nothing brought the outputs of held-out inputs closer to those with dense attention")
        else:
            lines.append(f"outputs against dense attention, on {plural(self.judged, 'input')}, each held out in turn:")
            lines += [f"  {kind}  {before:.4g} -> {self.after[kind]:.4g}" for kind, before in self.before.items()]
        lines.append("relative error of attention:")
        for site in self.sites:
            lines.append(f"  {plain_name(site.fqn)}  {site.before:.4f} -> {site.after:.4f}  ({_what(site)})")
        return "\n".join(lines)


def _what(site: SiteCalibration) -> str:
    if site.share is None:
        return "left as it came"
    if site.ridge is None:
        return "zero: no gain on held-out inputs"
    if not site.share:
        return "zero: the outputs are better so"
    return f"ridge {site.ridge:.3g}" + ("" if site.share == 1 else f", times {site.share:g}")


@torch.no_grad()
def calibrate(
    model: nn.Module,
    inputs: Iterable[Any],
    *,
    outputs: OutputsFunction | None = None,
    judged: int = FOLDS,
    progress: bool | Listener = True,
) -> Calibration:
    """Fit `proj_lin` of every sparse site of `model`, in place, so that it comes closest to dense attention.

    Each site is fitted to its own attention. How much of the fits is taken, and where, is decided by the model's outputs on inputs that
    a fit has not seen: no kind of them (depth, points, cameras) may be further from those with dense attention than the model came with,
    or than with no branch at all; else it keeps what it came with.

    An error or an interruption leaves all of them as they were.

    Args:
        model: After `apply_lite3r`, with a linear branch. It is evaluated, not trained, meanwhile.
        inputs: At least two inputs of the model, better eight, as different as its later inputs will be: a tensor or a tuple is passed by
            position, a mapping by keyword. A generator will do: each is fitted to once, and the first `judged` are kept. No
            labels are needed. Of a model that FSDP2 shards, every process gives as many, and those of the first one count.
        outputs: From what the model returns to `lite3r_plugin.adapter.ModelOutputs`; by default what its adapter says, and where it says
            nothing, all floating-point tensors of the output count alike.
        judged: How many of the first inputs to judge by, at most 8. On each of them the model runs at most a dozen times more.
        progress: A bar on standard error, or lines now and then if that is no terminal; or nothing; or a function of what is done, how
            often it was done, and how often it will be, None where that is not known.

    Returns:
        The errors before and after, of the outputs and by site.

    Raises:
        ModelTypeError: `model` is no `torch.nn.Module`.
        ConfigError: the model has no linear branch, or no site that is sparse, or these wait for their keep ratios; or `judged` is no
            number from 1 to 8.
        InputError: `inputs` is one input and no list of them, there are fewer than two, none of them reaches a sparse site, they are
            empty, or activations are not finite.
        AdapterError: what the model returns cannot be compared.
        NotAppliedError: `apply_lite3r` was not called.
        WeightsError: a branch cannot be written: it has an adapter around it, or is offloaded, quantised or sharded by another than FSDP2.

    Examples:
        >>> model = apply_lite3r(model, keep_ratio=0.25)
        >>> result = calibrate(model, inputs)  # a list of what the model takes
        >>> result.inputs
        2
    """
    found = look_up(model)
    attention = found.require_applied()
    found.require_ratios("calibrate")
    sites = {fqn: site for fqn, site in attention.items() if site.sparse and site.keep_ratio < 1}
    if not sites:
        raise ConfigError("no site is sparse (keep_ratio is 1), so there is nothing to calibrate")
    sites = {fqn: site for fqn, site in sites.items() if site.state.config.linear_branch != "none"}  # parts may differ
    if not sites:
        raise ConfigError("calibration fits the linear branch, and linear_branch is 'none'; apply_lite3r(model, linear_branch='all')")
    for fqn, site in sites.items():
        if reason := why_not_written(site.proj_lin):
            raise WeightsError(f"calibration cannot fit {fqn}.proj_lin: it {reason}")
    if not isinstance(inputs, Iterable) or isinstance(inputs, (Mapping, str, bytes)) or hasattr(inputs, "__array__"):
        raise InputError(
            f"calibration takes a list or a generator of inputs of the model, got {type(inputs).__name__}: put an input x into a list, [x]"
        )
    if not is_int(judged) or not 1 <= judged <= FOLDS:
        raise ConfigError(f"judged is a number of inputs from 1 to {FOLDS}, got {shown(judged)}")
    judge = Judge(model, sites, OutputReader.of(model, outputs), judged)
    with reporting(progress) as report, evaluated(model):
        recorders, count = record(model, sites, report.over(inputs, "fitting"), FOLDS, judge.see)
        if count < 2:
            raise InputError(f"calibration needs at least two inputs, one to fit and one to judge by, got {count}")
        reached = {fqn: folds for fqn, recorder in recorders.items() if (folds := {i: f for i, f in recorder.folds.items() if f.count})}
        if not reached:
            if reasons := sorted({site.calls.reason for site in sites.values() if site.calls.host and site.calls.reason}):
                raise InputError(f"the sparse sites ran in the host's own code, where there is nothing to fit: {'; '.join(reasons)}")
            raise InputError("the inputs reach no sparse site, or are empty; give what the model's forward takes, outside lite3r_disabled")
        fits = {fqn: fit(fqn, folds) for fqn, folds in reached.items()}
        came = {fqn: _weight(sites[fqn]) for fqn in reached}
        scopes = {fqn: sites[fqn].site.scope for fqn in reached}
        choice = _Choice(judge, fits, scopes, report, came_with_any=any(x.any() for x in came.values()), sharded=is_sharded(model))
        shares, before, after = choice.make()
    # Everything comes before the first change, so an error leaves the model as it was.
    _shard_again(model)
    with Changes() as changes:
        for fqn, share in shares.items():
            if share is not None:
                write_branch(sites[fqn].proj_lin, share * fits[fqn].weight, changes)
    entries = (fits[fqn].report(share, came[fqn]) for fqn, share in shares.items())
    return Calibration(tuple(entries), count, len(judge), before, after)


def _weight(site: SparseLinearAttention) -> Tensor:
    """What a site came with, ``[D, D]`` FP64 on the CPU."""
    branch = site.proj_lin
    return branch_weight(branch, branch.weight, site.site).detach().to("cpu", torch.float64)


def _shard_again(model: nn.Module) -> None:
    """Let FSDP2 drop the whole weights that it keeps after a forward: what is written to them does not last."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@dataclass(frozen=True)
class Fit:
    """The fit of a site.

    Attributes:
        fqn: Its name.
        ridge: The chosen r; None where none helps.
        weight: The best Proj, ``[D, D]`` FP64; zero where none helps.
        total: The sums of all its inputs.
        folds: By fold, its sums, and the fit without it.
    """

    fqn: str
    ridge: float | None
    weight: Tensor
    total: AttentionSums
    folds: dict[int, tuple[AttentionSums, Tensor]]

    def without(self, fold: int) -> Tensor:
        """The fit to all inputs but those of `fold`."""
        return self.folds[fold][1] if fold in self.folds else self.weight

    def report(self, share: float | None, came: Tensor) -> SiteCalibration:
        """What it comes to if Proj is this share of the fit, or `came` ``[D, D]``, what it was before."""
        if share is None:
            after = self.total.error(came)
        else:
            after = sum(fold.error(share * weight) for fold, weight in self.folds.values())
        return SiteCalibration(self.fqn, self._relative(self.total.missed.item()), self._relative(after), self.ridge, share)

    def _relative(self, error: float) -> float:
        return math.sqrt(max(error, 0.0) / max(self.total.dense.item(), torch.finfo(torch.float64).tiny))


def fit(fqn: str, folds: Mapping[int, AttentionSums]) -> Fit:
    """The best Proj of a site, zero where it does not help attention.

    Args:
        fqn: Name of the site.
        folds: Its sums, by fold of inputs. With one fold there is nothing to judge a fit by, and Proj is zero.

    Raises:
        InputError: activations are not finite.
    """
    total = functools.reduce(AttentionSums.plus, folds.values())
    if not all(torch.isfinite(x).all() for x in (total.gram, total.cross, total.dense)):
        raise InputError(f"activations at {fqn} are not finite; look for NaN or infinity in the inputs, or use bfloat16 for float16")
    nothing = torch.zeros_like(total.gram)
    zero = Fit(fqn, None, nothing, total, {i: (fold, nothing) for i, fold in folds.items()})
    if len(folds) < 2:  # this site is only reached by some of the inputs: nothing to judge a fit by
        return zero
    rest = {i: total.plus(fold, -1) for i, fold in folds.items()}
    errors = [sum(fold.error(rest[i].ridge(r)) for i, fold in folds.items()) for r in RIDGES]
    best = min(range(len(RIDGES)), key=errors.__getitem__)
    if not errors[best] < total.missed.item():
        return zero
    ridge = RIDGES[best]
    return Fit(fqn, ridge, total.ridge(ridge), total, {i: (fold, rest[i].ridge(ridge)) for i, fold in folds.items()})


class _Choice:
    """Decides by the model's outputs which share of its fit each site gets.

    First the same share is tried everywhere, then others in one part of the model's depth after the other. What was judged by fits that
    have not seen an input is run once more as it will be, and has to be better still, all kinds of outputs taken together.
    """

    def __init__(
        self, judge: Judge, fits: Mapping[str, Fit], scopes: Mapping[str, str], report: Report, *, came_with_any: bool, sharded: bool
    ) -> None:
        self._judge, self._fits, self._report, self._sharded = judge, fits, report, sharded
        fitted = {fqn: scopes[fqn] for fqn, fit in fits.items() if fit.ridge is not None}
        self._parts = _parts(fitted)
        self._shares: list[float | None] = [*(SHARES if fitted else ()), *([KEPT] if came_with_any else ())]
        self._came_with_any = came_with_any

    def make(self) -> tuple[dict[str, float | None], Errors, Errors]:
        """The share of each site, and the errors of the outputs before and after."""
        if not len(self._judge):
            raise InputError("the first inputs, by which to judge, are empty, so there is nothing to compare: put others first")
        parts = self._parts if len(self._parts) > 1 else []
        self._report.start("judging by outputs", len(self._judge) * (len(self._shares) + len(parts) * max(len(self._shares) - 1, 0)))
        zero = self._agreed(self._judge.without_branch())
        came = self._errors(dict.fromkeys(self._fits, KEPT)) if self._came_with_any else zero
        known = {0.0: zero, KEPT: came}
        tried = {
            share: known[share] if share in known else self._errors(dict.fromkeys(self._fits, share)) for share in self._shares
        } | known
        most = {kind: min(came[kind], zero[kind]) for kind in came}
        allowed = [share for share in tried if _within(tried[share], most)]
        first = min(allowed, key=lambda share: _score(tried[share], came), default=KEPT)
        best, found = dict.fromkeys(self._fits, first), tried[first]
        for part in parts:
            for share in [share for share in self._shares if share != best[part[0]]]:
                trial = best | dict.fromkeys(part, share)
                errors = self._errors(trial)
                if _within(errors, most) and _score(errors, came) < _score(found, came):
                    best, found = trial, errors
        if found is came or not _score(self._errors(best, whole=True), came) < 0:
            return dict.fromkeys(self._fits, KEPT), came, came
        return best, came, found

    def _errors(self, shares: Mapping[str, float | None], whole: bool = False) -> Errors:
        def weights(index: int) -> Weights:
            tried: dict[str, Tensor | None] = {}
            for fqn, share in shares.items():
                fit = self._fits[fqn]
                if share is not None:
                    weight = fit.weight if whole else fit.without(index % FOLDS)
                    tried[fqn] = share * weight if share and fit.ridge is not None else None
            return tried

        return self._agreed(self._judge.errors(weights, self._report.advance))

    def _agreed(self, errors: Errors) -> Errors:
        """`errors` of the first process: all have to decide alike."""
        if not self._sharded:
            return errors
        agreed = [errors]
        torch.distributed.broadcast_object_list(agreed)
        return agreed[0]


def _parts(scopes: Mapping[str, str]) -> list[list[str]]:
    """Sites by name in thirds of the depth, of each scope by itself."""
    parts = []
    for scope in dict.fromkeys(scopes.values()):
        names = [fqn for fqn in scopes if scopes[fqn] == scope]
        count = min(PARTS, len(names))
        parts += [names[i * len(names) // count : (i + 1) * len(names) // count] for i in range(count)]
    return parts


def _within(errors: Errors, most: Errors) -> bool:
    """Whether no error is larger than it may be at `most`."""
    return all(errors[kind] <= most[kind] for kind in most)


def _score(errors: Errors, came: Errors) -> float:
    """The mean logarithm of errors relative to what the model came with: each kind counts alike."""
    tiny = torch.finfo(torch.float32).tiny
    return math.fsum(math.log((errors[kind] + tiny) / (came[kind] + tiny)) for kind in came)
