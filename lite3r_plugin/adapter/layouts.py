"""How the sequence of an attention site is laid out: `TokenLayout`, and how an adapter says where a layout comes from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..errors import AdapterError, shown


@dataclass(frozen=True)
class Views:
    """Views that are alike, one after the other: of each its special tokens, its patches row by row, then its trailing tokens.

    Tokens without an image grid, in an order that keeps neighbours together, are one view of the grid ``(1, n)``.

    Attributes:
        grid: Patch rows and columns of a view; of a window where attention is within windows.
        count: How many there are.
        special_tokens: Camera, register or class tokens in front of the patches of each.
        trailing_tokens: Those behind its patches.

    Raises:
        AdapterError: a number is none, or is out of range.

    Examples:
        >>> Views((24, 32), count=8, special_tokens=5).tokens_per_view
        773
    """

    grid: tuple[int, int]
    count: int = 1
    special_tokens: int = 0
    trailing_tokens: int = 0

    def __post_init__(self) -> None:
        if torch.compiler.is_compiling():  # numbers are symbols there
            return
        grid = self.grid
        if not isinstance(grid, tuple) or len(grid) != 2 or not all(_is_count(n, 1) for n in grid):
            raise AdapterError(f"grid of Views is a pair of positive integers (rows, columns), got {shown(grid)}")
        for name, least in (("count", 1), ("special_tokens", 0), ("trailing_tokens", 0)):
            if not _is_count(value := getattr(self, name), least):
                raise AdapterError(f"{name} of Views is an integer from {least} on, got {shown(value)}")

    @property
    def patches_per_view(self) -> int:
        """Rows times columns."""
        return self.grid[0] * self.grid[1]

    @property
    def tokens_per_view(self) -> int:
        """P: special tokens, patches and trailing tokens of a view."""
        return self.special_tokens + self.patches_per_view + self.trailing_tokens

    def __str__(self) -> str:
        parts = [f"{self.special_tokens} special"] if self.special_tokens else []
        parts += [f"{self.grid[0]} x {self.grid[1]} patches"]
        parts += [f"{self.trailing_tokens} trailing"] if self.trailing_tokens else []
        return f"{self.count} x ({' + '.join(parts)})"


@dataclass(frozen=True)
class TokenLayout:
    """The sequence of an attention site in one forward, from its first token to its last.

    ``TokenLayout((Views((24, 32), count=8, special_tokens=5),))`` is VGGT's; ``TokenLayout((Views((24, 32), 8), 1))`` ends in one token
    of the whole sequence; ``TokenLayout((Views((6, 10)), Views((10, 6))))`` has a view of another grid; ``TokenLayout((n,))`` is n special
    tokens and no patches.

    Attributes:
        parts: In the order of the sequence: views, or a number of special tokens that belong to none.
        reference: Which view, counted from 0, ``Lite3RConfig.pin="reference"`` keeps; None: all are alike.

    Raises:
        AdapterError: a part is neither, or there is no such view.

    Examples:
        >>> TokenLayout((Views((24, 32), count=8, special_tokens=5),)).num_tokens
        6184
    """

    parts: tuple[Views | int, ...]
    reference: int | None = 0

    def __post_init__(self) -> None:
        if torch.compiler.is_compiling():
            return
        if not isinstance(self.parts, tuple) or not self.parts:
            raise AdapterError(f"parts of a TokenLayout are a tuple of Views and numbers of special tokens, got {shown(self.parts)}")
        if wrong := [part for part in self.parts if not isinstance(part, Views) and not _is_count(part, 1)]:
            raise AdapterError(f"a part of a TokenLayout is Views or a number of special tokens from 1 on, got {shown(wrong[0])}")
        if self.reference is not None and (not _is_count(self.reference, 0) or self.reference >= max(self.views, 1)):
            raise AdapterError(f"reference of a TokenLayout of {self.views} views is one of them or None, got {shown(self.reference)}")

    @property
    def views(self) -> int:
        """S, the number of views in the sequence."""
        return sum(part.count for part in self.parts if isinstance(part, Views))

    @property
    def special_tokens(self) -> int:
        """All tokens that are no patches."""
        return sum(part.count * (part.special_tokens + part.trailing_tokens) if isinstance(part, Views) else part for part in self.parts)

    @property
    def num_tokens(self) -> int:
        """N, all tokens."""
        return sum(part.count * part.tokens_per_view if isinstance(part, Views) else part for part in self.parts)

    def __str__(self) -> str:
        """As messages say it, long lists cut."""
        said = [str(part) if isinstance(part, Views) else f"{part} special" for part in self.parts]
        return " + ".join(said if len(said) <= 6 else (*said[:5], f"{len(said) - 5} more"))


@dataclass(frozen=True)
class TokenSource:
    """The usual `TokenLayout`: all views are alike, and their grid is that of the images that one module of the model is given.

    The sequence of a site holds as many views as fit. Within one forward the images must all be of one size, else sites raise
    `LayoutError`: where sizes differ, `LayoutFunction` says which view has which grid.

    Attributes:
        image_module: Fully qualified name of a module whose first tensor argument holds the images, ``[..., H, W]``, and that runs before
            the attention sites in every forward, once or once for each image; the patch embedding is the natural choice.
        patch_size: Height and width of a patch in pixels. The grid is ``(H // patch_h, W // patch_w)``.
        special_tokens: Number of camera, register or class tokens in front of the patches of each view.
        trailing_tokens: Number of those behind them.
        sequence_tokens: Number of special tokens at the end of the whole sequence, whatever the number of views.
        changes: Whether images of several sizes may come in one forward, because each site has the tokens of the images that
            `image_module` was given last: an encoder that is run for one image, or one batch of images, after the other.
        strict: Whether a sequence that is not of such views is a mistake and raises `LayoutError`. False, for adapters of many models:
            it may be a window, or miss patches, and that call runs dense in the host's own code.
        reference: As of `TokenLayout`: 0, the first view, or None, where all views are alike and their order does not matter (Pi3).

    Raises:
        AdapterError: `patch_size` is no pair of positive integers, or a number of tokens is none.

    Examples:
        >>> tokens = TokenSource("patch_embed", patch_size=(14, 14), special_tokens=5)
        >>> str(tokens.layout((24, 32), 6184))
        '8 x (5 special + 24 x 32 patches)'
    """

    image_module: str
    patch_size: tuple[int, int]
    special_tokens: int = 0
    trailing_tokens: int = 0
    sequence_tokens: int = 0
    changes: bool = False
    strict: bool = True
    reference: int | None = 0

    def __post_init__(self) -> None:
        size = self.patch_size
        if not isinstance(self.image_module, str):
            raise AdapterError(f"image_module of a TokenSource is the name of a module, got {shown(self.image_module)}")
        if not (isinstance(size, tuple) and len(size) == 2 and all(_is_count(x, 1) for x in size)):
            raise AdapterError(f"patch_size of a TokenSource is a pair of positive integers (height, width), got {size!r}")
        for name in ("special_tokens", "trailing_tokens", "sequence_tokens"):
            if not _is_count(value := getattr(self, name), 0):
                raise AdapterError(f"{name} of a TokenSource is a number of tokens, got {value!r}")
        if not (self.reference is None or (_is_count(self.reference, 0) and self.reference == 0)):
            raise AdapterError(f"reference of a TokenSource is 0, the first view, or None, got {shown(self.reference)}")
        for name in ("changes", "strict"):
            if not isinstance(value := getattr(self, name), bool):
                raise AdapterError(f"{name} of a TokenSource is True or False, got {value!r}")

    @property
    def has_special_tokens(self) -> bool:
        """Whether a layout has tokens that are no patches."""
        return self.special_tokens + self.trailing_tokens + self.sequence_tokens > 0

    @property
    def module(self) -> str:
        """The module that is watched."""
        return self.image_module

    def layout(self, grid: tuple[int, int], tokens: int) -> TokenLayout | None:
        """The layout of `tokens` tokens on views of `grid` patches; None where they do not fit. `tokens` may be a symbol."""
        view = self.special_tokens + grid[0] * grid[1] + self.trailing_tokens
        views = (tokens - self.sequence_tokens) // view  # not divmod, which torch.compile does not know for dynamic sizes
        if views < 1 or views * view + self.sequence_tokens != tokens:
            return None
        alike = Views(grid, views, self.special_tokens, self.trailing_tokens)
        return TokenLayout((alike, self.sequence_tokens) if self.sequence_tokens else (alike,), self.reference)


@dataclass(frozen=True)
class LayoutFunction:
    """Any other `TokenLayout`: a function of the adapter gives it from the arguments of a forward.

    Attributes:
        function: Called with the arguments of that forward, as it is called with them; gives the layout, or None where the sequence has
            none: it is then taken in its own order, and no token is exempt from dropping. It should look at shapes, not at values, which
            would let the GPU wait; models are pickled with it, so a function of a module is better than a lambda.
        module: Fully qualified name of the module whose forward it is, ``""`` the model itself: one that runs around the sites, or
            before them. None: the attention module, so that each site has its own.
        changes: Whether a module that runs before the sites may give several layouts in one forward, as of `TokenSource`.

    Raises:
        AdapterError: `function` cannot be called, or another field is of the wrong kind.

    Examples:
        >>> def layout(x, grids):  # the arguments of the module's forward
        ...     return TokenLayout(tuple(Views(grid) for grid in grids))
        >>> tokens = LayoutFunction(layout, module="decoder")
    """

    function: Callable[..., TokenLayout | None]
    module: str | None = None
    changes: bool = False

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise AdapterError(f"function of a LayoutFunction is a function, got {shown(self.function)}")
        if self.module is not None and not isinstance(self.module, str):
            raise AdapterError(f"module of a LayoutFunction is the name of a module or None, got {shown(self.module)}")
        if not isinstance(self.changes, bool):
            raise AdapterError(f"changes of a LayoutFunction is True or False, got {self.changes!r}")


def _is_count(value: object, least: int) -> bool:
    return type(value) is int and value >= least
