"""Runs a model on inputs and gathers sums of what its sparse sites see, from which the linear branch can be fitted."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter.outputs import tensors_of
from ..attention.inputs import AttentionInputs
from ..attention.module import SparseLinearAttention
from ..errors import InputError, Lite3RError, UnsupportedAttentionError, shown
from .draws import drawing

# The linear branch is read off as the change that a Proj of GAIN * identity makes, so that half precision rounds it
# relative to itself and not to the sparse output that it comes added to.
GAIN = 256.0
FLOOR = 1e-10


@dataclass
class AttentionSums:
    """Sums over tokens and heads of a site, FP64 on the CPU, with t = O_dense - O_sparse and l the linear branch before Proj.

    Attributes:
        gram: l l^T, ``[D, D]``.
        cross: t l^T, ``[D, D]``.
        missed: |t|^2, a scalar.
        dense: |O_dense|^2, a scalar.
        mean: l, ``[D]``: divided by `count`, its mean.
        count: The number of tokens and heads.
    """

    gram: Tensor
    cross: Tensor
    missed: Tensor
    dense: Tensor
    mean: Tensor
    count: int

    def plus(self, other: AttentionSums, sign: int = 1) -> AttentionSums:
        """The sums over the tokens of both, or with ``sign=-1`` over those of this one without those of the other."""
        return AttentionSums(*(a + sign * b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def ridge(self, strength: float) -> Tensor:
        """W ``[D, D]``, the weight of a Linear, that fits t best by W l with this ridge (see `lite3r_plugin.training.calibrate`)."""
        mean = self.mean / self.count
        power = self.gram.trace() / self.count
        # An l that is the same at all tokens has no spread beyond rounding; the floor keeps its system solvable.
        spread = torch.maximum(power - mean @ mean, FLOOR * power).clamp(min=1e-300) / len(mean)
        eye = torch.eye(len(mean), dtype=mean.dtype, device=mean.device)
        return torch.linalg.solve(self.gram / self.count + strength * spread * eye, self.cross.T / self.count).T

    def error(self, weight: Tensor) -> float:
        """Sum of |t - W l|^2 for the `weight` W ``[D, D]``, FP64."""
        return (self.missed - 2 * (weight * self.cross).sum() + ((weight @ self.gram) * weight).sum()).item()


@dataclass
class SumRecorder:
    """A substitute for the attention of a site (`SparseLinearAttention.substitute`) that returns its sparse part and adds up sums.

    Attributes:
        fold: The fold whose sums the next call adds to.
        folds: The sums so far, by fold.
    """

    fold: int = 0
    folds: dict[int, AttentionSums] = field(default_factory=dict)

    def __call__(self, site: SparseLinearAttention, inputs: AttentionInputs) -> Tensor:
        sparse = site.sparse_linear(inputs, None)
        probe = GAIN * torch.eye(sparse.shape[-1], device=sparse.device, dtype=torch.float32)
        branched, dense = site.sparse_linear(inputs, probe), site.dense(inputs)
        heads = zip(*(x.unbind(1) for x in (sparse, branched, dense)), strict=True)  # by themselves: FP64 takes memory
        first, *rest = (_sums(*(x.double().flatten(0, -2) for x in head)) for head in heads)
        gram, cross, gap, norm, mean = (functools.reduce(torch.add, parts).cpu() for parts in zip(first, *rest, strict=True))
        sums = AttentionSums(gram, cross, gap, norm, mean, sparse[..., 0].numel())
        self.folds[self.fold] = self.folds[self.fold].plus(sums) if self.fold in self.folds else sums
        return sparse


def _sums(sparse: Tensor, branched: Tensor, dense: Tensor) -> tuple[Tensor, ...]:
    """The sums of `AttentionSums` over tokens ``[N, D]``, all in FP64 on their device."""
    linear, missed = (branched - sparse) / GAIN, dense - sparse
    return linear.T @ linear, missed.T @ linear, missed.square().sum(), dense.square().sum(), linear.sum(0)


def run_on(model: nn.Module, given: Any) -> Any:
    """What `model` returns for one input: a mapping is passed by keyword, a tuple or list by position, anything else alone.

    Raises:
        InputError: the model cannot be called like this, or not with this kind of thing, such as an image with the label of its class;
            or it changes its input in place, so that it cannot be run on it again.
    """
    before = [(path, x, x._version) for path, x in tensors_of(given).items() if not x.is_inference()]
    args, kwargs = _arguments(given)
    try:
        output = model(*args, **kwargs)
    except Exception as error:
        taken_for_mask = isinstance(error, UnsupportedAttentionError) and _labels(args)
        other = isinstance(error, (Lite3RError, torch.OutOfMemoryError)) and not taken_for_mask
        if other or (reason := _no_input(model, args, kwargs)) is None:
            if not other and isinstance(given, list) and _are_views(given) and isinstance(error, (LookupError, TypeError, AttributeError)):
                raise InputError(
                    f"the {type(model).__name__} cannot be run on a list of {len(given)} mappings, each passed by position: a list of "
                    "views that is one argument belongs into a tuple, (views,)"
                ) from error
            raise
        if isinstance(given, list) and _are_views(given):
            reason += "; a list of views that is one argument belongs into a tuple, (views,)"
        raise InputError(reason) from error
    if changed := [path for path, x, version in before if x._version != version]:
        raise InputError(
            f"the model changes its input{f' {changed[0]}' if changed[0] else ''} in place, so that another run would see something else: "
            "let its forward begin with a copy"
        )
    return output


def _arguments(given: Any) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """By position, and by keyword."""
    if isinstance(given, Mapping):
        return (), given
    return (tuple(given), {}) if isinstance(given, (tuple, list)) else ((given,), {})


def _are_views(given: list[Any]) -> bool:
    """Whether this may be the list of views that some models take."""
    return len(given) > 1 and all(isinstance(x, Mapping) for x in given)


def _labels(args: tuple[Any, ...]) -> list[Any]:
    """What looks like labels of classes among arguments after the first."""
    return [x for x in args[1:] if isinstance(x, (bool, int, str)) or (isinstance(x, Tensor) and x.dim() < 2 and not x.is_floating_point())]


def _no_input(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
    """Why a model that failed cannot take these arguments; None where it is not they."""
    reason = None
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except (TypeError, ValueError) as error:
        reason = str(error)
    if reason is None and (labels := _labels(args)):
        reason = f"{shown(labels[0], 40)} was passed to it by position"
    if reason is None and not tensors_of((args, kwargs)):
        reason = "there is no tensor in it"
    if reason is None:
        return None
    given = [*map(_kind, args), *(f"{name}={_kind(value)}" for name, value in kwargs.items())]
    return (
        f"the {type(model).__name__} cannot be run on an item of the data, ({', '.join(given)}): {reason}. An item is what its forward "
        "takes: a tensor, whose first dimension is the batch; a mapping, passed by keyword; or a tuple, passed by position. Leave labels "
        "of classes out, [image[None] for image, label in data], or of a DataLoader with a collate_fn that stacks the images alone"
    )


def _kind(value: Any) -> str:
    return f"Tensor {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def record(
    model: nn.Module,
    sites: Mapping[str, SparseLinearAttention],
    inputs: Iterable[Any],
    folds: int,
    see: Callable[[int, Any, Any], None] = lambda index, given, output: None,
) -> tuple[dict[str, SumRecorder], int]:
    """Sums of what `sites` of `model` see of `inputs`, each input once, dealt out to `folds` folds in turn.

    Of each input `see` is told its number, it, and what the model, without linear branches, returned for it.

    Returns:
        The `SumRecorder` of each site, by name, and the number of inputs. A site that no input reached has no folds.
    """
    recorders = {fqn: SumRecorder() for fqn in sites}
    count = 0
    with contextlib.ExitStack() as stack:
        for fqn, site in sites.items():
            stack.enter_context(site.substitute(recorders[fqn]))
        for count, given in enumerate(inputs, 1):
            for recorder in recorders.values():
                recorder.fold = (count - 1) % folds
            with drawing(count - 1, next(model.parameters()).device):
                output = run_on(model, given)
            see(count - 1, given, output)
    return recorders, count
