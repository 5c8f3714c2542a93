"""Models whose sequences are laid out in other ways than view after view alike, each as small as it gets."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lite3r_plugin import AttentionSite, LayoutFunction, Routed, TokenLayout, TokenSource, Views, hookimpl
from lite3r_plugin.adapter.plugins import get_manager

PATCH, DIM, HEADS, WINDOW = 8, 32, 2, (4, 6)


class Attention(nn.Module):
    """Self-attention of ``[B, N, C]``; with `stride`, of every token but those merged into the one before them."""

    def __init__(self, stride: int = 1) -> None:
        super().__init__()
        self.stride = stride
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.proj = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x[:, :: self.stride]).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        out = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out.repeat_interleave(self.stride, 1)[:, : x.shape[1]]


class Patches(nn.Module):
    """Patches of images ``[B, 3, H, W]`` as ``[B, N, C]``, also by a method, as some encoders are used."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(DIM, 3 * PATCH * PATCH) * (3 * PATCH * PATCH) ** -0.5)

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_features(images)

    def forward_features(self, images: Tensor) -> Tensor:
        return F.unfold(images, PATCH, stride=PATCH).transpose(1, 2) @ self.weight.T


class Net(nn.Module):
    """What all have in common: patches, special tokens, two attention modules."""

    def __init__(self, special: int = 0, stride: int = 1) -> None:
        super().__init__()
        self.embed = Patches()
        self.special = nn.Parameter(torch.randn(1, special, DIM))
        self.first, self.second = Attention(stride), Attention(stride)

    def attend(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        return x + self.second(x)

    def tokens(self, images: Tensor) -> Tensor:
        """Of images ``[B, S, 3, H, W]``: ``[B, S, P, C]``."""
        return self.embed(images.flatten(0, 1)).unflatten(0, images.shape[:2])


class Trailing(Net):
    """Views whose special tokens come behind their patches."""

    def forward(self, images: Tensor) -> Tensor:
        x = self.tokens(images)
        return self.attend(torch.cat((x, self.special.expand(*x.shape[:2], -1, -1)), 2).flatten(1, 2))


class Once(Net):
    """Special tokens of the whole sequence, at its end (MapAnything)."""

    def forward(self, images: Tensor) -> Tensor:
        x = self.tokens(images).flatten(1, 2)
        return self.attend(torch.cat((x, self.special.expand(len(x), -1, -1)), 1))


class Registers(Net):
    """The second layer sees the special tokens alone (VGGT-Omega)."""

    def forward(self, images: Tensor) -> Tensor:
        x = self.tokens(images)
        x = torch.cat((self.special.expand(*x.shape[:2], -1, -1), x), 2)
        x = x + self.first(x.flatten(1, 2)).view_as(x)
        special = x[:, :, : self.special.shape[1]].flatten(1, 2)
        return torch.cat((special + self.second(special), x[:, :, self.special.shape[1] :].flatten(1, 2)), 1)


class Mixed(Net):
    """A list of images of any sizes, one after the other through the patch embedding, in one sequence (Fast3R)."""

    def forward(self, views: list[Tensor]) -> Tensor:
        return self.attend(torch.cat([self.embed(image) for image in views], 1))


class Pair(Net):
    """Two images, and a layer for each (the decoders of DUSt3R)."""

    def forward(self, first: dict[str, Tensor], second: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        x, y = self.embed(first["img"]), self.embed(second["img"])
        return x + self.first(x), y + self.second(y)


class Windows(Net):
    """Attention within windows of the image, which are sequences of their own (Swin)."""

    def forward(self, images: Tensor) -> Tensor:
        rows, columns = (size // PATCH for size in images.shape[-2:])
        x = self.embed(images).unflatten(1, (rows // WINDOW[0], WINDOW[0], columns // WINDOW[1], WINDOW[1])).transpose(2, 3)
        return self.attend(x.flatten(3, 4).flatten(0, 2))


class Packed(Net):
    """The windows of an image, one behind the other in one sequence."""

    def forward(self, images: Tensor) -> Tensor:
        return self.attend(Windows.forward(_Same(self), images).unflatten(0, (len(images), -1)).flatten(1, 2))  # pyright: ignore[reportArgumentType]


class _Same:
    """The patches of a model in windows, without attention."""

    def __init__(self, net: Net) -> None:
        self.embed = net.embed

    def attend(self, x: Tensor) -> Tensor:
        return x


class Merged(Net):
    """Attention merges neighbours in the sequence before it attends (FastVGGT)."""

    def __init__(self) -> None:
        super().__init__(stride=3)

    def forward(self, images: Tensor) -> Tensor:
        return self.attend(self.tokens(images).flatten(1, 2))


class Features(Net):
    """The patch embedding is never called: a method of it is."""

    def forward(self, images: Tensor) -> Tensor:
        return self.attend(self.embed.forward_features(images.flatten(0, 1)).unflatten(0, images.shape[:2]).flatten(1, 2))


def grid(image: Tensor) -> tuple[int, int]:
    return image.shape[-2] // PATCH, image.shape[-1] // PATCH


def mixed(views: list[Tensor]) -> TokenLayout:
    return TokenLayout(tuple(Views(grid(image)) for image in views))


def first_of_pair(first: dict[str, Tensor], second: dict[str, Tensor]) -> TokenLayout:
    return TokenLayout((Views(grid(first["img"])),))


def second_of_pair(first: dict[str, Tensor], second: dict[str, Tensor]) -> TokenLayout:
    return TokenLayout((Views(grid(second["img"])),))


def only_special(x: Tensor) -> TokenLayout:
    return TokenLayout((x.shape[1],))


def one_window(x: Tensor) -> TokenLayout:
    return TokenLayout((Views(WINDOW),))


def windows_in_a_row(x: Tensor) -> TokenLayout:
    return TokenLayout((Views(WINDOW, x.shape[1] // (WINDOW[0] * WINDOW[1])),), reference=None)


def merged(x: Tensor) -> TokenLayout | None:
    return None


def views_of(images: Tensor) -> TokenLayout:
    return TokenLayout((Views(grid(images), images.shape[1]),))


SOURCE = TokenSource("embed", (PATCH, PATCH))
Tokens = TokenSource | LayoutFunction | None
VIEWS = torch.rand(1, 3, 3, 32, 48, generator=torch.Generator().manual_seed(0))
WIDE, TALL = (torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(1)) for size in ((48, 80), (80, 48)))

RIGHT: dict[str, tuple[Callable[[], Net], tuple[object, ...], tuple[Tokens, Tokens]]] = {
    "trailing": (lambda: Trailing(2), (VIEWS,), (TokenSource("embed", (PATCH, PATCH), trailing_tokens=2),) * 2),
    "once per sequence": (lambda: Once(1), (VIEWS,), (TokenSource("embed", (PATCH, PATCH), sequence_tokens=1),) * 2),
    "register-only layer": (
        lambda: Registers(4), (VIEWS,), (TokenSource("embed", (PATCH, PATCH), 4), LayoutFunction(only_special)),
    ),
    "mixed grids": (Mixed, ([WIDE, TALL, WIDE],), (LayoutFunction(mixed, ""),) * 2),
    "a grid for each layer": (
        Pair, ({"img": WIDE}, {"img": TALL}), (LayoutFunction(first_of_pair, ""), LayoutFunction(second_of_pair, "")),
    ),
    "windows": (Windows, (torch.rand(1, 3, 64, 96),), (LayoutFunction(one_window),) * 2),
    "packed": (Packed, (torch.rand(1, 3, 64, 96),), (LayoutFunction(windows_in_a_row),) * 2),
    "merged": (Merged, (torch.rand(1, 4, 3, 48, 48),), (LayoutFunction(merged),) * 2),
    "images by a method": (Features, (VIEWS,), (LayoutFunction(views_of, ""),) * 2),
    "a loop over images": (Mixed, ([WIDE, WIDE],), (SOURCE,) * 2),
}  # fmt: skip
"""A model, its inputs, and how the sequences of its two attention modules are laid out."""


@pytest.fixture
def describe_as() -> Iterator[Callable[[Tokens, Tokens], None]]:
    """Says how the sequences of the two attention modules of any `Net` are laid out; the first call registers an adapter."""

    class Plugin:
        tokens: tuple[Tokens, Tokens] = None, None

        @hookimpl
        def lite3r_attention_sites(self, model: nn.Module) -> list[AttentionSite] | None:
            if not isinstance(model, Net):
                return None
            return [
                AttentionSite(name, "global", DIM // HEADS, Routed(), t) for name, t in zip(("first", "second"), self.tokens, strict=True)
            ]

    plugin = Plugin()
    get_manager().register(plugin, name="layouts")

    def describe(first: Tokens, second: Tokens) -> None:
        plugin.tokens = first, second

    yield describe
    get_manager().unregister(name="layouts")
