"""`Objective`: its gradients are those of two separate models, however the student is wrapped; and what it refuses."""

from __future__ import annotations

import copy
import dataclasses
import functools
import random
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from toys import Adapter, Attention, Toy, toy_adapter
from toys import images as toy_images

from lite3r_plugin import AttentionSite, FusedQKV, apply_lite3r, convert, lite3r_disabled
from lite3r_plugin.adapter import ModelOutputs, find_outputs
from lite3r_plugin.apply.lookup import lite3r_modules
from lite3r_plugin.errors import AdapterError, ConfigError, ConvertedError, InputError, NotAppliedError
from lite3r_plugin.peft import add_lora
from lite3r_plugin.testbed import Testbed, TestbedConfig
from lite3r_plugin.training.config import DistillConfig
from lite3r_plugin.training.data import Sample
from lite3r_plugin.training.losses import feature_loss, prediction_losses
from lite3r_plugin.training.objective import Losses, Objective

__all__ = ["toy_adapter"]  # the fixture

FIELDS: dict[str, Any] = {"keep_ratio": 0.2, "dense_below": 0, "block_q": 16, "block_k": 16, "attention_backend": "naive"}
EVERYTHING = DistillConfig(attention=0.5, blocks=2.0, cameras=3.0, predictions=0.25)
SPECIAL = 5
# torch.compile looks at it
COMPILING = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
VIEWS, SIDE = 3, 64


def dense_testbed() -> Testbed:
    torch.manual_seed(1)
    return Testbed(TestbedConfig(dim=64, depth=2, head_dim=32, stem=8)).eval()


def student_testbed(lora: bool = True, **fields: Any) -> Testbed:
    """With branches, and LoRA, that do something, and nothing else that learns."""
    model = apply_lite3r(dense_testbed(), **(FIELDS | fields))
    if lora:
        add_lora(model, rank=2, alpha=2, scopes=("global",))
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        learns = "proj_lin" in name or "lora_" in name
        parameter.requires_grad_(learns)
        if learns:
            nn.init.normal_(parameter, std=0.1)
    return model


