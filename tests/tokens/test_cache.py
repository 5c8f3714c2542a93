"""Orders that are kept: shared by eager calls, bounded, not carried into copies, and safe for CUDA graphs."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from toys import Toy, images, toy_adapter

from lite3r_plugin import TokenLayout, Views, apply_lite3r
from lite3r_plugin.testing import TEST_CONFIG
from lite3r_plugin.tokens.cache import MAX_ORDERS, OrderCache
from lite3r_plugin.tokens.layout import token_order

__all__ = ["toy_adapter"]  # the fixture
CPU = torch.device("cpu")


def test_eager_orders_are_cached() -> None:
    layout, orders = TokenLayout((Views((3, 5), 2, 1),)), OrderCache()
    assert orders.get(layout, CPU) is orders.get(layout, CPU)
    assert torch.equal(orders.get(layout, CPU), token_order(layout))


def test_cached_orders_made_in_inference_mode_can_be_saved_for_a_backward_pass() -> None:
    with torch.inference_mode():
        order = OrderCache().get(TokenLayout((Views((3, 7), 3, 2),)), CPU)
    assert not order.is_inference()


def test_it_is_bounded_and_keeps_the_newest() -> None:
    orders = OrderCache()
    for rows in range(1, 3 * MAX_ORDERS):
        newest = orders.get(TokenLayout((Views((rows, 2)),)), CPU)
    assert len(orders) == MAX_ORDERS
    assert orders.get(TokenLayout((Views((3 * MAX_ORDERS - 1, 2), 1, 0),)), CPU) is newest


def test_copies_start_empty() -> None:
    orders = OrderCache()
    orders.get(TokenLayout((Views((3, 2)),)), CPU)
    for other in (copy.copy(orders), copy.deepcopy(orders), pickle.loads(pickle.dumps(orders))):
        assert len(other) == 0
        assert other.make is orders.make


def test_no_order_is_kept_for_others_that_a_mode_made() -> None:
    layout, orders = TokenLayout((Views((3, 17), 2, 1),)), OrderCache()
    with torch._subclasses.FakeTensorMode():
        assert type(orders.get(layout, CPU)) is not torch.Tensor
    assert type(orders.get(layout, CPU)) is torch.Tensor


@pytest.mark.usefixtures("adapter")
def test_orders_go_with_their_model() -> None:
    model = apply_lite3r(Toy().eval(), TEST_CONFIG)
    with torch.no_grad():
        model(images())
    orders = model.cross[0].state.orders
    order = weakref.ref(orders.get(TokenLayout((Views((8, 10), 3, 2),)), CPU))
    assert len(orders) == 1
    del model, orders
    gc.collect()
    assert order() is None


@pytest.mark.gpu
def test_orders_and_cuda_graphs() -> None:
    """A graph may build its order, then nobody else may have it; or read a cached one, which then stays."""
    device, known, unknown = torch.device("cuda", 0), TokenLayout((Views((9, 5), 2, 1),)), TokenLayout((Views((5, 9), 2, 1),))
    orders = OrderCache()
    cached = orders.get(known, device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        inside = [orders.get(known, device), orders.get(unknown, device)]
    assert inside[0] is cached
    assert orders.get(unknown, device) is not inside[1]
    for rows in range(1, 2 * MAX_ORDERS):
        orders.get(TokenLayout((Views((rows, 2)),)), device)
    assert orders.get(known, device) is cached
    assert len(orders) == MAX_ORDERS + 1
    graph.replay()
    assert torch.equal(inside[1].cpu(), token_order(unknown))
