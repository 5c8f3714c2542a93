"""`calibrate`: the fit is the least-squares solution, helps on inputs that it has not seen, and leaves alone what it cannot help."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from toys import Adapter, Toy, toy_adapter
from toys import images as toy_images

from lite3r_plugin import apply_lite3r, calibrate, lite3r_disabled, load_lite3r, save_lite3r
from lite3r_plugin.adapter import ModelOutputs
from lite3r_plugin.apply.lookup import lite3r_modules
from lite3r_plugin.errors import ConfigError, InputError, NotAppliedError
from lite3r_plugin.scene.procedural import ProcScenes, TextureBank
from lite3r_plugin.testbed import Testbed
from lite3r_plugin.training.calibrate import RIDGES, Calibration, SiteCalibration, fit
from lite3r_plugin.training.judge import Judge
from lite3r_plugin.training.outputs import OutputReader
from lite3r_plugin.training.record import AttentionSums, record

__all__ = ["toy_adapter"]  # the fixture

FIELDS: dict[str, Any] = {"keep_ratio": 0.15, "dense_below": 0, "block_q": 32, "block_k": 16, "pin": "special"}


@pytest.fixture(scope="module")
def images() -> list[Tensor]:
    """Ten rendered scenes of three views, ``[1, 3, 3, 96, 96]`` each: of much smaller ones the testbed has seen none."""
    return list(ProcScenes(TextureBank.procedural(24, 32, seed=5), seed=5)(12, 3, 96, 96)["rgb"][:10, None])


def sparse_testbed(**fields: Any) -> nn.Module:
    return apply_lite3r(Testbed.from_pretrained(), **(FIELDS | fields))


def sparse_toy(toy: Toy | None = None, **fields: Any) -> Toy:
    return apply_lite3r(toy or Toy(), **{**FIELDS, "block_q": 16, **fields})


def toy_inputs(count: int = 4) -> list[Tensor]:
    """Unlike one another."""
    return [toy_images() + torch.randn(1, 3, 3, 32, 40, generator=torch.Generator().manual_seed(i)) for i in range(count)]


def weights(model: nn.Module) -> list[Tensor]:
    return [site.proj_lin.weight for site in lite3r_modules(model).values() if site.sparse]


def assert_sites_run_themselves(model: nn.Module, x: Tensor) -> None:
    """Nothing has taken the place of their attention, which counts its calls."""
    sites = [site for site in lite3r_modules(model).values() if site.sparse]
    before = [site.calls.sparse + site.calls.dense for site in sites]
    with torch.no_grad():
        model(x)
    assert [site.calls.sparse + site.calls.dense for site in sites] == [count + 1 for count in before]


def distance(model: nn.Module, images: list[Tensor]) -> float:
    """Mean difference of log depth to the dense model."""
    with torch.no_grad():
        sparse = torch.stack([model(x)["depth"] for x in images]).log()
        with lite3r_disabled(model):
            dense = torch.stack([model(x)["depth"] for x in images]).log()
    return (sparse - dense).abs().mean().item()


@pytest.mark.parametrize(
    ("linear", "inputs"), [("marginal", 4), *(pytest.param(linear, 8, marks=pytest.mark.slow) for linear in ("all", "marginal"))]
)
def test_comes_closer_to_dense_on_other_scenes(images: list[Tensor], linear: str, inputs: int) -> None:
    model = sparse_testbed(linear_branch=linear, block_means=False)
    before = distance(model, images[8:])
    report = calibrate(model, images[:inputs], judged=1, outputs=lambda out: ModelOutputs(depth=out["depth"]))
    assert (report.inputs, report.judged) == (inputs, 1)
    assert set(report.before) == set(report.after) == {"depth"}
    assert all(report.after[kind] <= error for kind, error in report.before.items())
    assert report.after["depth"] < 0.97 * report.before["depth"]
    assert [site.fqn for site in report.sites] == [fqn for fqn, site in lite3r_modules(model).items() if site.sparse]
    assert all(site.after <= site.before for site in report.sites)
    assert any(site.share for site in report.sites)
    assert distance(model, images[8:]) < 0.97 * before
    assert "calibrated" in str(report)
    assert "ridge" in str(report)


def softmax(x: np.ndarray) -> np.ndarray:
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def test_the_fit_is_that_of_gathered_tokens(adapter: Adapter) -> None:
    """Dense attention, linear branch and cross-validated ridge anew, in numpy, over the tokens of all inputs side by side."""
    model = sparse_toy(linear_branch="all")
    gathered: dict[str, list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = {}

    def gather(site, heads) -> Tensor:
        sparse = site.sparse_linear(heads, None)
        q, k, v = (x.double().numpy() for x in (heads.q, heads.k, heads.v))
        dense = softmax(q @ k.swapaxes(-1, -2) / q.shape[-1] ** 0.5) @ v
        similar = softmax(q) @ softmax(k).swapaxes(-1, -2)
        linear = similar / similar.sum(-1, keepdims=True) @ v
        parts = (linear, dense - sparse.double().numpy(), dense)
        gathered.setdefault(site.site.fqn, []).append(tuple(x.reshape(-1, x.shape[-1]) for x in parts))
        return sparse

    def solve(parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]], ridge: float) -> np.ndarray:
        linear, missed = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
        bias = (len(linear) * ridge * linear.var(0).mean()) ** 0.5 * np.eye(linear.shape[1])
        return np.linalg.lstsq(np.concatenate((linear, bias)), np.concatenate((missed, 0 * bias)), rcond=None)[0].T

    sites = {fqn: site for fqn, site in lite3r_modules(model).items() if site.sparse}
    with contextlib.ExitStack() as stack, torch.no_grad():
        for site in sites.values():
            stack.enter_context(site.substitute(gather))
        for x in toy_inputs():
            model(x)
    report = calibrate(model, toy_inputs())
    assert [site.fqn for site in report.sites] == list(gathered) == ["cross.0", "cross.1"]
    for site in report.sites:
        parts = gathered[site.fqn]
        others = [parts[:i] + parts[i + 1 :] for i in range(4)]
        errors = {
            r: sum(np.square(m - l @ solve(other, r).T).sum() for (l, m, _), other in zip(parts, others, strict=True)) for r in RIDGES
        }
        ridge = min(errors, key=errors.__getitem__)
        missed, dense = (sum(np.square(part[i]).sum() for part in parts) for i in (1, 2))
        assert errors[ridge] < 0.9 * missed
        assert site.ridge == ridge
        assert site.before == pytest.approx((missed / dense) ** 0.5, rel=1e-4)
        after = sum(np.square(m - site.share * l @ solve(other, ridge).T).sum() for (l, m, _), other in zip(parts, others, strict=True))
        assert site.after == pytest.approx((after / dense) ** 0.5, rel=1e-4)
        expected = site.share * solve(parts, ridge)
        assert sites[site.fqn].proj_lin.weight.detach().numpy() == pytest.approx(expected, abs=1e-3 * np.abs(expected).max())


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_linear_branch_that_is_constant_over_tokens(adapter: Adapter, value: float) -> None:
    """Its normal equations have rank one or none."""
    toy = Toy(num_heads=1)
    with torch.no_grad():
        for i in range(2):
            toy.get_parameter(f"cross.{i}.qkv.weight")[64:] = 0
            toy.get_parameter(f"cross.{i}.qkv.bias")[64:] = value
    model = sparse_toy(toy)
    report = calibrate(model, toy_inputs())
    assert all(site.before < 1e-5 and site.after <= site.before for site in report.sites)
    assert all(weight.abs().max() < 1e-3 for weight in weights(model))


def test_parts_without_a_linear_branch_are_passed_over(adapter: Adapter) -> None:

    class Both(nn.ModuleList):
        def forward(self, x: Tensor) -> Tensor:
            return sum((part(x) for part in self), torch.zeros(()))

    report = calibrate(Both([sparse_toy(linear_branch="none"), sparse_toy()]), toy_inputs())
    assert [site.fqn for site in report.sites] == ["1.cross.0", "1.cross.1"]


def test_an_error_of_the_model_leaves_it_too(adapter: Adapter) -> None:
    model = sparse_toy()

    def given() -> Iterator[Tensor]:
        yield from toy_inputs(2)
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        calibrate(model, given())
    with pytest.raises(InputError, match="outside lite3r_disabled"), lite3r_disabled(model):
        calibrate(model, toy_inputs())
    assert_sites_run_themselves(model, toy_images())
    assert all((weight == 0).all() for weight in weights(model))


def test_stays_zero_where_it_cannot_help() -> None:
    """Each input's missing part is another multiple of the linear branch, of either sign: nothing carries over."""
    one, none = torch.eye(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    folds = {i: AttentionSums(one, sign * one, one.sum(), 2 * one.sum(), none, 100) for i, sign in enumerate((1.0, -1.0, 1.0, -1.0))}
    found = fit("cross.0", folds)
    assert (found.weight == 0).all()
    assert found.ridge is None
    report = found.report(1.0, one)
    assert report.after == report.before == pytest.approx(0.5**0.5)
    assert "no gain on held-out inputs" in str(Calibration((report,), 4, 4, {"depth": 1.0}, {"depth": 0.9}))
    found = fit("cross.0", {i: fold for i, fold in folds.items() if fold.cross[0, 0] > 0})
    assert (found.weight.diagonal() > 0.9).all()
    assert found.ridge is not None
    assert found.without(0).equal(found.folds[0][1])
    assert found.without(1).equal(found.weight)
    assert found.report(None, 0.5 * one).after == pytest.approx(0.5 * found.report(None, 0 * one).after)


@pytest.mark.usefixtures("adapter")
def test_outputs_are_judged_on_inputs_that_a_fit_has_not_seen() -> None:
    """The errors, one by one: fits without an input, put in by hand, against the dense model."""
    model = sparse_toy()
    twin = sparse_toy()
    twin.load_state_dict(model.state_dict())
    given = toy_inputs(3)
    report = calibrate(model, given)
    assert set(report.before) == {"outputs"}

    def error(x: Tensor) -> float:
        with lite3r_disabled(twin):
            dense = twin(x)
        return ((twin(x) - dense).square().sum() / dense.square().sum()).item()

    with torch.no_grad():
        before = [error(x) for x in given]
        assert report.before["outputs"] == pytest.approx(sum(before) / 3, rel=1e-4)
        recorders, _ = record(twin, {name: site for name, site in lite3r_modules(twin).items() if site.sparse}, given, 3)
        after = []
        for i, x in enumerate(given):
            for site in report.sites:
                seen = fit(site.fqn, recorders[site.fqn].folds)
                lite3r_modules(twin)[site.fqn].proj_lin.weight.copy_(site.share * seen.without(i))
            after.append(error(x))
    assert report.after["outputs"] == pytest.approx(sum(after) / 3, rel=1e-3)
    assert report.after["outputs"] < report.before["outputs"]


@pytest.mark.usefixtures("adapter")
def test_draws_of_the_model_are_the_same_whatever_is_tried() -> None:
    model = sparse_toy()
    model.register_forward_pre_hook(lambda _, args: (args[0] + torch.randn_like(args[0]),))
    judge = Judge(model, {}, OutputReader.of(model, None), 3)  # no site is exchanged, so nothing but draws could differ
    torch.manual_seed(0)
    with torch.no_grad():
        record(model, {}, toy_inputs(3), 2, judge.see)
        assert judge.without_branch() == {"outputs": 0.0}
        assert judge.errors(lambda index: {}, lambda: None) == {"outputs": 0.0}
    assert torch.rand(()) == torch.rand((), generator=torch.Generator().manual_seed(0))


@pytest.mark.usefixtures("adapter")
@pytest.mark.parametrize("came", [0.0, 0.1])
def test_keeps_what_it_came_with_where_outputs_get_no_better(came: float) -> None:
    """Outputs that nothing changes, and outputs that are further away with every fit."""
    inputs, seen = toy_inputs(), []

    def constant(output: Tensor) -> ModelOutputs:
        return ModelOutputs(camera=torch.ones(1, 3, 2))

    def falling(output: Tensor) -> ModelOutputs:  # without a branch, then dense, then what is tried
        seen.append(output)
        return ModelOutputs(camera=torch.full((1, 3, 2), float(len(seen))))

    for outputs in (constant, falling):
        model = sparse_toy()
        for weight in weights(model):
            nn.init.constant_(weight, came)
        report = calibrate(model, inputs, outputs=outputs)
        if outputs is constant or not came:
            assert report.after == report.before
            assert all(site.share is None for site in report.sites)
            assert all((weight == came).all() for weight in weights(model))
            assert "left as it came" in str(report)


@pytest.mark.slow
@pytest.mark.parametrize("pin", ["reference", "reference_keys"])
def test_few_small_inputs_do_no_harm_to_depth(pin: str) -> None:
    """Three inputs a time; all of what was fitted to their attention could take depth of unseen views a tenth further away than without."""
    before = after = 0.0
    for seed in range(5, 11):
        scenes = list(ProcScenes(TextureBank.procedural(24, 32, seed=seed), seed=seed)(9, 3, 64, 64)["rgb"][:, None])
        model = sparse_testbed(keep_ratio=0.25, block_q=16, block_k=16, pin=pin)
        before += distance(model, scenes[3:])
        report = calibrate(model, scenes[:3])
        assert all(report.after[kind] <= error for kind, error in report.before.items())
        after += distance(model, scenes[3:])
    assert after <= before


def test_sites_whose_branch_stays_zero_are_not_counted() -> None:
    """A share of a fit that helps no held-out input is nothing."""
    found = [("fitted", 0.1, 0.5), ("nothing to fit", None, 1.0), ("zero", 0.1, 0.0), ("as it came", 0.1, None)]
    sites = tuple(SiteCalibration(name, 0.2, 0.1, ridge, share) for name, ridge, share in found)
    told = str(Calibration(sites, inputs=4, judged=4, before={"depth": 0.2}, after={"depth": 0.1}))
    assert told.startswith("calibrated 1 of 4 sites on 4 inputs\n")


@pytest.mark.usefixtures("adapter")
def test_progress_is_told() -> None:
    told: list[tuple[str, int, int | None]] = []
    calibrate(sparse_toy(), toy_inputs(), progress=lambda *step: told.append(step))
    assert told[:5] == [("fitting", i, 4) for i in range(5)]
    judging = told[5:]
    assert {what for what, _, _ in judging} == {"judging by outputs"}
    assert [done for _, done, _ in judging] == list(range(len(judging)))
    assert judging[-1][1] <= judging[-1][2]
    calibrate(sparse_toy(), iter(toy_inputs()), progress=lambda *step: told.append(step))
    assert ("fitting", 4, None) in told


def test_replaces_what_was_there_and_is_saved(adapter: Adapter, tmp_path: Path) -> None:
    images, dense = toy_inputs(3), Toy()
    model = sparse_toy(copy.deepcopy(dense))
    calibrate(model, images[:2], judged=1)
    fitted = [weight.clone() for weight in weights(model)]
    assert any(weight.any() for weight in fitted)
    with torch.no_grad():
        for weight in weights(model):
            weight.normal_()
    calibrate(model, ({"images": x} if i else (x,) for i, x in enumerate(images[:2])), judged=1)  # by keyword and by position
    for one, other in zip(weights(model), fitted, strict=True):
        torch.testing.assert_close(one, other)
    save_lite3r(model, tmp_path)
    loaded = load_lite3r(dense, tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images[2]), model(images[2]))


