"""`calibrate`: the fit is the least-squares solution, helps on inputs that it has not seen, and leaves alone what it cannot help."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lite3r_plugin import apply_lite3r, calibrate, lite3r_disabled, load_lite3r, save_lite3r
from lite3r_plugin.apply import lite3r_modules
from lite3r_plugin.calibrate import GAIN, _Observer, _Sums
from lite3r_plugin.errors import ConfigError, InputError, NotAppliedError
from lite3r_plugin.scenes import ProcScenes, TextureBank
from lite3r_plugin.testbed import Testbed

FIELDS = {"keep_ratio": 0.15, "dense_below": 0, "block_q": 32, "block_k": 16, "keep_reference_view": False}


@pytest.fixture(scope="module")
def images() -> Tensor:
    """Six rendered scenes of three views, ``[6, 1, 3, 3, 64, 64]``."""
    return ProcScenes(TextureBank.procedural(24, 32, seed=5), seed=5)(6, 3, 64, 64)["rgb"][:, None]


def sparse_testbed(**fields: object) -> nn.Module:
    return apply_lite3r(Testbed.from_pretrained(), **(FIELDS | fields))


def weights(model: nn.Module) -> list[Tensor]:
    return [site.proj_lin.weight for site in lite3r_modules(model).values() if site.sparse]


def distance(model: nn.Module, images: Tensor) -> float:
    """Mean difference of log depth to the dense model."""
    with torch.no_grad():
        sparse = torch.stack([model(x)["depth"] for x in images]).log()
        with lite3r_disabled(model):
            dense = torch.stack([model(x)["depth"] for x in images]).log()
    return (sparse - dense).abs().mean().item()


@pytest.mark.parametrize("linear", ["all", "marginal"])
def test_comes_closer_to_dense_on_other_scenes(images: Tensor, linear: str) -> None:
    model = sparse_testbed(linear_branch=linear, block_means=False)
    before = distance(model, images[4:])
    report = calibrate(model, images[:4])
    assert report.inputs == 4
    assert [site.fqn for site in report.sites] == [fqn for fqn, site in lite3r_modules(model).items() if site.sparse]
    assert all(site.after <= site.before for site in report.sites)
    assert sum(site.ridge is not None for site in report.sites) >= 4
    assert distance(model, images[4:]) < 0.97 * before
    assert "calibrated" in str(report)
    assert "ridge" in str(report)


def test_the_fit_is_the_ridge_solution() -> None:
    """Against an augmented least-squares problem in FP64, and the error against explicit residuals."""
    generator = torch.Generator().manual_seed(0)
    linear = torch.randn(500, 8, generator=generator, dtype=torch.float64) + 3
    missed = linear @ torch.randn(8, 8, generator=generator, dtype=torch.float64) + torch.randn(500, 8, generator=generator)
    sums = _Sums(linear.T @ linear, missed.T @ linear, missed.square().sum(), missed.square().sum(), linear.sum(0), len(linear))
    for strength in (1e-3, 1.0, 100.0):
        spread = linear.var(0, correction=0).mean()
        rows = torch.cat((linear / 500**0.5, (strength * spread).sqrt() * torch.eye(8, dtype=torch.float64)))
        expected = torch.linalg.lstsq(rows, torch.cat((missed / 500**0.5, torch.zeros(8, 8, dtype=torch.float64)))).solution.T
        weight = sums.ridge(strength)
        torch.testing.assert_close(weight, expected)
        assert sums.error(weight) == pytest.approx((missed - linear @ weight.T).square().sum().item(), rel=1e-9)


def test_what_is_observed_is_what_runs(images: Tensor) -> None:
    """Sparse + W linear of the observer's sums is the output of a site whose `proj_lin` is W."""
    model = sparse_testbed(linear_branch="marginal")
    site = next(site for site in lite3r_modules(model).values() if site.sparse)
    seen = {}

    def observe(module, heads) -> Tensor:
        observer = _Observer(64)
        sparse = observer(module, heads)
        sums = observer.folds[0]
        weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(1)) * 0.1
        run = module.sparse_linear(heads, weight).double()
        seen["error"] = sums.error(weight.double())
        seen["expected"] = (module.dense(heads).double() - run).square().sum().item()
        seen["dense"] = sums.dense.item()
        return sparse

    site.observer = observe
    with torch.no_grad():
        model(images[0])
    assert seen["error"] == pytest.approx(seen["expected"], rel=1e-3)
    assert GAIN > 1


def test_stays_zero_where_it_cannot_help(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each input's missing part is another multiple of the linear branch, of either sign: nothing carries over."""
    model = sparse_testbed()
    signs = iter([1.0, -1.0] * 50)
    state = {"sign": 1.0}
    plain = _Observer.__call__

    def flipped(self: _Observer, site, heads) -> Tensor:
        out = plain(self, site, heads)
        self.folds[self.fold].cross = self.folds[self.fold].gram * state["sign"]
        return out

    monkeypatch.setattr(_Observer, "__call__", flipped)

    def given():
        for x in images[:4]:
            state["sign"] = next(signs)
            yield x

    report = calibrate(model, given())
    assert all(site.ridge is None and site.after == site.before for site in report.sites)
    assert all((weight == 0).all() for weight in weights(model))
    assert "left at zero" in str(report)


def test_replaces_what_was_there_and_is_saved(images: Tensor, tmp_path: Path) -> None:
    model = sparse_testbed()
    calibrate(model, images[:2])
    fitted = [weight.clone() for weight in weights(model)]
    with torch.no_grad():
        for weight in weights(model):
            weight.normal_()
    calibrate(model, ({"images": x} if i else (x,) for i, x in enumerate(images[:2])))  # by keyword and by position
    for one, other in zip(weights(model), fitted, strict=True):
        torch.testing.assert_close(one, other)
    save_lite3r(model, tmp_path)
    loaded = load_lite3r(Testbed.from_pretrained(), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images[2])["depth"], model(images[2])["depth"])


@pytest.mark.parametrize(
    ("fields", "inputs", "error", "says"),
    [
        ({}, lambda x: x[:1], InputError, "at least two"),
        ({}, lambda x: [], InputError, "at least two"),
        ({}, lambda x: [x[0], x[1] * float("nan")], InputError, "not finite"),
        ({"linear_branch": "none"}, lambda x: x[:2], ConfigError, "linear_branch"),
        ({"keep_ratio": 1.0}, lambda x: x[:2], ConfigError, "keep_ratio is 1"),
    ],
)
def test_errors_leave_the_model(images: Tensor, fields: dict, inputs: Callable, error: type[Exception], says: str) -> None:
    model = sparse_testbed(**fields)
    with pytest.raises(error, match=says):
        calibrate(model, inputs(images))
    sites = [site for site in lite3r_modules(model).values() if site.sparse]
    assert all(site.observer is None for site in sites)
    assert all((site.proj_lin.weight == 0).all() for site in sites if "proj_lin" in site._modules)


def test_needs_lite3r(images: Tensor) -> None:
    with pytest.raises(NotAppliedError):
        calibrate(Testbed.from_pretrained(), images)
