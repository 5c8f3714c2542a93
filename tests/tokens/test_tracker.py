"""Token layout: a permutation into compact image tiles, and the grid that a forward's images give."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lite3r_plugin import TokenLayout, TokenSource
from lite3r_plugin.config import Pin
from lite3r_plugin.errors import LayoutError
from lite3r_plugin.tokens.tracker import MAX_ORDERS, GridTracker, _captured, _orders, order_for, pinned_tokens, token_order

GRIDS = [(1, 1), (1, 30), (30, 1), (7, 9), (8, 8), (16, 24), (37, 37), (28, 37), (11, 50), (12, 20), (20, 12), (4, 64)]


@pytest.mark.parametrize("special", [0, 1, 5])
@pytest.mark.parametrize("views", [1, 3])
@pytest.mark.parametrize("grid", GRIDS)
def test_the_order_is_a_permutation_special_tokens_first_then_view_by_view(grid: tuple[int, int], views: int, special: int) -> None:
    layout = TokenLayout(views, special, grid)
    order = token_order(layout)
    assert order.dtype == torch.int32
    assert order.sort().values.tolist() == list(range(layout.num_tokens))
    within = order % layout.tokens_per_view
    assert (within[: views * special] < special).all()
    assert (within[views * special :] >= special).all()
    view_of_patch = order[views * special :] // layout.tokens_per_view
    assert view_of_patch.tolist() == [v for v in range(views) for _ in range(grid[0] * grid[1])]


@pytest.mark.parametrize("grid", [(8, 8), (16, 24), (8, 40), (40, 8), (64, 16)])
def test_multiples_of_eight_give_exact_tiles(grid: tuple[int, int]) -> None:
    rows, columns = _coordinates(grid)
    for block in range(0, len(rows), 64):
        y, x = rows[block : block + 64], columns[block : block + 64]
        assert y.min() % 8 == 0
        assert x.min() % 8 == 0
        assert (int(y.max() - y.min()), int(x.max() - x.min())) == (7, 7)


@pytest.mark.parametrize("grid", [g for g in GRIDS if min(g) >= 4])
def test_any_window_of_64_patches_is_compact(grid: tuple[int, int]) -> None:
    """Also windows that do not start at a multiple of 64, as after special tokens. Strips are at most 11 rows high."""
    rows, columns = _coordinates(grid)
    for start in range(max(1, len(rows) - 63)):
        y, x = rows[start : start + 64], columns[start : start + 64]
        assert int(y.max() - y.min()) < 24
        assert int(x.max() - x.min()) < 24


@pytest.mark.parametrize("grid", [(37, 37), (28, 37)])
def test_tiles_are_far_more_compact_than_raster_order(grid: tuple[int, int]) -> None:
    def spread(y: torch.Tensor, x: torch.Tensor) -> float:
        blocks = [(y[i : i + 64].double(), x[i : i + 64].double()) for i in range(0, len(y) - 63, 64)]
        return sum(float(a.var() + b.var()) for a, b in blocks) / len(blocks)

    raster = torch.cartesian_prod(torch.arange(grid[0]), torch.arange(grid[1])).unbind(1)
    assert spread(*_coordinates(grid)) < 0.25 * spread(*raster)


def _coordinates(grid: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    order = token_order(TokenLayout(1, 0, grid))
    return order // grid[1], order % grid[1]


@pytest.mark.parametrize(
    ("views", "pin", "expected"),
    [(4, "reference", 4 * 5 + 6), (4, "special", 20), (4, "none", 0), (1, "reference", 5), (1, "none", 0)],
)
def test_pinned_tokens(views: int, pin: Pin, expected: int) -> None:
    assert pinned_tokens(TokenLayout(views, 5, (2, 3)), pin) == expected


def test_eager_orders_are_cached() -> None:
    layout = TokenLayout(2, 1, (3, 5))
    assert order_for(layout, torch.device("cpu")) is order_for(layout, torch.device("cpu"))


def test_cached_orders_made_in_inference_mode_can_be_saved_for_a_backward_pass() -> None:
    with torch.inference_mode():
        order = order_for(TokenLayout(3, 2, (3, 7)), torch.device("cpu"))
    assert not order.is_inference()


def test_the_cache_of_orders_is_bounded() -> None:
    for rows in range(1, 3 * MAX_ORDERS):
        order_for(TokenLayout(1, 0, (rows, 2)), torch.device("cpu"))
    assert len(_orders) == MAX_ORDERS
    assert (TokenLayout(1, 0, (3 * MAX_ORDERS - 1, 2)), torch.device("cpu")) in _orders


@pytest.mark.gpu
def test_orders_and_cuda_graphs() -> None:
    """A graph may build its order, then nobody else may have it; or read a cached one, which then stays."""
    device, known, unknown = torch.device("cuda", 0), TokenLayout(2, 1, (9, 5)), TokenLayout(2, 1, (5, 9))
    cached = order_for(known, device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        inside = [order_for(known, device), order_for(unknown, device)]
    assert inside[0] is cached
    assert order_for(unknown, device) is not inside[1]
    assert any(order is cached for order in _captured.values())
    graph.replay()
    assert torch.equal(inside[1].cpu(), token_order(unknown))


def tracker(special: int = 1) -> GridTracker:
    return GridTracker(TokenSource("embed", (4, 4), special))


def test_the_tracker_reads_the_grid_from_the_first_tensor_by_position_or_name() -> None:
    watcher, module = tracker(), nn.Identity()
    watcher.observe(module, ("no tensor", torch.zeros(2, 3, 8, 13)), {})
    assert watcher.layout("a", 2 * 7) == TokenLayout(2, 1, (2, 3))
    watcher.observe(module, (), {"images": torch.zeros(3, 16, 4)})
    assert watcher.layout("a", 5) == TokenLayout(1, 1, (4, 1))


def test_a_forward_without_images_is_named() -> None:
    with pytest.raises(LayoutError, match="'embed' was called without an image tensor"):
        tracker().observe(nn.Identity(), (), {"size": 3})


def test_a_site_before_any_image_is_named() -> None:
    with pytest.raises(LayoutError, match=r"site 'a' ran before 'embed' saw any image"):
        tracker().layout("a", 7)


@pytest.mark.parametrize("tokens", [0, 6, 13])
def test_counts_that_do_not_fit_are_named(tokens: int) -> None:
    watcher = tracker()
    watcher.observe(nn.Identity(), (torch.zeros(1, 3, 8, 12),), {})
    with pytest.raises(
        LayoutError, match=rf"got {tokens} tokens, but a view has 7 \(1 special \+ 2 x 3 patches\).*patch_size or special_tokens"
    ):
        watcher.layout("a", tokens)


def test_recomputation_in_a_backward_pass() -> None:
    """Gradient checkpointing runs a forward again when others may have come after it."""
    watcher, found = tracker(), []

    class Site(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, tokens):
            ctx.tokens = tokens
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            found.append(watcher.layout("a", ctx.tokens).grid)
            return grad, None

    def forward(height: int, width: int) -> torch.Tensor:
        watcher.observe(nn.Identity(), (torch.zeros(1, 3, height, width),), {})
        return Site.apply(torch.zeros(1, requires_grad=True), 1 + height * width // 16)

    small, large = forward(8, 12), forward(16, 16)
    (small + large).backward()
    assert sorted(found) == [(2, 3), (4, 4)]
    wide, tall = forward(8, 12), forward(12, 8)
    with pytest.raises(LayoutError, match=r"recomputed by gradient checkpointing, but forwards on grids of \[\(2, 3\), \(3, 2\)\]"):
        (wide + tall).backward()
    with torch.no_grad():
        watcher.observe(nn.Identity(), (torch.zeros(1, 3, 8, 12),), {})
    forward(12, 8).backward()
    assert found[-1] == (3, 2)


def test_forwards_whose_backward_pass_is_over_are_forgotten() -> None:
    """So that checkpointing may be switched on after other sizes were trained on without it."""
    watcher, found = tracker(), []
    x = torch.zeros(1, requires_grad=True)
    for height, width in ((8, 12), (12, 8)):
        watcher.observe(nn.Identity(), (torch.zeros(1, 3, height, width),), {})
        out = x * 2
        out.register_hook(lambda grad: found.append(watcher.layout("a", 7).grid))  # as recomputation asks, before the hook of `watch`
        watcher.watch(out)
        if width == 8:
            watcher.observe(nn.Identity(), (torch.zeros(1, 3, 16, 16),), {})  # another forward comes between
        out.sum().backward()
    assert found[0] == (2, 3)
    watcher = copy.deepcopy(watcher)
    with torch.no_grad():
        watcher.observe(nn.Identity(), (torch.zeros(1, 3, 12, 8),), {})
    assert watcher.layout("a", 7).grid == (3, 2)


def test_no_order_is_kept_for_others_that_a_mode_made() -> None:
    layout, device = TokenLayout(2, 1, (3, 17)), torch.device("cpu")
    with torch._subclasses.FakeTensorMode():
        assert type(order_for(layout, device)) is not torch.Tensor
    assert type(order_for(layout, device)) is torch.Tensor