@pytest.mark.usefixtures("adapter")
def test_empty_inputs_are_refused_and_some_of_them_do_no_harm() -> None:
    model, nothing = sparse_toy(), toy_images()[:0]
    with pytest.raises(InputError, match="reach no sparse site, or are empty"):
        calibrate(model, [nothing] * 2)
    with pytest.raises(InputError, match="nothing to compare"):
        calibrate(model, [nothing, *toy_inputs(2)], judged=1)
    with_empty, without = sparse_toy(), sparse_toy()
    without.load_state_dict(with_empty.state_dict())
    calibrate(with_empty, [*toy_inputs(), nothing])
    calibrate(without, toy_inputs())
    for a, b in zip(weights(with_empty), weights(without), strict=True):
        torch.testing.assert_close(a, b)


class Tracks(nn.Module):
    """Returns tracks of points, of which nobody asked for any."""

    def __init__(self) -> None:
        super().__init__()
        self.toy = Toy()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        out = self.toy(x)
        return {"out": out, "tracks": out[:0]}


@pytest.mark.usefixtures("adapter")
def test_an_output_in_which_nothing_is_does_no_harm() -> None:
    torch.manual_seed(0)
    model = Tracks()
    sparse_toy(model.toy)
    found = calibrate(model, toy_inputs())
    assert found.judged > 0
    assert set(found.before) == {"outputs"}


