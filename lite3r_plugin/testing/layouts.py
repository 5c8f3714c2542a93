"""Whether tokens are where an adapter's layouts say: a few pixels of an image are changed, and the token that changes most is theirs."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter.layouts import TokenLayout, TokenSource, Views
from ..attention.inputs import AttentionInputs
from ..attention.module import SparseLinearAttention
from ..errors import AdapterError

CHANNELS = (1, 3, 4)
SHARP = 4.0
"""How many times as much as the expected token, or any other, one must change for a layout to be called wrong: attention before the
site mixes tokens, too."""
MAX_IMAGES = 4
SMALLEST = 8  # height and width of an image; matrices of cameras are smaller


@dataclass(frozen=True)
class Place:
    """What a layout says of a token.

    Attributes:
        view: Of the sequence, counted from 0; -1 where the token is no patch.
        row, column: Of the patch.
    """

    view: int
    row: int = 0
    column: int = 0

    def __str__(self) -> str:
        return f"the patch in row {self.row}, column {self.column} of view {self.view}" if self.view >= 0 else "a special token"


class _Call:
    """One attention in the forward of the unchanged images.

    Attributes:
        fqn: The site.
        number: Which of the site's calls. In cross-attention queries are one, keys the next.
        layout: Of its sequence.
        values: v, ``[B, N, H * D]``; q where those are of other tokens.
    """

    def __init__(self, fqn: str, number: int, layout: TokenLayout, values: Tensor) -> None:
        self.fqn, self.number, self.layout, self.values = fqn, number, layout, values
        self.places = _places(layout)
        self.grids = [part.grid for part in layout.parts if isinstance(part, Views) for _ in range(part.count)]


def check_layouts(model: nn.Module, sites: Mapping[str, SparseLinearAttention], run: Callable[[nn.Module], Any]) -> list[str]:
    """Compare the layouts of `sites` with what the model does to single patches of its images.

    Args:
        model: With Lite3R, as exact as it gets: with ``keep_ratio=1``.
        sites: Its sites that may be sparse.
        run: Runs a model, with the same images every time.

    Returns:
        What could not be checked, in words.

    Raises:
        AdapterError: a layout is wrong: it says which patch is at another place than where it is said to be.
    """
    groups = _first_of_each_layout(_calls(sites, lambda: run(model)), sites)
    if not groups:
        return []
    probe = _Probe(model, sites, run)
    notes = []
    for calls in groups:
        site = sites[calls[0].fqn]
        for target in dict.fromkeys((model, *_image_module(model, site))):
            if probe.sizes(target):
                notes += _check_group(probe, target, calls)
                break
        else:
            notes.append(f"the layout at {calls[0].fqn!r} was not compared: no images [..., 1, 3 or 4, H, W] among the model's arguments")
    return notes


def _check_group(probe: _Probe, target: nn.Module, calls: Sequence[_Call]) -> list[str]:
    sizes = probe.sizes(target)
    units = sum(call.values.shape[0] * len(call.grids) for call in calls)
    seen = False
    for image in sorted({*range(min(len(sizes), MAX_IMAGES - 1)), len(sizes) - 1}):
        height, width = sizes[image]
        rows, columns = calls[0].grids[0]
        size = max(1, min(height // rows, width // columns) // 2)
        found = probe.strongest(target, image, (height // 2, width // 2, size, size), calls)
        if found is None:
            continue
        call, sequence, token, _, sharp = found
        place = call.places[token]
        if place.view < 0:
            if sharp:
                raise AdapterError(_wrong(call, image, height // 2, width // 2, token, place, ""))
            continue
        if units > len(sizes):
            seen |= _check_windows(probe, target, image, calls)
        else:
            seen |= _check_image(probe, target, image, call, sequence, place.view, calls)
    what = f"the layout at {calls[0].fqn!r} was not compared"
    return [] if seen else [f"{what}: no patch of the images changes one of its tokens far more than the others"]


def _check_image(probe: _Probe, target: nn.Module, image: int, call: _Call, sequence: int, view: int, calls: Sequence[_Call]) -> bool:
    """Whether one patch at least of an image that is a view was found at its place, and none elsewhere."""
    rows, columns = call.grids[view]
    height, width = probe.sizes(target)[image]
    patch, turned = _patch_size(height, width, rows, columns)
    seen = False
    for row, column in dict.fromkeys([(0, columns - 1), (rows - 1, 0), (rows // 2, columns // 3), (0, 0)]):
        y, x = (column, row) if turned else (row, column)  # an image on its side, as DUSt3R's patch embedding turns it
        top, left = int((y + 0.25) * patch[0]), int((x + 0.25) * patch[1])
        box = top, left, max(1, int(patch[0] / 2)), max(1, int(patch[1] / 2))
        found = probe.strongest(target, image, box, calls)
        if found is None:
            continue
        other, where, token, local, sharp = found
        place = other.places[token]
        if place == Place(view, row, column) and (other, where) == (call, sequence):
            seen |= local
            continue
        if (place.row, place.column) == (row, column) and place.view >= 0 and other.grids[place.view] == (rows, columns):
            continue  # a model may order views that are alike by what is in them, as Depth Anything 3 puts its reference view first
        expected = Place(view, row, column)
        change = probe.changes(target, image, box, call)[sequence][call.places.index(expected)]
        far_less = probe.changes(target, image, box, other)[where][token] >= SHARP * change
        if far_less and (local if place.view >= 0 else sharp):
            raise AdapterError(_wrong(other, image, top, left, token, place, f", not {expected}"))
    return seen


def _check_windows(probe: _Probe, target: nn.Module, image: int, calls: Sequence[_Call]) -> bool:
    """The same for an image that is cut into windows: patches that are neighbours in it are neighbours in a window, or begin one."""
    rows, columns = calls[0].grids[0]
    height, width = probe.sizes(target)[image]
    patches = sum(call.values.shape[0] * sum(grid[0] * grid[1] for grid in call.grids) for call in calls) / len(probe.sizes(target))
    size = round((height * width / patches) ** 0.5)
    if any(grid != (rows, columns) for call in calls for grid in call.grids) or not size or height % size or width % size:
        return False
    if (height // size) * (width // size) != patches:  # windows of padded images
        return False
    offsets: set[tuple[int, int]] = set()
    for row, column in dict.fromkeys([(0, 0), (0, 1), (1, 0), (0, width // size - 1), (height // size - 1, 0)]):
        top, left = row * size + size // 4, column * size + size // 4
        found = probe.strongest(target, image, (top, left, max(1, size // 2), max(1, size // 2)), calls)
        if found is None or not found[-1]:
            continue
        call, _, token, *_ = found
        place = call.places[token]
        offsets.add(((place.row - row) % rows, (place.column - column) % columns))
        if place.view < 0 or len(offsets) > 1:
            raise AdapterError(_wrong(call, image, top, left, token, place, ", which is no neighbour of others that are neighbours"))
    return bool(offsets)


class _Probe:
    """Runs the model on images that were changed at one place, each change once."""

    def __init__(self, model: nn.Module, sites: Mapping[str, SparseLinearAttention], run: Callable[[nn.Module], Any]) -> None:
        self.model, self.sites, self.run = model, sites, run
        self._sizes: dict[nn.Module, list[tuple[int, int]]] = {}
        self._values: dict[Any, dict[tuple[str, int], Tensor]] = {}

    def sizes(self, target: nn.Module) -> list[tuple[int, int]]:
        """Height and width of each image that `target` is given in a forward."""
        if target not in self._sizes:
            images = _Images(target is self.model)
            with images.given_to(target):
                self.run(self.model)
            self._sizes[target] = images.sizes
        return self._sizes[target]

    def changes(self, target: nn.Module, image: int, box: tuple[int, int, int, int], call: _Call) -> Tensor:
        """How much each token changes, ``[B, N]``, where a box (top, left, height, width) of an image does."""
        key = target, image, box
        if key not in self._values:
            with _Images(target is self.model, image, box).given_to(target):
                calls = _calls(self.sites, lambda: self.run(self.model))
            self._values[key] = {(call.fqn, call.number): call.values for call in calls}
        values = self._values[key].get((call.fqn, call.number))
        if values is None or values.shape != call.values.shape:
            return torch.zeros(call.values.shape[:2], device="cpu")
        return (values - call.values).double().norm(dim=-1)

    def strongest(
        self, target: nn.Module, image: int, box: tuple[int, int, int, int], calls: Sequence[_Call]
    ) -> tuple[_Call, int, int, bool, bool] | None:
        """The token that changes most: its call, sequence and index, and whether most others of its view change far less, and whether all
        of the sequence do. None: nothing changes."""
        changes = [self.changes(target, image, box, call) for call in calls]
        most = [float(change.max()) for change in changes]
        best = max(range(len(calls)), key=most.__getitem__)
        if not most[best] > 0:
            return None
        sequence, token = divmod(int(changes[best].argmax()), changes[best].shape[1])
        others = changes[best][sequence].clone()
        others[token] = 0
        places = calls[best].places
        of_view = others[[place.view == places[token].view for place in places]]
        return calls[best], sequence, token, most[best] >= SHARP * float(of_view.median()), most[best] >= SHARP * float(others.max())


class _Images:
    """Finds the images among the arguments of a module, and changes one of them.

    Args:
        by_channels: Whether they are told by their channels; else the first tensor is taken.
        image: Which one to change, counted over all calls; None: none.
        box: Top, left, height and width of what is changed.
    """

    def __init__(self, by_channels: bool, image: int | None = None, box: tuple[int, int, int, int] = (0, 0, 0, 0)) -> None:
        self.by_channels, self.image, self.box = by_channels, image, box
        self.sizes: list[tuple[int, int]] = []

    @contextlib.contextmanager
    def given_to(self, target: nn.Module) -> Iterator[None]:
        """Look at, and change, what `target` is given inside the context."""
        handle = target.register_forward_pre_hook(self._hook, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def _hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self._first = True
        return self._visit(args), self._visit(kwargs)

    def _visit(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._changed(value) if self._is_image(value) else value
        if isinstance(value, dict):
            return {key: self._visit(item) for key, item in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self._visit(item) for item in value)
        return value

    def _is_image(self, value: Tensor) -> bool:
        if not value.is_floating_point() or value.dim() < 3 or min(value.shape[-2:]) < SMALLEST:
            return False
        first, self._first = self._first, False
        return value.shape[-3] in CHANNELS if self.by_channels else first

    def _changed(self, images: Tensor) -> Tensor:
        flat = images.flatten(0, -4) if images.dim() > 3 else images[None]
        start = len(self.sizes)
        self.sizes += [(images.shape[-2], images.shape[-1])] * len(flat)
        if self.image is None or not start <= self.image < len(self.sizes):
            return images
        flat, (top, left, height, width) = flat.clone(), self.box
        inside = flat[self.image - start, ..., top : top + height, left : left + width]
        noise = torch.randn(inside.shape, generator=torch.Generator("cpu").manual_seed(0), device="cpu").to(inside)
        inside += noise * flat.std().clamp_min(0.1) * 3
        return flat.view_as(images) if images.dim() > 3 else flat[0]


def _calls(sites: Mapping[str, SparseLinearAttention], run: Callable[[], Any]) -> list[_Call]:
    """The attentions of a forward whose sequences have a layout, in order."""
    calls: list[_Call] = []
    numbers = {fqn: itertools.count() for fqn in sites}

    def see(fqn: str, site: SparseLinearAttention, inputs: AttentionInputs, out: Tensor) -> None:
        tokens = [(inputs.layout, inputs.q if inputs.crossed else inputs.v)]
        if inputs.crossed and site.site.keys != site.site.tokens:  # else they are of the same source: tokens of earlier calls, seen there
            tokens.append((inputs.key_layout, inputs.v))
        for layout, made in tokens:
            number = next(numbers[fqn])
            if layout is not None:
                calls.append(_Call(fqn, number, layout, made.transpose(1, 2).flatten(2).detach().cpu()))

    with contextlib.ExitStack() as stack:
        for fqn, site in sites.items():
            stack.enter_context(site.observe(functools.partial(see, fqn)))
        run()
    return calls


def _first_of_each_layout(calls: Sequence[_Call], sites: Mapping[str, SparseLinearAttention]) -> list[list[_Call]]:
    """The calls of the first site of each source and layout: the fewest layers have mixed its tokens. Those without patches say nothing."""
    by_site: dict[str, list[_Call]] = {}
    for call in calls:
        by_site.setdefault(call.fqn, []).append(call)
    groups: dict[Any, list[_Call]] = {}
    for fqn, own in by_site.items():
        groups.setdefault((sites[fqn].site.tokens, *(call.layout for call in own)), own)
    return [with_patches for own in groups.values() if (with_patches := [call for call in own if call.grids])]


def _image_module(model: nn.Module, site: SparseLinearAttention) -> list[nn.Module]:
    source = site.site.tokens
    return [model.get_submodule(source.image_module)] if isinstance(source, TokenSource) else []


def _patch_size(height: int, width: int, rows: int, columns: int) -> tuple[tuple[float, float], bool]:
    """Height and width of a patch, square if one fits, and whether the image lies on its side."""
    for turned, (down, across) in ((False, (rows, columns)), (True, (columns, rows))):
        ideal = (height * width / (down * across)) ** 0.5
        sizes = [p for p in range(1, max(height, width) + 1) if _fits(height, p, down) and _fits(width, p, across)]
        if sizes:
            best = min(sizes, key=lambda p: abs(p - ideal))
            return (best, best), turned
    return (height / rows, width / columns), False


def _fits(size: int, patch: int, count: int) -> bool:
    return count in (size // patch, -(-size // patch))


def _places(layout: TokenLayout) -> list[Place]:
    """What each token is, in the order of the sequence."""
    places: list[Place] = []
    views = itertools.count()
    for part in layout.parts:
        if not isinstance(part, Views):
            places += [Place(-1)] * part
            continue
        for view in itertools.islice(views, part.count):
            places += [Place(-1)] * part.special_tokens
            places += [Place(view, row, column) for row in range(part.grid[0]) for column in range(part.grid[1])]
            places += [Place(-1)] * part.trailing_tokens
    return places


def _wrong(call: _Call, image: int, top: int, left: int, token: int, place: Place, instead: str) -> str:
    return (
        f"the layout at site {call.fqn!r} is wrong: a change of image {image} at row {top}, column {left} of its pixels changes token "
        f"{token} of the sequence most, and the layout, {call.layout}, says that this is {place}{instead}. Look at "
        "which special tokens are in front of the patches and which behind (special_tokens, trailing_tokens, sequence_tokens), at rows and "
        "columns, and at which view has which grid"
    )
