"""Closed-form calibration: the best `proj_lin` of every sparse site, from a few unlabelled inputs and without a backward pass.

At a site, with t = O_dense - O_sparse the part that sparse attention misses and l the linear branch before Proj, both of a
token and head, Proj is the ridge least-squares solution

    W = argmin  mean |t - W l|^2 + r s |W|^2,      s = mean variance of l over its dimensions

for which sums of D x D numbers suffice. l hardly varies over tokens, so a small ridge r fits noise: r is chosen by
cross-validation over the inputs, and Proj stays zero where the best r does not reduce the error of inputs it was not fitted to.
All sites are fitted in one pass on the sparse model's own activations. On the testbed, fitting layer by layer, each behind the
calibrated ones before it, gave errors within 1 % of these at every site, at as many times the cost as there are sites.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..apply.lookup import require_lite3r
from ..attention.branch import why_not_written, write_branch
from ..errors import ConfigError, InputError, WeightsError
from ..wrapper import Changes
from .record import AttentionSums, record

RIDGES = tuple(10.0 ** (i / 2) for i in range(-6, 7))
FOLDS = 8


@dataclass(frozen=True)
class SiteCalibration:
    """What calibration did to a site.

    Attributes:
        fqn: Its name.
        before, after: Relative error |O - O_dense| / |O_dense| with zero Proj, and as cross-validation expects it with the fitted
            one; equal where Proj stays zero.
        ridge: The chosen r; None where Proj stays zero.
    """

    fqn: str
    before: float
    after: float
    ridge: float | None


@dataclass(frozen=True)
class Calibration:
    """Result of `calibrate`, one entry a site; printable.

    Attributes:
        sites: In the order of the forward pass.
        inputs: Number of inputs.
    """

    sites: tuple[SiteCalibration, ...]
    inputs: int

    def __str__(self) -> str:
        fitted = sum(site.ridge is not None for site in self.sites)
        lines = [f"calibrated {fitted} of {len(self.sites)} sites on {self.inputs} inputs; relative error of attention:"]
        for site in self.sites:
            kept = "left at zero: no gain on held-out inputs" if site.ridge is None else f"ridge {site.ridge:.3g}"
            lines.append(f"  {site.fqn}  {site.before:.4f} -> {site.after:.4f}  ({kept})")
        return "\n".join(lines)


@torch.no_grad()
def calibrate(model: nn.Module, inputs: Iterable[Any]) -> Calibration:
    """Fit `proj_lin` of every sparse site of `model`, in place, so that its attention comes closest to dense attention.

    An error or an interruption leaves all of them as they were.

    Args:
        model: After `apply_lite3r`, with a linear branch, in eval mode. What `proj_lin` held before is replaced.
        inputs: At least two inputs of the model, as different as its later inputs will be: a tensor or a tuple is passed by
            position, a mapping by keyword. They are used once, so a generator will do. No labels are needed. Of a model that FSDP2
            shards, every process gives as many, and those of the first one count.

    Returns:
        The errors before and after, by site.

    Raises:
        ModelTypeError: `model` is no `torch.nn.Module`.
        ConfigError: the model has no linear branch, or no site that is sparse.
        InputError: `inputs` is one input and no list of them, there are fewer than two, none of them reaches a sparse site, they are
            empty, or activations are not finite.
        NotAppliedError: `apply_lite3r` was not called.
        WeightsError: a branch cannot be written: it has an adapter around it, or is offloaded, quantised or sharded by another than FSDP2.
    """
    sites = {fqn: site for fqn, site in require_lite3r(model).items() if site.sparse and site.keep_ratio < 1}
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
    recorders, count = record(model, sites, inputs, FOLDS)
    if count < 2:
        raise InputError(f"calibration needs at least two inputs, one to fit and one to judge by, got {count}")
    reached = {fqn: folds for fqn, recorder in recorders.items() if (folds := [sums for sums in recorder.folds.values() if sums.count])}
    if not reached:
        raise InputError("the inputs reach no sparse site, or are empty; give what the model's forward takes, outside lite3r_disabled")
    # All fits come before the first change.
    fits = {fqn: fit(fqn, folds) for fqn, folds in reached.items()}
    _shard_again(model)
    with Changes() as changes:
        for fqn, (weight, _) in fits.items():
            write_branch(sites[fqn].proj_lin, weight, changes)
    return Calibration(tuple(site for _, site in fits.values()), count)


def _shard_again(model: nn.Module) -> None:
    """Let FSDP2 drop the whole weights that it keeps after a forward: what is written to them does not last."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def fit(fqn: str, folds: list[AttentionSums]) -> tuple[Tensor, SiteCalibration]:
    """The best Proj of a site, ``[D, D]`` FP64, zero where it does not help, and its report.

    Args:
        fqn: Name of the site.
        folds: Its sums, by fold of inputs. With one fold there is nothing to judge a fit by, and Proj is zero.

    Raises:
        InputError: activations are not finite.
    """
    total = folds[0]
    for fold in folds[1:]:
        total = total.plus(fold)
    if not all(torch.isfinite(x).all() for x in (total.gram, total.cross, total.dense)):
        raise InputError(f"activations at {fqn} are not finite; look for NaN or infinity in the inputs, or use bfloat16 for float16")

    def relative(error: float) -> float:
        return math.sqrt(max(error, 0.0) / max(total.dense.item(), torch.finfo(torch.float64).tiny))

    before = relative(total.missed.item())
    nothing = torch.zeros_like(total.gram)
    if len(folds) < 2:  # this site is only reached by some of the inputs: nothing to judge a fit by
        return nothing, SiteCalibration(fqn, before, before, None)
    rest = [total.plus(fold, -1) for fold in folds]
    errors = [sum(fold.error(other.ridge(r)) for fold, other in zip(folds, rest, strict=True)) for r in RIDGES]
    best = min(range(len(RIDGES)), key=errors.__getitem__)
    if not errors[best] < total.missed.item():
        return nothing, SiteCalibration(fqn, before, before, None)
    return total.ridge(RIDGES[best]), SiteCalibration(fqn, before, relative(errors[best]), RIDGES[best])