@pytest.mark.usefixtures("adapter")
def test_where_the_hosts_own_code_runs_it_says_why() -> None:
    model = sparse_toy(fuse=False)
    for site in lite3r_modules(model).values():
        site.left = site.calls.reason = "it is a Tuesday"
    with pytest.raises(InputError, match="ran in the host's own code, where there is nothing to fit: it is a Tuesday"):
        calibrate(model, toy_inputs())


@pytest.mark.parametrize(
    ("fields", "inputs", "error", "says"),
    [
        ({}, lambda x: x[:1], InputError, "at least two"),
        ({}, lambda x: [], InputError, "at least two"),
        ({}, lambda x: torch.cat(x), InputError, "takes a list or a generator of inputs of the model, got Tensor: put"),
        ({}, lambda x: {"images": x[0]}, InputError, "got dict: put"),
        ({}, lambda x: x[0].numpy(), InputError, "got ndarray: put"),
        ({}, lambda x: "images", InputError, "got str: put"),
        ({}, lambda x: None, InputError, "got NoneType: put"),
        ({}, lambda x: [x[0], x[1] * float("nan")], InputError, "not finite"),
        ({"linear_branch": "none"}, lambda x: x[:2], ConfigError, "linear_branch"),
        ({"keep_ratio": 1.0}, lambda x: x[:2], ConfigError, "keep_ratio is 1"),
    ],
)
def test_errors_leave_the_model(adapter: Adapter, fields: dict, inputs: Callable, error: type[Exception], says: str) -> None:
    model, images = sparse_toy(**fields), toy_inputs()
    sites = [site for site in lite3r_modules(model).values() if site.sparse]
    branches = [site.proj_lin.weight for site in sites if "proj_lin" in site._modules]
    with torch.no_grad():
        before = [weight.normal_().clone() for weight in branches]
    with pytest.raises(error, match=says):
        calibrate(model, inputs(images))
    assert_sites_run_themselves(model, images[0])
    assert all(torch.equal(weight, old) for weight, old in zip(branches, before, strict=True))


def test_needs_lite3r(adapter: Adapter) -> None:
    with pytest.raises(NotAppliedError):
        calibrate(Toy(), toy_inputs())


@pytest.mark.usefixtures("adapter")
@pytest.mark.parametrize("judged", [0, 9, True, 2.0, None])
def test_a_wrong_number_to_judge_by(judged: Any) -> None:
    with pytest.raises(ConfigError, match="from 1 to 8"):
        calibrate(sparse_toy(), toy_inputs(), judged=judged)
