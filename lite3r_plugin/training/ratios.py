"""Keep ratios for each site, chosen from a few unlabelled inputs by what each site costs the outputs.

Sites are unlike: on the testbed one of six does most of the harm. So each is run sparse by itself, at a few ratios, with all others dense,
and what that changes in the outputs is its damage at that ratio:

    damage(site, r) = mean over kinds of outputs of (error / error with all sites at the smallest ratio)^2

Damages are added up, and so are costs: the scores that a site computes at r. From all sites dense, steps to smaller ratios are taken in the
order of damage for what they save (those on the lower convex hull of each site, so that no later step of a site is better than an earlier
one). That gives one path of choices; a budget of cost says where to stop on it. How far a budget of error reaches is not added up,
but looked for on the path by running the model with all sites as chosen, on inputs that measured nothing.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter.outputs import ModelOutputs, OutputsFunction
from ..apply.lookup import look_up
from ..apply.profile import BUDGETS, Budget, KeepRatioProfile, Making, settings
from ..apply.ranks import is_sharded
from ..apply.swap import set_ratios
from ..attention.branch import branch_weight
from ..attention.inputs import AttentionInputs
from ..attention.module import KEPT_WHOLE, NO_SPARSE_FORM, SparseLinearAttention, Substitute
from ..config import AUTO, plain_name
from ..errors import AdapterError, ConfigError, InputError, WeightsError, shown
from ..ops.block_map import Allowed, density, masked_density
from ..ops.options import check_ratio, is_int, is_number
from ..scene.metrics import auc, pair_errors
from ..tokens.layout import Pinned
from ..wrapper import Changes, must_be_called
from .judge import Errors, Judge
from .outputs import OutputReader, Outputs, compare
from .reporting import Listener, Report, reporting
from .teacher import evaluated

MAX_REL_ERROR = 0.02
JUDGED, MOST_JUDGED = 8, 64
SMALLEST = 1 / 32
STEPS = 4
"""Ratios between two that are measured, which are a factor of 2 apart; damages in between are interpolated."""
RELATIVE = ("depth", "points", "rotation", "translation", "focal")
POSE_LOSS = "pose loss"
DEGREES = 30

Ratios = dict[str, float]
"""By the name of a site."""


@torch.no_grad()
def choose_keep_ratios(
    model: nn.Module,
    inputs: Iterable[Any],
    *,
    max_rel_error: float | None = None,
    max_pose_loss: float | None = None,
    mean_keep_ratio: float | None = None,
    outputs: OutputsFunction | None = None,
    judged: int = JUDGED,
    progress: bool | Listener = True,
) -> KeepRatioProfile:
    """Choose the keep ratio of every sparse site of `model` from a few inputs, and set it, in place.

    One budget is given; without any it is ``max_rel_error=0.02``. Within one of error, as little is computed as is found to keep it;
    within one of computation, outputs are as close to those with dense attention as is found. Where one ratio for all sites
    turns out to be better for the same computation, that is taken.

    Every second input measures the sites, one by one; on the others choices are checked as a whole. That takes five forwards of each
    measured input for each site, and about ten of each checked one. Whether sparse attention pays at their length is not asked.
    `calibrate` fits linear branches to the ratios that are there, so call it afterwards.

    An error or an interruption leaves the ratios as they were.

    Args:
        model: After `apply_lite3r`, with ``keep_ratio="auto"`` or any other, which is then chosen anew. It is evaluated, not trained,
            meanwhile.
        inputs: At least two inputs of the model, like its later inputs in kind and size: with the same number of views. As of `calibrate`;
            no labels are needed.
        max_rel_error: The most that outputs may differ from those with dense attention, on the mean of the checked inputs, each kind by
            itself: depth and focal lengths, mean |log ratio|; points, mean L1 norm of the difference of signed logarithms; rotations,
            mean Frobenius norm of the difference (0.02 is 0.8 degrees); translations, over the size of the scene. Where outputs are
            nothing of these, their relative error |y - y_dense| / |y_dense|.
        max_pose_loss: The most that AUC@30 of relative poses may be below 100 % with the cameras of dense attention for the truth. AUC@30
            against any truth cannot lose more, and as a rule it loses far less.
        mean_keep_ratio: As much is computed as with this keep ratio at all sites, at most. Of attention that is its time.
        outputs: From what the model returns to `lite3r_plugin.adapter.ModelOutputs`; by default what its adapter says.
        judged: How many of the first inputs to use, 2 to 64.
        progress: As of `calibrate`.

    Returns:
        The ratios, with how they came about; `describe` tells it too. Its `save` writes a file.

    Raises:
        ModelTypeError: `model` is no `torch.nn.Module`.
        ConfigError: no site is sparse, or one is disabled (`lite3r_disabled`); more than one budget is given, or one that is out of its
            range; nothing can be left out within it; or `judged` is out of its range.
        InputError: `inputs` is one input and no list of them, there are fewer than two, none of them reaches a sparse site with enough
            tokens, outputs are not finite, or cameras are wanted where none moves.
        AdapterError: what the model returns cannot be compared, or has no cameras although `max_pose_loss` is given.
        WeightsError: weights are on the meta device, and nothing brings them in for a call.
        NotAppliedError: `apply_lite3r` was not called, or `model` is a part of what it was called with.

    Examples:
        >>> model = apply_lite3r(model, keep_ratio="auto", block_q=16, block_k=16)
        >>> profile = choose_keep_ratios(model, inputs, mean_keep_ratio=0.3)  # a list of what the model takes
        >>> profile.save("ratios.json")
    """
    found = look_up(model)
    state = found.require_one_state("choose_keep_ratios")
    found.require_whole(state, "choose_keep_ratios")  # the configuration, which all sites share, holds the ratios of all
    first = {module: module.site.fqn for module in found.attention.values()}
    sites = {plain_name(fqn): m for m, fqn in first.items() if m.sparse and m.left in (None, KEPT_WHOLE)}
    if not sites:
        raise ConfigError("no site is sparse, so there is no keep ratio to choose")
    found.require_enabled("choose_keep_ratios")
    if any(p.is_meta for p in model.parameters()) and not any(map(must_be_called, model.modules())):
        raise WeightsError("choose_keep_ratios runs the model, which has weights on the meta device, without values: load them first")
    budget, value = check_budget(max_rel_error=max_rel_error, max_pose_loss=max_pose_loss, mean_keep_ratio=mean_keep_ratio)
    if not isinstance(inputs, Iterable) or isinstance(inputs, (Mapping, str, bytes)) or hasattr(inputs, "__array__"):
        raise InputError(
            f"ratios are chosen from a list or a generator of inputs of the model, got {type(inputs).__name__}: put an input x into a list"
        )
    if not is_int(judged) or not 2 <= judged <= MOST_JUDGED:
        raise ConfigError(f"judged is a number of inputs from 2 to {MOST_JUDGED}, got {shown(judged)}")
    reader = OutputReader.of(model, outputs)
    # Substitutes differ from run to run: a compiler would compile for each, and then leave the model uncompiled for good.
    uncompiled = torch.compiler.set_stance("force_eager")
    with Changes() as changes, reporting(progress) as report, evaluated(model), uncompiled:
        set_ratios(found, state, state.config.replace(keep_ratio=AUTO), changes)
        measured, checked = (Judge(model, sites, reader, judged) for _ in range(2))
        sizes = _Sizes(sites)
        with sizes.noting():
            for index, given in enumerate(report.over(_first(inputs, judged), "running dense")):
                (checked if index % 2 else measured).keep(index, given)
        if not len(measured) or not len(checked):
            raise InputError(
                f"ratios are chosen from at least two inputs with something in them, one to measure and one to check by, got "
                f"{len(measured) + len(checked)}"
            )
        dense = sizes.too_short()
        free = [fqn for fqn in sites if fqn not in dense]
        if not free:
            raise InputError(f"the inputs reach no site that would be sparse: {'; '.join(dict.fromkeys(dense.values()))}")
        costs = Costs(sizes, free)
        runs = _Runs(sites, sizes.branches, costs, budget, report, sharded=is_sharded(model))
        choice = _Choice(runs, measured, checked, costs, budget, value)
        damages = choice.measure()
        ratios, errors, uniform, uniform_errors = choice.make(damages)
        tokens = [n for fqn in free for call in sizes.calls[fqn] for n in call.tokens]
        making = Making(
            model=found.plain_model, adapter=state.adapter, budget=budget, value=value, inputs=len(measured), checked=len(checked),
            tokens=(min(tokens), max(tokens)), blocks=(state.config.block_q, state.config.block_k), settings=settings(state.config),
            dtype=sizes.dtype, density=costs.density(ratios), uniform=uniform, errors=errors, uniform_errors=uniform_errors,
            harm=_harm(damages), dense=dense,
        )  # fmt: skip
        profile = KeepRatioProfile(ratios | dict.fromkeys(dense, 1.0), making)
        set_ratios(found, state, state.config.replace(keep_ratio=profile), changes)
    return profile


def check_budget(**given: float | None) -> tuple[Budget, float]:
    """The one of `BUDGETS` that is given, and its value; by default `MAX_REL_ERROR`. Raises `ConfigError`."""
    there = {name: value for name, value in given.items() if value is not None} or {"max_rel_error": MAX_REL_ERROR}
    if len(there) > 1:
        raise ConfigError(f"one budget is kept at a time, got {' and '.join(there)}")
    name: Budget = next(name for name in BUDGETS if name in there)
    value = there[name]
    if name == "mean_keep_ratio":
        check_ratio(name, value)
        if value == 1:
            raise ConfigError("mean_keep_ratio=1 is dense attention everywhere, so there is nothing to choose")
    elif not is_number(value) or not 0 < value < (math.inf if name == "max_rel_error" else 100):
        what = "above 0" if name == "max_rel_error" else "of percentage points between 0 and 100"
        raise ConfigError(f"{name} is a number {what}, got {shown(value)}")
    return name, float(value)


def _first(inputs: Iterable[Any], count: int) -> Iterable[Any]:
    """The first `count` of `inputs`, with a length if they have one."""
    return list(itertools.islice(inputs, count)) if hasattr(inputs, "__len__") else itertools.islice(inputs, count)


@dataclass(frozen=True)
class _Call:
    """An attention of a site: what it computes depends on these."""

    width: int
    tokens: tuple[int, int]
    pinned: Pinned
    allowed: Allowed | None


class _Sizes:
    """The sizes of what `sites` see while they are noted.

    Attributes:
        calls: Of each site, one entry a call.
        branches: The sites whose linear branch does anything. Where hooks bring in weights, they are there during a call alone.
        dtype: In which the last was computed.
    """

    def __init__(self, sites: Mapping[str, SparseLinearAttention]) -> None:
        self._sites = sites
        self.calls: dict[str, list[_Call]] = {fqn: [] for fqn in sites}
        self.branches: set[str] = set()
        self.dtype = ""
        self._masked: set[str] = set()
        self._before = {fqn: site.calls.host for fqn, site in sites.items()}

    def noting(self) -> ExitStack:
        """A context in which calls are noted."""
        stack = ExitStack()
        for fqn, site in self._sites.items():
            stack.enter_context(site.observe(functools.partial(self._note, fqn)))
        return stack

    def _note(self, fqn: str, site: SparseLinearAttention, inputs: AttentionInputs, out: Tensor) -> None:
        mask = site.recognised(inputs)
        if inputs.mask is not None and mask is None:
            self._masked.add(fqn)
            return
        batch, heads, keys, dim = inputs.v.shape
        pinned = site.pinned_in(inputs)
        allowed = None if mask is None else site.allowed(mask, inputs.layout)
        if not self.calls[fqn] and _has_branch(site, inputs.v):
            self.branches.add(fqn)
        self.calls[fqn].append(_Call(batch * heads * dim, (inputs.q.shape[-2], keys), pinned, allowed))
        self.dtype = str(out.dtype).removeprefix("torch.")

    def too_short(self) -> dict[str, str]:
        """Why sites would run dense on all of these inputs, by the name of the site."""
        found = {}
        for fqn, calls in self.calls.items():
            below = self._sites[fqn].state.config.dense_below or 0
            if not calls:
                found[fqn] = self._why_not_seen(fqn)
            elif (most := max(call.tokens[1] for call in calls)) < below:
                found[fqn] = f"inputs had at most {most} tokens there, fewer than dense_below={below}"
        return found

    def _why_not_seen(self, fqn: str) -> str:
        site = self._sites[fqn]
        if fqn in self._masked:
            return NO_SPARSE_FORM
        if site.calls.host > self._before[fqn]:
            return f"it runs in the host's own code: {site.calls.reason}"
        return "no input reached it"

    def density(self, fqn: str, call: _Call, ratio: float) -> float:
        """The share of the scores of a call that is computed."""
        if ratio == 1:
            return 1.0
        config = self._sites[fqn].state.config
        if call.allowed is not None:
            return masked_density(call.allowed, ratio, *call.pinned, config.block_q, config.block_k)
        return density(*call.tokens, ratio, *call.pinned, config.block_q, config.block_k)


class Costs:
    """What the sites `names` compute, as shares of what all of them compute with dense attention."""

    def __init__(self, sizes: _Sizes, names: list[str]) -> None:
        self.names = names
        self._sizes = sizes
        self._whole = {fqn: [call.width * call.tokens[0] * call.tokens[1] for call in sizes.calls[fqn]] for fqn in names}
        self._total = sum(map(sum, self._whole.values()))
        self._known: dict[tuple[str, float], float] = {}

    def of(self, fqn: str, ratio: float) -> float:
        """Of one site."""
        if (fqn, ratio) not in self._known:
            calls = zip(self._sizes.calls[fqn], self._whole[fqn], strict=True)
            self._known[fqn, ratio] = sum(scores * self._sizes.density(fqn, call, ratio) for call, scores in calls) / self._total
        return self._known[fqn, ratio]

    def density(self, ratios: Mapping[str, float]) -> float:
        """Of all sites."""
        return math.fsum(self.of(fqn, ratios[fqn]) for fqn in self.names)

    def uniform(self, density: float) -> float:
        """The largest ratio of all sites, to one part in 4,096, with which they compute no more than `density`."""
        low, high = 1, 4096
        while low < high:
            middle = (low + high + 1) // 2
            if self.density(dict.fromkeys(self.names, middle / 4096)) <= density + 1e-12:
                low = middle
            else:
                high = middle - 1
        return low / 4096

    def largest(self, fqn: str, low: float, high: float, most: float) -> float:
        """The largest ratio of a site in [`low`, `high`], to one part in 256 of that, with which it costs at most `most`."""
        ratios = (low + (high - low) * i / 256 for i in range(256, 0, -1))
        return next((ratio for ratio in ratios if self.of(fqn, ratio) <= most + 1e-12), low)


@dataclass(frozen=True)
class Step:
    """From one ratio of a site to a smaller one: what is saved, and the damage that is done for it."""

    fqn: str
    ratio: float
    saved: float
    damage: float


def path(damages: Mapping[str, Mapping[float, float]], cost: Callable[[str, float], float]) -> list[Step]:
    """Steps from all sites dense to all at their smallest ratios, each the one that does least damage for what it saves.

    Args:
        damages: By site, the damage at each ratio below 1; between them it is interpolated over the logarithm of the ratio.
        cost: Of a site at a ratio.
    """
    steps = [step for fqn, known in damages.items() for step in _hull(fqn, _between(known), functools.partial(cost, fqn))]
    return sorted(steps, key=lambda step: step.damage / step.saved)  # stable, and those of a site are in order already


def _between(known: Mapping[float, float]) -> dict[float, float]:
    """Damages from ratio 1 down, `STEPS` for each factor of 2, never falling."""
    found, before, least = {1.0: 0.0}, (1.0, 0.0), 0.0
    for ratio in sorted(known, reverse=True):
        most = max(known[ratio], least)
        count = max(1, round(STEPS * math.log2(before[0] / ratio)))
        for i in range(1, count + 1):
            at = ratio if i == count else before[0] * (ratio / before[0]) ** (i / count)
            found[at] = before[1] + (most - before[1]) * i / count
        before, least = (ratio, most), most
    return found


def _hull(fqn: str, damages: Mapping[float, float], cost: Callable[[float], float]) -> list[Step]:
    """Steps along the lower convex hull of damage over what is saved."""
    at = [(ratio, cost(ratio), damage) for ratio, damage in damages.items()]
    hull = at[:1]
    for point in at[1:]:
        if point[1] >= hull[-1][1]:
            continue  # nothing saved: as many blocks
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-2], point):
            hull.pop()
        hull.append(point)
    return [Step(fqn, b[0], a[1] - b[1], b[2] - a[2]) for a, b in itertools.pairwise(hull)]


def _slope(a: tuple[float, float, float], b: tuple[float, float, float]) -> float:
    return (b[2] - a[2]) / (a[1] - b[1])


class _Runs:
    """Runs the model with ratios that are only tried: nothing is written into it."""

    def __init__(
        self, sites: Mapping[str, SparseLinearAttention], branches: Container[str], costs: Costs, budget: Budget, report: Report, *,
        sharded: bool,
    ) -> None:  # fmt: skip
        self._sites, self._branches, self._costs, self._budget, self.report, self._sharded = sites, branches, costs, budget, report, sharded

    def errors(self, judge: Judge, ratios: Mapping[str, float]) -> Errors:
        """How far outputs are from those with dense attention, by kind, on the mean of the inputs of `judge`; other sites are dense."""
        made: dict[str, Substitute] = {
            fqn: functools.partial(_at, ratio=ratios.get(fqn, 1.0), branch=fqn in self._branches) for fqn in self._sites
        }
        found: list[Errors] = []
        for mine, dense in judge.outputs(lambda index: made):
            found.append(self._compared(mine, dense))
            self.report.advance()
        errors = [{kind: math.fsum(error[kind] for error in found) / len(found) for kind in found[0]}]
        if self._sharded:  # all processes have to decide alike
            torch.distributed.broadcast_object_list(errors)
        if odd := [kind for kind, error in errors[0].items() if not math.isfinite(error)]:
            raise InputError(f"the error of {odd[0]} is not finite; look for NaN or infinity in the inputs, or use bfloat16 for float16")
        return errors[0]

    def _compared(self, mine: Outputs, dense: Outputs) -> Errors:
        if self._budget == "max_pose_loss":
            return {POSE_LOSS: _pose_loss(mine, dense)}
        losses = {name: loss.item() for name, loss in compare(mine, dense).items()}
        if known := {name: losses[name] for name in RELATIVE if name in losses}:
            return known
        return {"camera": losses["camera"]} if "camera" in losses else {"outputs": math.sqrt(losses["other"])}


def _pose_loss(mine: Outputs, dense: Outputs) -> float:
    cameras = [x.world_to_camera if isinstance(x, ModelOutputs) else None for x in (mine, dense)]
    if any(x is None for x in cameras):
        raise AdapterError(
            "max_pose_loss is about cameras, and the model returns none that are known; pass outputs=, a function from what it returns to "
            "ModelOutputs with world_to_camera, or give max_rel_error"
        )
    losses = []
    for scene in zip(*(x.float() for x in cameras if x is not None), strict=True):
        larger = pair_errors(*scene).larger if len(scene[0]) > 1 else torch.empty(0, device="cpu")
        if not len(larger):
            raise InputError("max_pose_loss compares the cameras of several views, and in an input none is away from another")
        losses.append(100 - auc(larger, DEGREES))
    return math.fsum(losses) / len(losses)


def _has_branch(site: SparseLinearAttention, like: Tensor) -> bool:
    """Whether its linear branch does anything."""
    if "proj_lin" not in site._modules:
        return False
    return bool(branch_weight(site.proj_lin, like, site.site).any())


def _at(site: SparseLinearAttention, inputs: AttentionInputs, *, ratio: float, branch: bool) -> Tensor:
    proj = site.projection(inputs.v) if branch else None
    if ratio == 1:
        return site.dense(inputs, proj if site.state.config.linear_branch == "all" else None)
    return site.sparse_linear(inputs, proj, ratio)


def _harm(damages: Mapping[str, Mapping[float, float]]) -> dict[str, float]:
    """The damage of each site at its smallest ratio, as a share of their sum."""
    last = {fqn: list(known.values())[-1] if known else 0.0 for fqn, known in damages.items()}
    total = math.fsum(last.values())
    return {fqn: damage / total if total else 0.0 for fqn, damage in last.items()}


class _Choice:
    """Measures the sites, and chooses."""

    def __init__(self, runs: _Runs, measured: Judge, checked: Judge, costs: Costs, budget: Budget, value: float) -> None:
        self._runs, self._measured, self._checked, self._costs = runs, measured, checked, costs
        self._budget, self._value = budget, value
        smallest = min(SMALLEST, value / 4) if budget == "mean_keep_ratio" else SMALLEST
        self._levels = [2.0**-i for i in range(1, math.ceil(-math.log2(smallest)) + 1)]

    def make(self, damages: Mapping[str, Mapping[float, float]]) -> tuple[Ratios, Errors, float, Errors]:
        """The ratios and their errors on the checked inputs, and the uniform ratio of the same cost with its errors."""
        steps = path(damages, self._costs.of)
        if self._budget == "mean_keep_ratio":
            self._runs.report.start("checking", 2 * len(self._checked))
            uniform, ratios = self._value, self._within(steps, self._costs.density(dict.fromkeys(self._costs.names, self._value)))
            errors = self._runs.errors(self._checked, ratios)
            same = dict.fromkeys(self._costs.names, uniform)
            uniform_errors = self._runs.errors(self._checked, same)
            if score(errors, uniform_errors) < 0:
                return ratios, errors, uniform, uniform_errors
            return same, uniform_errors, uniform, uniform_errors
        self._runs.report.start("checking", None)
        ratios, errors = self._furthest(steps)
        uniform = self._costs.uniform(self._costs.density(ratios))
        same = dict.fromkeys(self._costs.names, uniform)
        uniform_errors = self._runs.errors(self._checked, same)
        if score(errors, uniform_errors) >= 0 and self._keeps(uniform_errors):
            return same, uniform_errors, uniform, uniform_errors
        return ratios, errors, uniform, uniform_errors

    def measure(self) -> dict[str, dict[float, float]]:
        """The damage of each site, by ratio, from 1 down."""
        tried = {fqn: list(self._different(fqn)) for fqn in self._costs.names}
        self._runs.report.start("measuring sites", len(self._measured) * (1 + sum(map(len, tried.values()))))
        worst = self._runs.errors(self._measured, dict.fromkeys(self._costs.names, self._levels[-1]))
        kinds = [kind for kind, error in worst.items() if error > 0]

        def damage(fqn: str, ratio: float) -> float:
            errors = self._runs.errors(self._measured, {fqn: ratio})
            return math.fsum((errors[kind] / worst[kind]) ** 2 for kind in kinds) / max(len(kinds), 1)

        return {fqn: {ratio: damage(fqn, ratio) for ratio in ratios} for fqn, ratios in tried.items()}

    def _different(self, fqn: str) -> Iterator[float]:
        """The ratios of the levels that leave out more than the one before."""
        before = 1.0
        for ratio in self._levels:
            if self._costs.of(fqn, ratio) < self._costs.of(fqn, before):
                yield ratio
                before = ratio

    def _after(self, steps: Iterable[Step]) -> Ratios:
        """The ratios after these steps."""
        return dict.fromkeys(self._costs.names, 1.0) | {step.fqn: step.ratio for step in steps}

    def _within(self, steps: list[Step], most: float) -> Ratios:
        """The ratios where the path comes down to `most`; the last step is taken only as far as it must."""
        count = next((i for i in range(len(steps) + 1) if self._costs.density(self._after(steps[:i])) <= most + 1e-12), len(steps))
        ratios = self._after(steps[:count])
        if count:
            fqn, before = steps[count - 1].fqn, self._after(steps[: count - 1])
            rest = most - self._costs.density(ratios) + self._costs.of(fqn, ratios[fqn])
            ratios[fqn] = self._costs.largest(fqn, ratios[fqn], before[fqn], rest)
        return ratios

    def _furthest(self, steps: list[Step]) -> tuple[Ratios, Errors]:
        """The furthest place on the path whose errors keep the budget, looked for as if they grew along it."""
        low, high = 0, len(steps) + 1
        errors: Errors = {}
        mildest: Errors = {}
        while high - low > 1:
            middle = (low + high) // 2
            tried = self._runs.errors(self._checked, self._after(steps[:middle]))
            if self._keeps(tried):
                low, errors = middle, tried
            else:
                high, mildest = middle, tried
        if not low:
            told = ", ".join(f"{kind} {error:.3g}" for kind, error in mildest.items())
            raise ConfigError(
                f"nothing can be left out within {self._budget}={self._value:g}: the mildest step changes {told}; allow more, or leave "
                "Lite3R out"
            )
        return self._after(steps[:low]), errors

    def _keeps(self, errors: Errors) -> bool:
        return all(error <= self._value for error in errors.values())


def score(errors: Errors, others: Errors) -> float:
    """The mean logarithm of errors relative to others: each kind counts alike."""
    tiny = torch.finfo(torch.float32).tiny
    return math.fsum(math.log((errors[kind] + tiny) / (others[kind] + tiny)) for kind in errors) / len(errors)