def views(batch: int = 2, seed: int = 3) -> Tensor:
    return torch.rand(batch, VIEWS, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def recompute_blocks(model: nn.Module) -> None:
    """Gradient checkpointing of the blocks, as `distill` puts it in."""
    for blocks in (model.aggregator.frame_blocks, model.aggregator.global_blocks):
        for block in blocks:
            block.forward = functools.partial(_recomputed, block.forward)


def _recomputed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return checkpoint(forward, *args, use_reentrant=False, **kwargs) if torch.is_grad_enabled() else forward(*args, **kwargs)


def two_models(config: DistillConfig, images: Tensor, **fields: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss and its gradients anew, from a dense model and a student that know nothing of each other."""
    names = [f"aggregator.{kind}_blocks.{i}" for i in range(2) for kind in ("frame", "global")]
    seen: list[dict[str, Tensor]] = []
    outputs = []
    student, teacher = student_testbed(**fields), dense_testbed()
    for model in (student, teacher):
        features: dict[str, Tensor] = {}
        for name in names:
            for suffix in ("", ".attn"):
                model.get_submodule(name + suffix).register_forward_hook(
                    lambda _, __, out, features=features, key=name + suffix: features.update({key: out})
                )
        with torch.set_grad_enabled(model is student):
            outputs.append(find_outputs(model)(model(images)))
        seen.append(features)
    mine, true = seen
    names = names[1:]  # the first frame block comes before anything that learns
    attention = torch.stack([feature_loss(mine[f"{n}.attn"], true[f"{n}.attn"], config.attention_loss) for n in names if "global" in n])
    patches, special = [], []
    for name in sorted(names, key=[n for n, _ in student.named_modules()].index):
        s, t = (x.reshape(len(x), -1, x.shape[1] // (VIEWS if "global" in name else 1), x.shape[2]) for x in (mine[name], true[name]))
        patches.append(feature_loss(s[:, :, SPECIAL:], t[:, :, SPECIAL:]))
        special.append(feature_loss(s[:, :, :SPECIAL], t[:, :, :SPECIAL]))
    total = config.attention * attention.mean() + config.blocks * torch.stack(patches).mean()
    total = total + config.cameras * torch.stack(special).mean()
    total = total + config.predictions * sum(prediction_losses(*outputs).values())
    total.backward()
    return total.detach(), gradients(student)


def run(model: nn.Module, config: DistillConfig, images: Tensor, student: nn.Module | None = None, **options: Any) -> Losses:
    with Objective(model, config, **options) as objective:
        losses = objective(model if student is None else student, Sample(images), 0.0)
        if losses.total.requires_grad:
            losses.total.backward()
    return losses


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 0.0) -> None:
    assert found.keys() == expected.keys()
    assert sum(x.abs().max().item() > 0 for x in expected.values()) >= len(expected) / 2
    for name, x in expected.items():
        if rtol:
            torch.testing.assert_close(found[name], x, rtol=rtol, atol=rtol * x.abs().max().item())
        else:
            assert torch.equal(found[name], x), (name, (found[name] - x).abs().max().item())


@pytest.mark.parametrize("kind", ["normalized", "mse", "cosine"])
def test_gradients_are_those_of_two_separate_models(kind: Any) -> None:
    config = EVERYTHING.replace(attention_loss=kind)
    expected, of_weights = two_models(config, views())
    model = student_testbed()
    losses = run(model, config, views())
    assert all(x.abs().max() > 0 for x in of_weights.values())
    torch.testing.assert_close(losses.total, expected, rtol=1e-6, atol=0)
    assert losses.total.item() == pytest.approx(sum(part.item() for part in losses.parts.values()), rel=1e-6)
    assert_same(gradients(model), of_weights)


@pytest.mark.parametrize("autocast", [pytest.param(False, marks=pytest.mark.slow), True])
def test_nothing_but_rounding_depends_on_where_losses_are_computed(autocast: bool) -> None:
    """With every loss alone, where no order of summation can differ, gradients are equal bit for bit."""
    for name in ("attention", "blocks", "cameras", "predictions"):
        config = DistillConfig(**({"attention": 0, "blocks": 0, "cameras": 0, "predictions": 0} | {name: 1.0}))
        with torch.autocast("cpu", enabled=autocast):
            model = student_testbed()
            run(model, config, views())
            once = gradients(model)
            recompute_blocks(model)
            run(model, config, views())
        assert_same(gradients(model), once)


def test_checkpointing_and_a_second_forward_before_the_backward_pass() -> None:
    model = student_testbed()
    expected = []
    for seed in (3, 4):
        run(model, EVERYTHING, views(seed=seed))
        expected.append(gradients(model))
    recompute_blocks(model)
    with Objective(model, EVERYTHING) as objective:
        first, second = (objective(model, Sample(views(seed=seed)), 0.0) for seed in (3, 4))
        second.total.backward()
        assert_same(gradients(model), expected[1])
        first.total.backward()
        assert_same(gradients(model), expected[0])


def test_the_teacher_has_no_lora_and_is_evaluated() -> None:
    model = student_testbed()
    seen: list[bool] = []
    model.register_forward_pre_hook(lambda module, _: seen.append(module.training))
    model.train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj_lin" in name or "lora_B" in name:
                parameter.zero_()
    losses = run(model, EVERYTHING, views())
    assert seen == [True, False]
    assert all(module.training for module in model.modules())
    moved = student_testbed()
    assert run(moved, EVERYTHING, views()).total > 1.2 * losses.total
    # keep_ratio 1: nothing but branches and LoRA is left that could differ, and these are zero
    model = student_testbed(keep_ratio={"*.0.attn": 0.999, "*": 1.0}, pin="none", linear_branch="all")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.zero_()
    assert run(model, EVERYTHING, views()).total < 1e-3


def test_batches_weigh_scenes_alike() -> None:
    model, images = student_testbed(), views(batch=3)
    run(model, EVERYTHING, images)
    together = gradients(model)
    for i in range(3):
        run(model, EVERYTHING, images[i : i + 1])
    apart = {name: x / 3 for name, x in gradients(model).items()}
    assert_same(together, apart, rtol=1e-4)


def test_in_ddp(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = student_testbed()
        run(model, EVERYTHING, views())
        expected = gradients(model)
        run(model, EVERYTHING, views(), nn.parallel.DistributedDataParallel(model))
        assert_same(gradients(model), expected)
    finally:
        torch.distributed.destroy_process_group()


@COMPILING
@pytest.mark.parametrize("whole", [pytest.param(True, marks=pytest.mark.slow), False])
def test_compiled(whole: bool) -> None:
    model = student_testbed()
    run(model, EVERYTHING, views())
    expected = gradients(model)
    torch.compiler.reset()
    student = model
    if whole:
        student = torch.compile(model, backend="eager")
    else:
        model.aggregator.global_blocks[1].compile(backend="aot_eager")
    for _ in range(2):
        run(model, EVERYTHING, views(), student)
        assert_same(gradients(model), expected, rtol=1e-4)


@COMPILING
def test_what_was_compiled_before_is_told() -> None:
    """Hooks that were not there then would be left out, and with them what they compare."""
    model = student_testbed(lora=False)
    model.aggregator.global_blocks[1].compile(backend="eager")
    model(views())
    with pytest.raises(ConfigError, match=r"torch\.compiler\.reset"):
        run(model, EVERYTHING, views())
    torch.compiler.reset()
    run(model, EVERYTHING, views())


def test_weights_follow_half_a_cosine() -> None:
    model = student_testbed()
    config = DistillConfig(attention=(0.1, 0.01), predictions=0.0, cameras=0.0)
    with Objective(model, config) as objective, torch.no_grad():
        start, middle, end = (objective(model, Sample(views()), share).parts for share in (0.0, 0.5, 1.0))
    one = start["attention"] / 0.1
    assert middle["attention"].item() == pytest.approx(0.055 * one.item(), rel=1e-5)
    assert end["attention"].item() == pytest.approx(0.01 * one.item(), rel=1e-5)
    assert start["blocks"] == end["blocks"] > 0


def test_without_gradients_it_compares_the_same() -> None:
    model = student_testbed()
    with Objective(model, EVERYTHING) as objective:
        with torch.no_grad():
            first = objective(model, Sample(views()), 0.0)
        trained = objective(model, Sample(views()), 0.0)
        with torch.no_grad():
            later = objective(model, Sample(views()), 0.0)
    assert not first.total.requires_grad
    assert trained.total.requires_grad
    assert first.parts.keys() == trained.parts.keys() == later.parts.keys()
    for name, part in trained.parts.items():
        assert torch.equal(first.parts[name], part)
        assert torch.equal(later.parts[name], part)


def test_leaves_no_hook_behind() -> None:
    model = student_testbed()
    before = [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._forward_pre_hooks_with_kwargs) for m in model.modules()]
    with pytest.raises(InputError):
        run(model, EVERYTHING, torch.rand(1, 3, 3, 64, 63))
    with pytest.raises(InputError):
        run(model, EVERYTHING.replace(mode="local"), torch.rand(1, 3, 3, 64, 63))
    run(model, EVERYTHING, views())
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._forward_pre_hooks_with_kwargs) for m in model.modules()] == before
    assert torch.is_grad_enabled()


def test_a_model_that_no_adapter_maps_is_compared_tensor_by_tensor(adapter: Adapter) -> None:
    toy = apply_lite3r(Toy().eval(), **FIELDS).requires_grad_(False)
    for site in lite3r_modules(toy).values():
        site.requires_grad_(True)
    config = DistillConfig(blocks=0, cameras=0)
    with Objective(toy, config) as objective:
        assert "all tensors alike" in objective.describe()
        losses = objective(toy, Sample(toy_images()), 0.0)
        losses.total.backward()
    with torch.no_grad():
        student = toy(toy_images())
        with lite3r_disabled(toy):
            teacher = toy(toy_images())
    assert list(losses.parts) == ["predictions/other"]
    assert losses.total.item() == pytest.approx(((student - teacher).square().sum() / teacher.square().sum()).item(), rel=1e-5)
    assert all(site.proj_lin.weight.grad.abs().max() > 0 for site in lite3r_modules(toy).values() if site.sparse)
    with pytest.raises(ConfigError, match="pass outputs="):
        Objective(toy, config.replace(task=1.0))
    given = run(toy, config, toy_images(), outputs=lambda out: ModelOutputs(other=(out[:, :1],)))
    assert list(given.parts) == ["predictions/other"]
    with pytest.raises(AdapterError, match="could not be mapped"):
        run(toy, config, toy_images(), outputs=lambda out: ModelOutputs(depth=out["depth"]))
    with pytest.raises(AdapterError, match="returned Tensor"):
        run(toy, config, toy_images(), outputs=lambda out: out)


def test_what_it_refuses(adapter: Adapter) -> None:
    with pytest.raises(NotAppliedError):
        Objective(Toy(), EVERYTHING)
    with pytest.raises(ConfigError, match="no site is sparse"):
        Objective(apply_lite3r(Toy(), keep_ratio=1.0), EVERYTHING)
    with pytest.raises(ConvertedError, match="fp8_qat"):
        Objective(convert(apply_lite3r(Toy(), **FIELDS), fp8_backend="emulated"), EVERYTHING)
    frozen = apply_lite3r(Toy().eval(), **FIELDS).requires_grad_(False)
    with pytest.raises(ConfigError, match="comes after anything that learns"):
        run(frozen, EVERYTHING, toy_images())


def test_reentrant_checkpointing_of_what_learns_is_refused() -> None:
    model = student_testbed()
    block = model.aggregator.global_blocks[0]
    block.forward = functools.partial(checkpoint, block.forward, use_reentrant=True)
    block.forward = lambda x, pos, inner=block.forward: inner(x, pos)
    model.aggregator.frame_blocks.requires_grad_(True)
    with pytest.raises(ConfigError, match="use_reentrant=False"):
        run(model, EVERYTHING, views())


def test_an_output_that_is_changed_in_place_is_refused() -> None:
    model = student_testbed()
    with Objective(model, EVERYTHING) as objective:
        model.aggregator.global_blocks[0].attn.register_forward_hook(lambda _, __, out: out.mul_(2.0))
        with pytest.raises(AdapterError, match="in place"):
            objective(model, Sample(views()), 0.0)


def test_labels() -> None:
    """Labels that are the student's own output, in another world and unit, leave no error; without labels there is none to count."""
    model = student_testbed()
    config = DistillConfig(blocks=0, cameras=0, predictions=0, task=2.0)
    with torch.no_grad():
        mine = find_outputs(model)(model(views()))
    turn, shift = torch.linalg.qr(torch.randn(3, 3)).Q, torch.randn(3)  # from the model's world to another one
    rotation, translation = (7 * mine.world_to_camera[..., 3:] if i else mine.world_to_camera[..., :3] for i in range(2))
    turned = rotation @ turn.mT
    own = ModelOutputs(
        depth=7 * mine.depth,
        points=7 * mine.points @ turn.mT + shift,
        world_to_camera=torch.cat((turned, translation - turned @ shift[:, None]), -1),
        intrinsics=mine.intrinsics,
    )
    with Objective(model, config) as objective:
        losses = objective(model, Sample(views(), own), 0.0)
        assert set(losses.parts) == {"task/depth", "task/points", "task/rotation", "task/translation", "task/focal"}
        assert losses.total < 1e-4
        other = dataclasses.replace(own, depth=own.depth * torch.tensor([1.0, 1.1, 1.2])[:, None, None])
        assert objective(model, Sample(views(), other), 0.0).total > 0.1
        with pytest.raises(InputError, match="no labels"):
            objective(model, Sample(views()), 0.0)
    with Objective(model, config.replace(predictions=1.0)) as objective:
        assert not any(name.startswith("task") for name in objective(model, Sample(views()), 0.0).parts)


def naive_local(model: nn.Module, images: Tensor, config: DistillConfig) -> dict[str, Tensor]:
    """Each block by hand: its dense twin on its own input."""
    twin = dense_testbed()
    agg, other = model.aggregator, twin.aggregator
    inputs: dict[str, tuple[Tensor, Tensor]] = {}
    for name in ("global_blocks.0", "global_blocks.1"):
        agg.get_submodule(name).register_forward_pre_hook(
            lambda _, args, kwargs, name=name: inputs.update({name: (args[0], kwargs["pos"])}), with_kwargs=True
        )
    with torch.no_grad():
        model(images)
    for name, (x, pos) in inputs.items():
        attention: list[Tensor] = []
        hooks = [m.get_submodule(name).attn.register_forward_hook(lambda _, __, out, to=attention: to.append(out)) for m in (other, agg)]
        with torch.no_grad():
            true = other.get_submodule(name)(x, pos=pos)
        mine = agg.get_submodule(name)(x, pos=pos)
        s, t = (out.unflatten(1, (VIEWS, -1)) for out in (mine, true))
        loss = config.blocks * feature_loss(s[:, :, SPECIAL:], t[:, :, SPECIAL:]) / 2
        loss = loss + config.cameras * feature_loss(s[:, :, :SPECIAL], t[:, :, :SPECIAL]) / 2
        (loss + config.attention * feature_loss(attention[1], attention[0]) / 2).backward()
        for hook in hooks:
            hook.remove()
    return gradients(model)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_local_gradients_are_those_of_each_block_by_itself(checkpointing: bool) -> None:
    config = EVERYTHING.replace(mode="local")
    expected = naive_local(student_testbed(), views(), config)
    model = student_testbed()
    if checkpointing:
        recompute_blocks(model)
    losses = run(model, config, views())
    assert not losses.total.requires_grad
    assert set(losses.parts) == {"attention", "blocks", "cameras"}
    assert_same(gradients(model), expected, rtol=1e-5)
    with torch.no_grad():
        again = run(model, config, views())
    assert torch.equal(again.total, losses.total)
    assert gradients(model) == {}


def test_local_under_autocast_keeps_no_casts_of_the_teacher() -> None:
    """A weight that was cast without gradients, and kept, would have none."""
    model = student_testbed(lora=False)
    model.aggregator.global_blocks.requires_grad_(True)
    with torch.autocast("cpu"):
        run(model, EVERYTHING.replace(mode="local"), views())
    learned = gradients(model)
    assert learned.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(x.abs().max() > 0 for x in learned.values())


def noisy(model: Testbed) -> Testbed:
    """It draws from all global generators before and inside of its blocks, whatever mode it is in."""

    def shaken(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0] + torch.randn_like(args[0]) * random.random() + np.random.rand(), *args[1:])

    model.register_forward_pre_hook(shaken)
    for block in (*model.aggregator.frame_blocks, *model.aggregator.global_blocks):
        block.mlp.register_forward_pre_hook(shaken)
    return model


@pytest.mark.parametrize("mode", ["end_to_end", "local"])
def test_student_and_teacher_draw_the_same_numbers(mode: Any) -> None:
    model = apply_lite3r(dense_testbed(), **(FIELDS | {"dense_below": 10**6}))  # dense: nothing but draws could differ
    add_lora(noisy(model), rank=2)
    config = DistillConfig(mode=mode)
    states = random.getstate(), np.random.get_state()[1].tolist()  # pyright: ignore[reportIndexIssue, reportAttributeAccessIssue]
    totals = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        totals.append(run(model, config, views()).total.item())
    assert max(totals) < 1e-5
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states  # pyright: ignore[reportIndexIssue, reportAttributeAccessIssue]
    seen: list[Tensor] = []
    model.aggregator.global_blocks[0].mlp.register_forward_hook(lambda _, args, out: seen.append(args[0]))
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        run(model, config, views())
    first, again, other = seen[0], seen[2], seen[4]
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


def test_features_go_with_the_graph() -> None:
    model = student_testbed()
    recompute_blocks(model)
    outputs: list[weakref.ref[Tensor]] = []
    model.aggregator.global_blocks[0].register_forward_hook(lambda _, __, out: outputs.append(weakref.ref(out)))
    with Objective(model, EVERYTHING) as objective:
        losses = objective(model, Sample(views()), 0.0)
        losses.total.backward()
        losses = losses.parts
        assert len(outputs) >= 2
        assert all(output() is None for output in outputs)


def test_local_keeps_the_graph_of_one_block_only() -> None:
    model = student_testbed()
    alive: list[int] = []
    graphs: list[Any] = []

    class Saved:
        pass

    def pack(tensor: Tensor) -> Any:
        graphs.append(weakref.ref(kept := Saved()))
        kept.tensor = tensor
        return kept

    for block in model.aggregator.global_blocks:
        block.register_forward_pre_hook(lambda *_: alive.append(sum(ref() is not None for ref in graphs)))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        run(model, EVERYTHING.replace(mode="local"), views())
    assert len(graphs) > 20
    assert max(alive) == 0


def test_local_refuses_what_it_cannot_stop_at() -> None:
    config = EVERYTHING.replace(mode="local")
    model = student_testbed()
    copied = copy.deepcopy(model)
    copied.aggregator.global_blocks[0].compile(backend="eager")
    with pytest.raises(ConfigError, match="is compiled"):
        run(copied, config, views())
    model.aggregator.global_blocks[1].register_forward_pre_hook(lambda _, args: (args[0].add_(1.0),))
    with pytest.raises(AdapterError, match="in place"):
        run(model, config, views())
    with pytest.raises(ConfigError, match="no transformer block"):
        run(student_testbed().requires_grad_(False), config, views())


class TwoStreams(nn.Module):
    """A block that leads two sequences on and gives out weights of something besides, as matchers of two images do."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.attn = Attention(dim, 2)

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return a + self.attn(a), b + self.attn(b), a.new_ones(1, 2, 3, 4)


class Matcher(nn.Module):
    def __init__(self, dim: int = 32) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TwoStreams(dim) for _ in range(2))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        for layer in self.layers:
            a, b, _ = layer(a, b)
        return a @ b.mT


def test_every_sequence_that_a_block_gives_out_is_compared(adapter: Adapter) -> None:
    adapter.answer = lambda model: [AttentionSite(f"layers.{i}.attn", "frame", 16, FusedQKV(2, attn_drop="attn_drop")) for i in range(2)]
    torch.manual_seed(1)
    model = apply_lite3r(Matcher().eval(), **FIELDS)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("proj_lin" in name)
    a, b = torch.randn(1, 70, 32), torch.randn(1, 50, 32)
    outputs: list[tuple[Tensor, ...]] = []
    hooks = [layer.register_forward_hook(lambda _, __, out: outputs.append(out[:2])) for layer in model.layers]
    with torch.no_grad():
        model(a, b)
        with lite3r_disabled(model):
            model(a, b)
    for hook in hooks:
        hook.remove()
    mine, true = outputs[:2], outputs[2:]
    expected = torch.stack([feature_loss(s, t) for pair in zip(mine, true, strict=True) for s, t in zip(*pair, strict=True)]).mean()
    with Objective(model, DistillConfig(predictions=0.0)) as objective:
        losses = objective(model, Sample((a, b)), 0.0)
    assert losses.parts.keys() == {"blocks"}
    torch.testing.assert_close(losses.total, expected)
    losses.total.backward()
    assert all(layer.attn.proj_lin.weight.grad.abs().sum() > 0 for layer in model.layers)
