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
from ..attention.module import SparseLinearAttention
from ..attention.styles.projected import Heads
from ..errors import ConfigError, InputError

RIDGES = tuple(10.0 ** (i / 2) for i in range(-6, 7))
FOLDS = 8
# The linear branch is read off as the change that a Proj of GAIN * identity makes, so that half precision rounds it
# relative to itself and not to the sparse output that it comes added to.
GAIN = 256.0
FLOOR = 1e-10


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

    Args:
        model: After `apply_lite3r`, with a linear branch, in eval mode. What `proj_lin` held before is replaced.
        inputs: At least two inputs of the model, as different as its later inputs will be: a tensor or a tuple is passed by
            position, a mapping by keyword. They are used once, so a generator will do. No labels are needed.

    Returns:
        The errors before and after, by site.

    Raises:
        ModelTypeError: `model` is no `torch.nn.Module`.
        ConfigError: the model has no linear branch, or no site that is sparse.
        InputError: there are fewer than two inputs, none of them reaches a sparse site, or activations are not finite.
        NotAppliedError: `apply_lite3r` was not called.
    """
    sites = {fqn: site for fqn, site in require_lite3r(model).items() if site.sparse and site.keep_ratio < 1}
    if not sites:
        raise ConfigError("no site is sparse (keep_ratio is 1), so there is nothing to calibrate")
    sites = {fqn: site for fqn, site in sites.items() if site.state.config.linear_branch != "none"}  # parts may differ
    if not sites:
        raise ConfigError("calibration fits the linear branch, and linear_branch is 'none'; apply_lite3r(model, linear_branch='all')")
    observers = {fqn: _Observer(site.site.head_dim) for fqn, site in sites.items()}
    count = 0
    try:
        for fqn, site in sites.items():
            site.observer = observers[fqn]
        for count, given in enumerate(inputs, 1):
            for observer in observers.values():
                observer.fold = (count - 1) % FOLDS
            _run(model, given)
    finally:
        for site in sites.values():
            site.observer = None
    if count < 2:
        raise InputError(f"calibration needs at least two inputs, one to fit and one to judge by, got {count}")
    reached = {fqn: observer for fqn, observer in observers.items() if observer.folds}
    if not reached:
        raise InputError("the inputs reach no sparse site; give what the model's forward takes, outside lite3r_disabled")
    # All fits come before the first change, so an error leaves the model as it was.
    fits = {fqn: _fit(fqn, observer) for fqn, observer in reached.items()}
    for fqn, (weight, _) in fits.items():
        sites[fqn].proj_lin.weight.copy_(weight)
    return Calibration(tuple(site for _, site in fits.values()), count)


@dataclass
class _Sums:
    """Sums over tokens and heads, FP64: l l^T ``[D, D]``, t l^T ``[D, D]``, |t|^2, |O_dense|^2, l ``[D]``, and their number."""

    gram: Tensor
    cross: Tensor
    missed: Tensor
    dense: Tensor
    mean: Tensor
    count: int

    def plus(self, other: _Sums, sign: int = 1) -> _Sums:
        return _Sums(*(a + sign * b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def ridge(self, strength: float) -> Tensor:
        """W ``[D, D]``, the weight of a Linear."""
        mean = self.mean / self.count
        power = self.gram.trace() / self.count
        # An l that is the same at all tokens has no spread beyond rounding; the floor keeps its system solvable.
        spread = torch.maximum(power - mean @ mean, FLOOR * power).clamp(min=1e-300) / len(mean)
        eye = torch.eye(len(mean), dtype=torch.float64)
        return torch.linalg.solve(self.gram / self.count + strength * spread * eye, self.cross.T / self.count).T

    def error(self, weight: Tensor) -> float:
        """Sum of |t - W l|^2."""
        return (self.missed - 2 * (weight * self.cross).sum() + ((weight @ self.gram) * weight).sum()).item()


class _Observer:
    """Stands in for a site's attention: returns its sparse part and adds to the sums of the current fold."""

    def __init__(self, head_dim: int) -> None:
        self.fold = 0
        self.folds: dict[int, _Sums] = {}
        self.probe = GAIN * torch.eye(head_dim)

    def __call__(self, site: SparseLinearAttention, heads: Heads) -> Tensor:
        sparse = site.sparse_linear(heads, None)
        probe = self.probe.to(sparse.device, site.proj_lin.weight.dtype)
        linear = (site.sparse_linear(heads, probe).double() - sparse.double()).flatten(0, -2) / GAIN
        dense = site.dense(heads).double().flatten(0, -2)
        missed = dense - sparse.double().flatten(0, -2)
        parts = (linear.T @ linear, missed.T @ linear, missed.square().sum(), dense.square().sum(), linear.sum(0))
        gram, cross, gap, norm, mean = (part.cpu() for part in parts)
        sums = _Sums(gram, cross, gap, norm, mean, len(linear))
        self.folds[self.fold] = self.folds[self.fold].plus(sums) if self.fold in self.folds else sums
        return sparse


def _run(model: nn.Module, given: Any) -> None:
    if isinstance(given, Mapping):
        model(**given)
    else:
        model(*given) if isinstance(given, (tuple, list)) else model(given)


def _fit(fqn: str, observer: _Observer) -> tuple[Tensor, SiteCalibration]:
    folds = list(observer.folds.values())
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
