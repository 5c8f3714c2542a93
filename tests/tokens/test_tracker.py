"""What the watched module of a source is given, and the layout that a site has of it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lite3r_plugin import LayoutFunction, TokenLayout, TokenSource, Views
from lite3r_plugin.errors import LayoutError
from lite3r_plugin.tokens.tracker import LayoutTracker


def tracker(special: int = 1, **options: Any) -> LayoutTracker:
    return LayoutTracker(TokenSource("embed", (4, 4), special, **options))


def see(watcher: LayoutTracker, height: int, width: int) -> None:
    watcher.observe(nn.Identity(), (torch.zeros(1, 3, height, width),), {})


def uniform(views: int, grid: tuple[int, int]) -> TokenLayout:
    return TokenLayout((Views(grid, views, 1),))


def test_the_grid_is_read_from_the_first_tensor_by_position_or_name() -> None:
    watcher, module = tracker(), nn.Identity()
    watcher.observe(module, ("no tensor", torch.zeros(2, 3, 8, 13)), {})
    assert watcher.layout("a", 2 * 7) == uniform(2, (2, 3))
    watcher.observe(module, (), {"images": torch.zeros(3, 16, 4)})
    assert watcher.layout("a", 5) == uniform(1, (4, 1))


def test_trailing_tokens_and_those_of_the_sequence() -> None:
    watcher = tracker(trailing_tokens=2, sequence_tokens=1)
    see(watcher, 8, 12)
    assert watcher.layout("a", 3 * 9 + 1) == TokenLayout((Views((2, 3), 3, 1, 2), 1))
    with pytest.raises(LayoutError, match=r"a view has 9 \(1 special \+ 2 x 3 patches \+ 2 trailing\), and the sequence ends in 1"):
        watcher.layout("a", 3 * 9)
    with pytest.raises(LayoutError, match="got 1 tokens"):
        watcher.layout("a", 1)


def test_a_forward_without_images_is_named() -> None:
    with pytest.raises(LayoutError, match="'embed' was called without an image tensor"):
        tracker().observe(nn.Identity(), (), {"size": 3})


def test_a_site_before_any_image_is_named() -> None:
    with pytest.raises(LayoutError, match=r"site 'a' ran before 'embed' saw any image.*LayoutFunction"):
        tracker().layout("a", 7)


@pytest.mark.parametrize("tokens", [0, 6, 13])
def test_counts_that_do_not_fit_are_named(tokens: int) -> None:
    watcher = tracker()
    see(watcher, 8, 12)
    with pytest.raises(
        LayoutError,
        match=rf"got {tokens} tokens, but a view has 7 \(1 special \+ 2 x 3 patches\).*patch_size, special_tokens.*LayoutFunction",
    ):
        watcher.layout("a", tokens)


class Model(nn.Module):
    """Calls what a test says: ``"8x12"`` is an image, ``"a"`` a site that asks for 7 tokens, a function itself."""

    def __init__(self, source: TokenSource | LayoutFunction, around: bool = False) -> None:
        super().__init__()
        self.embed = nn.Identity()
        self.tracker = LayoutTracker(source, around)
        self.tracker.attach(self.get_submodule(source.module or ""), self)

    def forward(self, *steps: str | Callable[[], None]) -> list[TokenLayout | None]:
        found = []
        for step in steps:
            if callable(step):
                step()
            elif "x" in step:
                height, width = step.split("x")
                self.embed(torch.zeros(1, 3, int(height), int(width)))
            else:
                found.append(self.tracker.layout(step, 7))
        return found


WIDE, TALL = "8x12", "12x8"


def test_images_of_two_sizes_in_one_forward_raise() -> None:
    model = Model(TokenSource("embed", (4, 4), 1))
    assert model(WIDE, WIDE, "a", "b") == [uniform(1, (2, 3))] * 2
    assert model(TALL, "a") == [uniform(1, (3, 2))]  # another forward
    with pytest.raises(
        LayoutError, match=r"'embed' was given images of 2 x 3, 3 x 2 patches in one forward.*'a'.*LayoutFunction, or changes"
    ):
        model(WIDE, TALL, "a")
    assert model(TALL, "a") == [uniform(1, (3, 2))]


def test_sizes_may_change_where_the_source_says_so() -> None:
    model = Model(TokenSource("embed", (4, 4), 1, changes=True))
    assert model(WIDE, "a", TALL, "a") == [uniform(1, (2, 3)), uniform(1, (3, 2))]


def test_outside_of_forwards_a_site_has_what_was_seen_since_it_last_ran() -> None:
    """As where a user calls methods of a model."""
    model = Model(TokenSource("embed", (4, 4), 1))
    assert model.forward(WIDE, "a", TALL, "a") == [uniform(1, (2, 3)), uniform(1, (3, 2))]
    with pytest.raises(LayoutError, match="in one forward, so that site 'b'"):
        model.forward("b")
    assert model.forward(TALL, "b", "a", "a") == [uniform(1, (3, 2))] * 3


def test_runs_of_the_dense_model_count() -> None:
    model = Model(TokenSource("embed", (4, 4), 1))
    model.forward(WIDE)
    model.tracker.ran("a")
    assert model.forward(TALL, "a") == [uniform(1, (3, 2))]


def test_after_an_error_in_a_forward_the_next_one_is_another() -> None:
    model = Model(TokenSource("embed", (4, 4), 1))
    with pytest.raises(ValueError, match="unpack"):
        model(WIDE, "1x2x3")
    assert model.forward(TALL, "a") == [uniform(1, (3, 2))]


def test_another_thread_is_in_a_forward_of_its_own() -> None:
    """Whole forwards on other images go by between the images of this one and its sites."""
    model = Model(TokenSource("embed", (4, 4), 1))

    def elsewhere() -> None:
        for run in (model, model.forward):
            assert other.submit(run, TALL, "a", "b").result() == [uniform(1, (3, 2))] * 2

    with ThreadPoolExecutor(1) as other:
        for run in (model, model.forward):
            assert run(WIDE, elsewhere, "a", elsewhere, "b") == [uniform(1, (2, 3))] * 2


class Views2(nn.Module):
    """A model of a list of images, with a site inside that asks for its layout."""

    def __init__(self, source: LayoutFunction) -> None:
        super().__init__()
        self.part = nn.Identity()
        self.tracker = LayoutTracker(source, around=source.module == "")
        self.tracker.attach(self.get_submodule(source.module or ""), self)

    def forward(self, images: list[Tensor]) -> TokenLayout | None:
        for image in images:
            self.part(image)
        return self.run(sum(image.shape[-2] * image.shape[-1] // 16 for image in images))

    def run(self, tokens: int) -> TokenLayout | None:
        return self.tracker.layout("a", tokens)


def grids(images: list[Tensor]) -> TokenLayout:
    return TokenLayout(tuple(Views((image.shape[-2] // 4, image.shape[-1] // 4)) for image in images))


def no_layout(image: Tensor) -> TokenLayout:
    return image.nothing  # pyright: ignore[reportAttributeAccessIssue]


MIXED = [torch.zeros(1, 3, 8, 12), torch.zeros(1, 3, 12, 8)]


def test_a_function_of_the_arguments_of_the_model() -> None:
    model = Views2(LayoutFunction(grids, ""))
    assert model(MIXED) == TokenLayout((Views((2, 3)), Views((3, 2))))
    assert model(MIXED[::-1]) == TokenLayout((Views((3, 2)), Views((2, 3))))
    with pytest.raises(LayoutError, match=r"site 'a' ran outside of a call of 'the model'.*module=None"):
        model.run(12)  # nothing stays from the forward before


def test_a_function_of_a_module_that_is_called_with_several_layouts() -> None:
    model = Views2(LayoutFunction(lambda image: grids([image]), "part"))
    with pytest.raises(LayoutError, match=r"'part' was called with 2 layouts in one forward.*module around the sites"):
        model(MIXED)
    with pytest.raises(LayoutError, match="ran before 'part' was called"):
        Views2(LayoutFunction(grids, "part")).run(6)
    last = Views2(LayoutFunction(lambda image: TokenLayout((*grids([image]).parts, 6)), "part", changes=True))
    assert last(MIXED) == TokenLayout((Views((3, 2)), 6))


def test_a_function_that_counts_wrongly_fails_or_gives_something_else_is_named() -> None:
    with pytest.raises(LayoutError, match=r"site 'a' got 12 tokens, but .* says 1 x \(2 x 3 patches\), which are 6: .* None"):
        Views2(LayoutFunction(lambda images: grids(images[:1]), ""))(MIXED)
    with pytest.raises(LayoutError, match=r"no_layout failed on the arguments of 'part'.*no attribute"):
        Views2(LayoutFunction(no_layout, "part"))(MIXED)
    with pytest.raises(LayoutError, match="gave int, not a TokenLayout or None"):
        Views2(LayoutFunction(lambda images: 3, ""))(MIXED)  # pyright: ignore[reportArgumentType]
    assert Views2(LayoutFunction(lambda images: None, ""))(MIXED) is None


def test_no_hook_stays() -> None:
    model = Model(TokenSource("embed", (4, 4), 1))
    model.tracker.detach()
    for module in (model, model.embed):
        assert not module._forward_pre_hooks
        assert not module._forward_hooks
        assert not module._forward_hooks_always_called


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning", "ignore:`torch.jit.trace:FutureWarning")
def test_torch_jit_trace_is_told_what_does_it_instead() -> None:
    watcher = tracker()

    def forward(images: Tensor) -> Tensor:
        watcher.observe(nn.Identity(), (images,), {})
        return images

    with pytest.raises(LayoutError, match=r"torch\.jit\.trace would write down .* use torch\.compile or torch\.export"):
        torch.jit.trace(forward, (torch.rand(1, 3, 16, 16),), check_trace=False)
