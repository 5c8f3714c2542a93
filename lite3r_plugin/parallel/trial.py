"""What lets views of a model meet besides the attention that its adapter describes, found by running it on a few small images.

While it is tried, attention over views gives each token its own value, so that no view should know of another. Then

    results of a view must not change with what the others show      (a mean over views, a view that is chosen by what it shows)
    equal views give equal results, wherever they are and however    (a number of views, a position in time)
    many there are, but for the first one, the reference

and if the first one gives others, it is the reference, for which processes without it have a stand-in.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import Lite3RError, ParallelError, short
from ..runtime.values import exchanged, tensors_in
from .spread import along_views, dim_of_views

CLOSE, ROUGHLY = 1e-3, 5e-2  # of the largest value, in FP32 and in half precision
SEEN = {"first": (0, 1, 2, 3), "others": (0, 4, 2, 5), "ends": (4, 1, 5, 3), "turned": (1, 0, 2, 3), "alike": (1, 1, 1, 1, 1)}
"""What the views of each run show."""
ADVICE = (
    "name the module in which they meet, if it is a small one, by parallelize_views(model, gather=(name,)), and choose the reference view "
    'by its place (Depth Anything 3: model(images, ref_view_strategy="first"))'
)


@dataclass(frozen=True)
class Verdict:
    """What was found.

    Attributes:
        reference: Whether the model takes the first view for the reference.
        common: Which tensors of what it returns, by their place, are not along views.
    """

    reference: bool
    common: frozenset[int]


def try_views(
    run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], images: Tensor, patches: Sequence[tuple[int, int]], rough: bool
) -> Verdict:  # fmt: skip
    """Try a model.

    Args:
        run: Its forward, with attention over views as the module says.
        args, kwargs: What it was given.
        images: Those of it, ``[B, S, 3, H, W]`` or ``[S, 3, H, W]``: what else is along views is told by them.
        patches: Sizes of patches; images of four by five of the largest are tried first, then those of the size that was given.
        rough: Whether it computes in half precision.

    Raises:
        ParallelError: views meet, or it does not run on these images.
    """
    height, width = images.shape[-2:]
    sizes = [(height, width)]
    if patches:
        small = (4 * max(rows for rows, _ in patches), 5 * max(columns for _, columns in patches))
        sizes = [small, (height, width)] if small < (height, width) else sizes
    found: dict[str, list[Tensor]] = {}
    for size in sizes:
        try:
            found = {name: tensors_in(run(*_call(args, kwargs, images, shown, size))) for name, shown in SEEN.items()}
            break
        except Lite3RError:
            raise
        except Exception as error:
            if size == sizes[-1]:
                raise ParallelError(
                    f"whether views of this model meet could not be found, because it does not run on {len(SEEN['first'])} or "
                    f"{len(SEEN['alike'])} images of {size[0]} x {size[1]}: {short(error)}"
                ) from error
    return _verdict(found, images.dim() == 4, ROUGHLY if rough else CLOSE)


def one_by_one(run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], views: int, bare: bool) -> Any:
    """What a module gives of each view alone, put together: so views do not meet in it while the model is tried."""

    def of(view: int) -> Any:
        given, named = along_views((args, kwargs), 1, views, bare, lambda x, dim: x.narrow(dim, view, 1))
        return run(*given, **named)

    alone = [of(view) for view in range(views)]
    others = [iter(tensors_in(one)) for one in alone[1:]]

    def joined(x: Tensor) -> Tensor:
        parts, dim = [x, *map(next, others)], dim_of_views(x, 1, 1, bare)
        return x if dim is None else torch.cat(parts, dim)

    return exchanged(alone[0], joined)


def _call(args: tuple[Any, ...], kwargs: dict[str, Any], images: Tensor, shown: tuple[int, ...], size: tuple[int, int]) -> Any:
    bare, views = images.dim() == 4, images.shape[-4]
    batch = 1 if bare else images.shape[0]

    def made(x: Tensor, dim: int) -> Tensor:
        if x is images:
            return torch.stack([_picture(number, x, size) for number in shown])[(slice(None),) if bare else (None,)]
        chosen = x.index_select(dim, torch.tensor([number % views for number in shown], device=x.device))
        return chosen[:1] if dim else chosen

    return along_views((args, kwargs), batch, views, bare, made)


@functools.lru_cache(maxsize=32)
def _noise(number: int, channels: int, size: tuple[int, int]) -> Tensor:
    return torch.rand(channels, *size, generator=torch.Generator("cpu").manual_seed(number), device="cpu")


def _picture(number: int, like: Tensor, size: tuple[int, int]) -> Tensor:
    noise = _noise(number, like.shape[-3], size)
    return (noise if like.is_floating_point() else noise * 255).to(like.device, like.dtype)


def _verdict(found: dict[str, list[Tensor]], bare: bool, close: float) -> Verdict:
    if len({len(tensors) for tensors in found.values()}) > 1:
        raise ParallelError("it returns more tensors of some images than of others, so that they cannot be put together from processes")
    reference, common = False, set()
    for place, (first, others, ends, turned, alike) in enumerate(zip(*(found[name] for name in SEEN), strict=True)):
        what = f"tensor {place + 1} of {len(found['first'])} that it returns"
        dim = dim_of_views(first, 1, len(SEEN["first"]), bare)
        if dim is None or dim != dim_of_views(alike, 1, len(SEEN["alike"]), bare):
            if not first.shape == others.shape == alike.shape or not (_same(first, others, close) and _same(first, ends, close)):
                raise ParallelError(f"{what}, {list(first.shape)}, is not along views and yet depends on them: {ADVICE}")
            common.add(place)
            continue
        one, two, three, turn, many = (x.unbind(dim) for x in (first, others, ends, turned, alike))
        for this, other in ((one[0], two[0]), (one[2], two[2]), (one[1], three[1]), (one[3], three[3]), (one[2], turn[2])):
            if not _same(this, other, close):
                raise ParallelError(f"{what} shows that views meet outside of the attention sites that are described: {ADVICE}")
        if not all(_same(many[1], other, close) for other in (*many[2:], one[1])):
            raise ParallelError(f"{what} depends on the place or on the number of views: {ADVICE}")
        special = not _same(many[0], many[1], close)
        if special == _same(turn[0], one[1], close):
            raise ParallelError(f"{what} shows that a view is chosen by what is in it: {ADVICE}")
        reference |= special or not torch.equal(many[0], many[1])
    return Verdict(reference, frozenset(common))


def _same(a: Tensor, b: Tensor, close: float) -> bool:
    if not a.is_floating_point():
        return torch.equal(a, b)
    a, b = (x.double().nan_to_num() for x in (a, b))
    return bool((a - b).abs().amax() <= close * a.abs().amax()) if a.numel() else True
