"""`choose_keep_ratios`: sites that do harm keep more, budgets are kept, and whatever fails leaves the ratios as they were."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import accelerate
import pytest
import streaming_hosts
import torch
from interruptions import interrupted, lines_of
from torch import Tensor, nn
from toys import Attention, Toy, sites
from toys import images as toy_images

from lite3r_plugin import (
    KeepRatioProfile,
    apply_lite3r,
    calibrate,
    choose_keep_ratios,
    describe,
    distill,
    lite3r_disabled,
    remove_lite3r,
    save_lite3r,
)
from lite3r_plugin.adapter import ModelOutputs
from lite3r_plugin.apply.lookup import lite3r_modules
from lite3r_plugin.attention.inputs import AttentionInputs
from lite3r_plugin.attention.module import SparseLinearAttention
from lite3r_plugin.errors import AdapterError, ConfigError, InputError, NotAppliedError, WeightsError
from lite3r_plugin.ops.dispatch import SlowPathWarning
from lite3r_plugin.testbed import Testbed, TestbedConfig
from lite3r_plugin.training.ratios import path

FIELDS: dict[str, Any] = {"dense_below": 0, "block_q": 16, "block_k": 16, "pin": "special"}


def toy(keep_ratio: Any = "auto", depth: int = 3, **fields: Any) -> Toy:
    """With Lite3R; its middle site changes outputs much more than the others."""
    torch.manual_seed(0)
    model = Toy(depth=depth)
    with torch.no_grad():
        for i, module in enumerate(model.cross):
            module.proj.weight.mul_(20 if i == 1 else 0.05)
    return apply_lite3r(model, keep_ratio=keep_ratio, sites=sites(model), **FIELDS | fields)


def inputs(count: int = 4) -> list[Tensor]:
    return [toy_images() + torch.randn(1, 3, 3, 32, 40, generator=torch.Generator().manual_seed(i)) for i in range(count)]


def sparse_sites(model: nn.Module) -> dict[str, SparseLinearAttention]:
    return {fqn: site for fqn, site in lite3r_modules(model).items() if site.sparse}


def ratios(model: nn.Module) -> list[float]:
    return [site.keep_ratio for site in sparse_sites(model).values()]


def density(model: nn.Module, x: Tensor) -> float:
    """Mean share of the scores that a forward computes; 1 where a site ran dense."""
    with torch.no_grad():
        for site in sparse_sites(model).values():
            site.calls.density = None
        model(x)
    found = [1.0 if site.calls.density is None else site.calls.density for site in sparse_sites(model).values()]
    return sum(found) / len(found)


@torch.no_grad()
def relative_error(model: nn.Module, given: list[Tensor]) -> float:
    """Of the outputs against dense attention: the root of the mean square of each, as the budget has it."""
    errors = []
    for x in given:
        mine = model(x)
        with lite3r_disabled(model):
            dense = model(x)
        errors.append(((mine - dense).norm() / dense.norm()).item())
    return sum(errors) / len(errors)


def test_the_site_that_does_harm_keeps_most() -> None:
    """No more is computed than with the ratio everywhere, and outputs are closer to dense attention, on other inputs too."""
    model, uniform, others = toy(), toy(0.25), inputs(8)[4:]
    profile = choose_keep_ratios(model, inputs(), mean_keep_ratio=0.25, progress=False)
    first, harmful, last = ratios(model)
    assert harmful > 1.5 * 0.25 > 0.25 > max(first, last)
    assert density(model, others[0]) <= density(uniform, others[0]) + 1e-9
    assert density(model, others[0]) == pytest.approx(profile.making.density)
    assert density(model, others[0]) > density(uniform, others[0]) - 0.01  # nothing is left lying
    assert relative_error(model, others) < 0.8 * relative_error(uniform, others)
    assert profile.making.errors["outputs"] < profile.making.uniform_errors["outputs"]
    assert profile.making.harm["cross.1"] > 0.8
    assert sum(profile.making.harm.values()) == pytest.approx(1)


@pytest.mark.parametrize("most", [0.02, 0.1])
def test_the_error_that_is_allowed_is_kept_on_the_inputs_that_check(most: float) -> None:
    model, given = toy(), inputs(6)
    profile = choose_keep_ratios(model, given, max_rel_error=most, progress=False)
    assert 0 < profile.making.errors["outputs"] <= most
    assert relative_error(model, given[1::2]) == pytest.approx(profile.making.errors["outputs"], rel=1e-3)
    assert density(model, given[0]) < 1


def test_a_larger_error_lets_less_be_computed() -> None:
    model = toy()
    densities = [choose_keep_ratios(model, inputs(), max_rel_error=most, progress=False).making.density for most in (0.02, 0.1)]
    assert densities[1] < densities[0]


def test_without_a_budget_two_percent_are_allowed() -> None:
    making = choose_keep_ratios(toy(), inputs(), progress=False).making
    assert (making.budget, making.value) == ("max_rel_error", 0.02)


class Gained(Attention):
    """Its output counts more or less."""

    gain = 1.0

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.gain * super().forward(x, mask)


class Fickle(Toy):
    """What bright images need is not what dark ones do."""

    def __init__(self) -> None:
        super().__init__(depth=3, make=Gained)
        self.gained = tuple(self.cross)

    def forward(self, images: Tensor, **options: Any) -> Tensor:
        needed = 0 if images.mean() > 0.5 else 2
        for i, module in enumerate(self.gained):
            module.gain = 20.0 if i == needed else 0.05
        return super().forward(images, **options)


@pytest.mark.filterwarnings("ignore::lite3r_plugin.ops.dispatch.SlowPathWarning")
def test_a_choice_that_is_worse_on_other_inputs_is_not_taken() -> None:
    model = Fickle()
    apply_lite3r(model, keep_ratio="auto", sites=sites(model), **FIELDS, block_choice="mean")
    given = [x + (1 if i % 2 == 0 else -1) for i, x in enumerate(inputs())]
    choose_keep_ratios(model, given, mean_keep_ratio=0.25, progress=False)
    assert ratios(model) == [0.25] * 3
    choose_keep_ratios(model, [x + 1 for x in inputs()], mean_keep_ratio=0.25, progress=False)
    assert ratios(model) != [0.25] * 3  # where all agree, there is a choice


def cameras(turn: float = 0.5) -> Any:
    """From what a toy returns to three cameras that follow it."""

    def outputs(x: Tensor) -> ModelOutputs:
        angles = turn * x.mean(-1)  # [B, S]
        zero, one = torch.zeros_like(angles), torch.ones_like(angles)
        rows = angles.cos(), -angles.sin(), zero, angles.sin(), angles.cos(), zero, zero, zero, one
        rotation = torch.stack(rows, -1).unflatten(-1, (3, 3))
        position = torch.arange(x.shape[1], dtype=x.dtype).expand_as(angles)
        return ModelOutputs(world_to_camera=torch.cat((rotation, torch.stack((position, one, zero), -1)[..., None]), -1))

    return outputs


def test_cameras_may_lose_so_much() -> None:
    profile = choose_keep_ratios(toy(), inputs(), max_pose_loss=3.0, outputs=cameras(), progress=False)
    assert 0 < profile.making.errors["pose loss"] <= 3


def test_cameras_that_are_not_there() -> None:
    model = toy()
    with pytest.raises(AdapterError, match="max_pose_loss is about cameras, and the model returns none"):
        choose_keep_ratios(model, inputs(), max_pose_loss=1.0, progress=False)
    one_view = [x[:, :1] for x in inputs()]
    with pytest.raises(InputError, match="compares the cameras of several views"):
        choose_keep_ratios(model, one_view, max_pose_loss=1.0, outputs=cameras(), progress=False)


def test_depth_and_cameras_of_a_model_that_an_adapter_knows() -> None:
    torch.manual_seed(0)
    model = apply_lite3r(Testbed(TestbedConfig(dim=64, depth=2)).eval(), keep_ratio="auto", **FIELDS)
    given = [torch.rand(1, 3, 3, 64, 64) for _ in range(2)]
    profile = choose_keep_ratios(model, given, mean_keep_ratio=0.2, progress=False)
    assert set(profile.making.errors) == {"depth", "points", "rotation", "translation", "focal"}
    assert set(profile) == set(sparse_sites(model))


def test_a_model_without_ratios_says_so_and_runs_nothing() -> None:
    """Dense, or with the default, it would pass for what was asked."""
    model, x = toy(), inputs()[0]
    with pytest.raises(ConfigError, match="no ratios were chosen yet: choose_keep_ratios"):
        model(x)
    with pytest.raises(ConfigError, match="before calibrate"):
        calibrate(model, inputs(), progress=False)
    with pytest.raises(ConfigError, match="before distill"):
        distill(model, inputs(), steps=1)
    with pytest.raises(ConfigError, match="before save_lite3r"):
        save_lite3r(model, "nowhere")
    assert "3 sites wait for a keep ratio: choose_keep_ratios(model, inputs)" in str(describe(model))
    assert all(math.isnan(site.keep_ratio) for site in describe(model).sites)
    with lite3r_disabled(model):
        dense = model(x)
    assert torch.equal(remove_lite3r(model)(x), dense)


def test_ratios_that_are_there_are_chosen_anew() -> None:
    """Also those of a site that its host runs by itself at 1."""
    model = toy({"cross.0": 1.0, "*": 0.3})
    choose_keep_ratios(model, inputs(), mean_keep_ratio=0.25, progress=False)
    assert ratios(model)[0] < 0.25 < ratios(model)[1]
    chosen = ratios(model)
    choose_keep_ratios(model, inputs(), mean_keep_ratio=0.25, progress=False)
    assert ratios(model) == chosen


def test_calibration_follows() -> None:
    model = toy()
    profile = choose_keep_ratios(model, inputs(), mean_keep_ratio=0.25, progress=False)
    calibrate(model, inputs(), progress=False)
    assert describe(model).config.keep_ratio == profile


@pytest.mark.parametrize("keep_ratio", ["auto", 0.4])
def test_an_interruption_leaves_the_ratios_as_they_were(keep_ratio: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = toy(keep_ratio), 0

    def sparse_linear(*args: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt
        return run(*args)

    run = SparseLinearAttention.sparse_linear
    monkeypatch.setattr(SparseLinearAttention, "sparse_linear", sparse_linear)
    with pytest.raises(KeyboardInterrupt):
        choose_keep_ratios(model.train(), inputs(), progress=False)
    assert describe(model).config.keep_ratio == keep_ratio
    assert model.training
    assert not any(site.is_watched for site in sparse_sites(model).values())
    assert str(ratios(model)) == str([math.nan if keep_ratio == "auto" else keep_ratio] * 3)


def test_sites_that_inputs_do_not_reach_stay_dense_and_say_so() -> None:
    class Shallow(Toy):
        def forward(self, images: Tensor, **options: Any) -> Tensor:
            frame, cross = self.frame, self.cross
            self.frame, self.cross = frame[:2], cross[:2]
            try:
                return super().forward(images, **options)
            finally:
                self.frame, self.cross = frame, cross

    model = Shallow(depth=3)
    apply_lite3r(model, keep_ratio="auto", sites=sites(model), **FIELDS)
    profile = choose_keep_ratios(model, inputs(), mean_keep_ratio=0.25, progress=False)
    assert profile["cross.2"] == 1
    assert "cross.2 stays dense: no input reached it" in str(describe(model))


class Masked(Toy):
    """Asks for attention with a mask that has no sparse form, at one site."""

    def __init__(self) -> None:
        super().__init__(depth=2, make=lambda dim, heads: Attention(dim, heads, "masked"))

    def forward(self, images: Tensor, **options: Any) -> Tensor:
        tokens = images.shape[1] * 82
        mask = torch.ones(tokens, tokens).tril() > 0
        with_mask = self.cross[1].register_forward_pre_hook(lambda _, args: (*args, mask))
        try:
            return super().forward(images, **options)
        finally:
            with_mask.remove()


def test_sites_whose_masks_have_no_sparse_form_stay_dense_and_say_so() -> None:
    model = Masked()
    apply_lite3r(model, keep_ratio="auto", sites=sites(model), **FIELDS)
    profile = choose_keep_ratios(model, inputs(), mean_keep_ratio=0.25, progress=False)
    assert profile["cross.0"] < 1
    assert profile["cross.1"] == 1
    assert "cross.1 stays dense: its attention has a mask that is not frame-causal" in str(describe(model))
    model(inputs(1)[0])
    assert profile.making.density == pytest.approx(sparse_sites(model)["cross.0"].calls.density)


def test_what_is_computed_is_counted_with_the_mask() -> None:
    """On the double of a streaming model, run over a whole sequence."""
    model, given = streaming_hosts.make(), [streaming_hosts.frames(5)] * 2
    apply_lite3r(model, keep_ratio="auto", **FIELDS)
    profile = choose_keep_ratios(model, given, mean_keep_ratio=0.25, progress=False)
    model(given[0])
    found = [site.calls.density for site in sparse_sites(model).values()]
    assert len(found) > 1
    assert profile.making.density == pytest.approx(sum(x or 0.0 for x in found) / len(found))


def test_sites_that_run_in_the_hosts_own_code_say_why() -> None:
    model = Toy(depth=2)
    apply_lite3r(model, keep_ratio="auto", sites=sites(model), **FIELDS)
    mask = torch.ones(246, 246).tril() > 0
    model.cross[1].register_forward_pre_hook(lambda _, args: (*args, mask))
    with pytest.warns(SlowPathWarning, match="it is given mask"):
        profile = choose_keep_ratios(model, inputs(), mean_keep_ratio=0.25, progress=False)
    assert profile.making.dense == {"cross.1": "it runs in the host's own code: it is given mask"}


def test_nothing_is_chosen_while_lite3r_is_disabled() -> None:
    model = toy()
    with lite3r_disabled(model), pytest.raises(ConfigError, match="call choose_keep_ratios outside lite3r_disabled"):
        choose_keep_ratios(model, inputs(), progress=False)


def offloaded(model: Toy) -> nn.Module:
    return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


def offloaded_by_block(model: Toy) -> nn.Module:
    for module in model.cross:
        accelerate.cpu_offload(module, execution_device=torch.device("cpu"), preload_module_classes=[type(module).__name__])
    return model


@pytest.mark.parametrize("offload", [offloaded, offloaded_by_block])
def test_weights_that_are_brought_in_for_a_call_are_there(offload: Callable[[Toy], nn.Module]) -> None:
    model, expected = toy(linear_branch="all"), toy(linear_branch="all")
    for one in (model, expected):
        for site in sparse_sites(one).values():
            torch.nn.init.eye_(site.proj_lin.weight)
    offloaded = offload(model)
    profiles = [choose_keep_ratios(one, inputs(), mean_keep_ratio=0.25, progress=False) for one in (offloaded, expected)]
    assert profiles[0] == profiles[1]
    assert profiles[0].making.errors == profiles[1].making.errors


def test_a_model_without_values_is_refused() -> None:
    model = toy().to("meta")
    with pytest.raises(WeightsError, match="choose_keep_ratios runs the model, which has weights on the meta device, without values"):
        choose_keep_ratios(model, inputs(), progress=False)
    assert describe(model).config.keep_ratio == "auto"


def test_a_compiled_model_runs_compiled_afterwards() -> None:
    """What is tried on the way is many, and the compiler gives a model up that it has to compile so often."""
    ran = []

    def backend(graph: Any, _: Any) -> Any:
        return lambda *args: (ran.append(1), graph.forward(*args))[1]

    torch.compiler.reset()
    model = toy()
    compiled: Any = torch.compile(model, backend=backend)
    choose_keep_ratios(compiled, inputs(), mean_keep_ratio=0.25, progress=False)
    assert not ran
    with torch.no_grad():
        torch.testing.assert_close(compiled(inputs(1)[0]), model(inputs(1)[0]))
    assert ran
    torch.compiler.reset()


@pytest.mark.parametrize("keep_ratio", ["auto", 0.5])
def test_an_interruption_at_the_end_leaves_a_true_state(keep_ratio: Any) -> None:
    """All modes are those that were, and the ratios, too, while they are put back."""

    def choose(model: nn.Module) -> None:
        choose_keep_ratios(model, [x[:, :2, :, :16, :16] for x in inputs(2)], mean_keep_ratio=0.3, progress=False)

    choose(toy(keep_ratio, depth=2))  # what is computed once
    whole = toy(keep_ratio, depth=2).train()
    total = lines_of(lambda: choose(whole))
    for line in range(total - 60, total, 7):
        model = toy(keep_ratio, depth=2).train()
        assert interrupted(lambda model=model: choose(model), line)
        assert all(module.training for module in model.modules()), line
        assert describe(model).config.keep_ratio == keep_ratio


def test_inputs_below_dense_below() -> None:
    with pytest.raises(InputError, match="at most 246 tokens there, fewer than dense_below=1000"):
        choose_keep_ratios(toy(dense_below=1000), inputs(), progress=False)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (
            ConfigError,
            "one budget is kept at a time, got max_rel_error and mean_keep_ratio",
            {"max_rel_error": 0.1, "mean_keep_ratio": 0.1},
        ),
        (ConfigError, "mean_keep_ratio must be in", {"mean_keep_ratio": 0}),
        (ConfigError, "mean_keep_ratio=1 is dense attention everywhere", {"mean_keep_ratio": 1}),
        (ConfigError, "max_rel_error is a number above 0, got -1", {"max_rel_error": -1}),
        (ConfigError, "max_pose_loss is a number of percentage points between 0 and 100, got 100", {"max_pose_loss": 100}),
        (ConfigError, "judged is a number of inputs from 2 to 64, got 1", {"judged": 1}),
        (ConfigError, "nothing can be left out within max_rel_error=1e-09: the mildest step changes outputs", {"max_rel_error": 1e-9}),
        (InputError, "put an input x into a list", {"inputs": torch.rand(1, 3, 3, 32, 40)}),
        (InputError, "at least two inputs", {"inputs": inputs(1)}),
        (InputError, "the error of outputs is not finite", {"inputs": [torch.full((1, 3, 3, 32, 40), torch.nan)] * 2}),
    ],
)
def test_what_cannot_be(error: type[Exception], message: str, arguments: dict[str, Any]) -> None:
    model = toy()
    with pytest.raises(error, match=message):
        choose_keep_ratios(model, **{"inputs": inputs(), "progress": False} | arguments)
    assert describe(model).config.keep_ratio == "auto"


def test_models_without_sparse_sites() -> None:
    with pytest.raises(NotAppliedError):
        choose_keep_ratios(Toy(), inputs())


def test_a_part_of_the_model_has_no_ratios_of_its_own() -> None:
    """All sites share one configuration: the others would have lost theirs in it, and in a checkpoint."""
    model = toy(0.5)
    with pytest.raises(NotAppliedError, match=r"holds 1 of the 3 attention modules .* call choose_keep_ratios on the whole model"):
        choose_keep_ratios(model.cross[0], [torch.rand(1, 246, 32)] * 2, mean_keep_ratio=0.3, progress=False)
    assert ratios(model) == [0.5] * 3
    assert describe(model).config.keep_ratio == 0.5


def test_no_more_inputs_are_taken_than_are_judged() -> None:
    taken = []
    choose_keep_ratios(toy(), (taken.append(i) or x for i, x in enumerate(inputs(6))), mean_keep_ratio=0.3, judged=3, progress=False)
    assert len(taken) == 3


def test_progress_tells_how_often_the_model_runs() -> None:
    told: list[tuple[str, int, int | None]] = []
    choose_keep_ratios(toy(), inputs(), mean_keep_ratio=0.25, progress=lambda *what: told.append(what))
    last = {what: (done, total) for what, done, total in told}
    assert list(last) == ["running dense", "measuring sites", "checking"]
    assert all(done == total for done, total in last.values())


def test_the_path_takes_what_does_least_harm_for_what_it_saves_first() -> None:
    damages = {"a": {0.5: 0.1, 0.25: 0.9}, "b": {0.5: 0.3, 0.25: 0.35}}
    steps = path(damages, lambda fqn, ratio: ratio)
    slopes = [step.damage / step.saved for step in steps]
    assert slopes == sorted(slopes)
    for fqn, known in damages.items():
        own = [step for step in steps if step.fqn == fqn]
        assert [step.ratio for step in own] == sorted((step.ratio for step in own), reverse=True)
        assert own[-1].ratio == 0.25
        assert sum(step.damage for step in own) == pytest.approx(known[0.25])
    assert steps[0].fqn == "a"
    assert steps[-1] == max((s for s in steps if s.fqn == "a"), key=lambda step: step.damage / step.saved)


def test_a_ratio_that_saves_nothing_is_no_step() -> None:
    """Few tokens have few blocks: two ratios may keep as many."""
    steps = path({"a": {0.5: 0.1, 0.25: 0.2}}, lambda fqn, ratio: 1.0 if ratio == 1 else 0.5)
    assert len(steps) == 1


def test_what_is_not_the_models_own_profile_is_refused() -> None:
    profile = choose_keep_ratios(toy(), inputs(), mean_keep_ratio=0.25, progress=False)
    with pytest.raises(ConfigError, match=r"chosen for 3 sites of a Toy .*, and here 2 sites become sparse: there is no 'cross.2'"):
        toy(profile, depth=2)
    with pytest.raises(ConfigError, match=r"4 sites become sparse: 'cross.3' has none"):
        toy(profile, depth=4)
    assert isinstance(describe(toy(profile)).config.keep_ratio, KeepRatioProfile)


def test_inputs_are_those_of_attention() -> None:
    """The dense runs that are compared with see what the model sees."""
    seen: list[AttentionInputs] = []
    model = toy(0.3)
    site = sparse_sites(model)["cross.0"]
    with site.observe(lambda site, given, out: seen.append(given)):
        choose_keep_ratios(model, inputs(2), mean_keep_ratio=0.25, progress=False)
    assert {given.v.shape[2] for given in seen} == {246}
