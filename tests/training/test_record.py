"""Sums of what sites see: the fit that follows from them, and that they are of what really runs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from toys import Adapter, Toy, images, toy_adapter

from lite3r_plugin import apply_lite3r
from lite3r_plugin.apply.lookup import lite3r_modules
from lite3r_plugin.errors import InputError
from lite3r_plugin.testing import TEST_CONFIG
from lite3r_plugin.training.record import AttentionSums, SumRecorder, record, run_on

__all__ = ["toy_adapter"]  # the fixture


def test_the_fit_is_the_ridge_solution() -> None:
    """Against an augmented least-squares problem in FP64, and the error against explicit residuals."""
    generator = torch.Generator().manual_seed(0)
    linear = torch.randn(500, 8, generator=generator, dtype=torch.float64) + 3
    missed = linear @ torch.randn(8, 8, generator=generator, dtype=torch.float64) + torch.randn(500, 8, generator=generator)
    sums = AttentionSums(linear.T @ linear, missed.T @ linear, missed.square().sum(), missed.square().sum(), linear.sum(0), len(linear))
    for strength in (1e-3, 1.0, 100.0):
        spread = linear.var(0, correction=0).mean()
        rows = torch.cat((linear / 500**0.5, (strength * spread).sqrt() * torch.eye(8, dtype=torch.float64)))
        expected = torch.linalg.lstsq(rows, torch.cat((missed / 500**0.5, torch.zeros(8, 8, dtype=torch.float64)))).solution.T
        weight = sums.ridge(strength)
        torch.testing.assert_close(weight, expected)
        assert sums.error(weight) == pytest.approx((missed - linear @ weight.T).square().sum().item(), rel=1e-9)


def test_what_is_recorded_is_what_runs(adapter: Adapter) -> None:
    """Sparse + W linear of the recorder's sums is the output of a site whose `proj_lin` is W."""
    model = apply_lite3r(Toy().double(), TEST_CONFIG, linear_branch="marginal")
    site = next(site for site in lite3r_modules(model).values() if site.sparse)
    seen = {}

    def record_it(module, inputs) -> Tensor:
        recorder = SumRecorder()
        sparse = recorder(module, inputs)
        sums = recorder.folds[0]
        weight = torch.randn(16, 16, generator=torch.Generator().manual_seed(1)) * 0.1
        run = module.sparse_linear(inputs, weight).double()
        seen["error"] = sums.error(weight.double())
        seen["expected"] = (module.dense(inputs).double() - run).square().sum().item()
        return sparse

    with site.substitute(record_it), torch.no_grad():
        model(images(dtype=torch.float64))
    assert seen["error"] == pytest.approx(seen["expected"], rel=1e-3)


def test_inputs_are_dealt_out_to_folds(adapter: Adapter) -> None:
    model = apply_lite3r(Toy(), TEST_CONFIG).eval()
    sites = {fqn: site for fqn, site in lite3r_modules(model).items() if site.sparse}
    with torch.no_grad():
        recorders, count = record(model, sites, ({"images": images()} for _ in range(5)), 2)
    assert count == 5
    assert list(recorders) == list(sites)
    assert {fold: sums.count for fold, sums in recorders["cross.0"].folds.items()} == {0: 3 * 2 * 246, 1: 2 * 2 * 246}
    assert all(site.calls.sparse == 0 for site in sites.values())


def test_sums_add_and_subtract() -> None:
    one = AttentionSums(*(torch.rand(2, 2, dtype=torch.float64) for _ in range(5)), 3)
    two = AttentionSums(*(torch.rand(2, 2, dtype=torch.float64) for _ in range(5)), 4)
    both = one.plus(two)
    assert both.count == 7
    torch.testing.assert_close(both.plus(two, -1).gram, one.gram)


def test_the_ways_to_give_an_input() -> None:
    def model(*args: int, **kwargs: int) -> tuple:
        return args, kwargs

    assert [run_on(model, given) for given in (1, (1, 2), [1], {"a": 1})] == [((1,), {}), ((1, 2), {}), ((1,), {}), ((), {"a": 1})]  # type: ignore[arg-type]


class OfViews(nn.Module):
    """Takes a list of views, and something else."""

    def forward(self, views: list[dict[str, Tensor]], scale: float = 1.0, name: str = "") -> Tensor:
        return scale * torch.stack([view["img"] for view in views])


def test_a_list_of_views_is_one_argument() -> None:
    views = [{"img": torch.rand(1, 3, 4, 4)} for _ in range(3)]
    assert run_on(OfViews(), (views,)).shape == (3, 1, 3, 4, 4)
    for count in (2, 3, 4):
        with pytest.raises(InputError, match=r"belongs into a tuple, \(views,\)"):
            run_on(OfViews(), [*views, *views][:count])


def test_two_views_by_position() -> None:
    class Pair(nn.Module):
        def forward(self, one: dict[str, Tensor], other: dict[str, Tensor]) -> Tensor:
            return one["img"] + other["img"] + (0 if "more" not in one else one["none"])

    pair = [{"img": torch.ones(1)}, {"img": torch.ones(1)}]
    assert run_on(Pair(), pair) == run_on(Pair(), tuple(pair)) == 2
    with pytest.raises(KeyError):  # an error of the model itself
        run_on(Pair(), ({"img": torch.ones(1), "more": torch.ones(1)}, pair[1]))
