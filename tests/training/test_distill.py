"""`distill`: only what is to learn changes, towards the dense model; everything else is as before, whatever happens."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import croco_hosts
import pytest
import torch
from distilling import FIELDS, inputs, logged, metrics, sparse_toy, toy
from interruptions import contents, interrupted
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from toys import Adapter, Toy, toy_answer

import lite3r_plugin
from lite3r_plugin import (
    DistillConfig,
    apply_lite3r,
    calibrate,
    convert,
    describe,
    distill,
    lite3r_disabled,
    load_lite3r,
    remove_lite3r,
    save_lite3r,
)
from lite3r_plugin.adapter import plugins
from lite3r_plugin.adapter.outputs import tensors_of
from lite3r_plugin.apply.lookup import lite3r_modules
from lite3r_plugin.errors import (
    CheckpointError,
    ConfigError,
    ConvertedError,
    InputError,
    ModelTypeError,
    NotAppliedError,
    TrainingError,
    WeightsError,
)
from lite3r_plugin.peft import Lite3RPeftConfig, add_lora, merge_lora
from lite3r_plugin.testbed import Testbed, TestbedConfig
from lite3r_plugin.testing import TEST_CONFIG
from lite3r_plugin.training import checkpoint
from lite3r_plugin.training.data import Sample
from lite3r_plugin.training.losses import tensor_losses
from lite3r_plugin.training.teacher import as_teacher
from lite3r_plugin.wrapper import is_lora, keeps_copies


@pytest.fixture(autouse=True)
def _toy() -> Iterator[None]:
    adapter = Adapter(toy_answer)
    plugins.get_manager().register(adapter, name="toy")
    yield
    plugins.get_manager().unregister(adapter)


class Faulty(list[Tensor]):
    """A list that raises when it is asked for an item for the n-th time; as soon as its turn comes."""

    def __init__(self, items: list[Tensor], calls: int, error: BaseException) -> None:
        super().__init__(items)
        self.calls, self.error = calls, error

    def __getitem__(self, index: Any) -> Any:
        self.calls -= 1
        if self.calls == 0:
            raise self.error
        return super().__getitem__(index)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def changed(model: nn.Module, before: dict[str, Tensor]) -> set[str]:
    return {name for name, value in model.state_dict().items() if name in before and not torch.equal(value, before[name])}


def tiny_testbed(**fields: Any) -> nn.Module:
    model = Testbed(TestbedConfig(dim=32, depth=1, head_dim=16, stem=8, registers=1)).eval()
    return apply_lite3r(model, **{"keep_ratio": 0.15, "block_q": 16, "block_k": 16, "pin": "special", **fields})


def error_against_dense(model: nn.Module) -> float:
    others = [x + 0.3 for x in inputs(3)]
    lite3r_modules(model)["cross.0"].state.config = lite3r_modules(model)["cross.0"].state.config.replace(dense_below=0)
    with torch.no_grad():
        sparse = torch.stack([model(x) for x in others])
        with as_teacher(model):
            return (sparse - torch.stack([model(x) for x in others])).square().mean().item()


@pytest.mark.parametrize(
    "fields",
    [
        {"trainable": "proj"},
        pytest.param({}, marks=pytest.mark.slow),
        {"mode": "local", "attention": 1.0},
        pytest.param({"attention": (1.0, 0.1), "ema": 0.5}, marks=pytest.mark.slow),
    ],
)
def test_comes_closer_to_dense_on_other_inputs(fields: dict[str, Any]) -> None:
    model = sparse_toy()
    before = error_against_dense(model)
    result = distill(model, inputs(8), steps=30, learning_rate=1e-3, **fields)
    assert error_against_dense(model) < 0.8 * before
    assert result.last_loss is not None
    assert result.first_loss is not None
    assert result.last_loss < result.first_loss
    assert (result.steps, result.samples, result.stopped) == (30, 30, "all steps are done")


@pytest.mark.parametrize(
    ("trainable", "kinds"),
    [
        ("proj", {"proj_lin"}),
        ("proj+lora", {"proj_lin", "lora_A", "lora_B"}),
        ("proj+norms", {"proj_lin", "norm1", "norm2", "q_norm", "k_norm"}),
        ("blocks", {"proj_lin", "norm1", "norm2", "q_norm", "k_norm", "qkv", "proj", "mlp", "ls1", "ls2"}),
    ],
)
def test_only_what_is_named_changes(trainable: Any, kinds: set[str]) -> None:
    model = tiny_testbed()
    data = list(torch.rand(2, 1, 3, 3, 48, 48))
    if trainable == "proj+lora":
        add_lora(model, rank=2)
    before = state(model)
    result = distill(model, data, trainable=trainable, steps=2, warmup_steps=0)
    names = changed(model, before)
    assert result.learned == sum(before[name].numel() for name in names)
    blocks = ("global_blocks.0.", "frame_blocks.0.attn.") if trainable == "proj+lora" else ("global_blocks.0.",)
    assert all(name.removeprefix("aggregator.").startswith(blocks) for name in names)
    assert {next((kind for kind in kinds if kind in name.split(".")), name) for name in names} == kinds


def test_one_of_several_processes_does_not_train_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    model = sparse_toy()
    before = contents(model)
    with pytest.raises(ConfigError, match="started 2 processes"):
        distill(model, inputs(2), trainable="proj", steps=1)
    assert contents(model) == before


def test_everything_else_is_as_before() -> None:
    model = sparse_toy(dense_below=10).train()
    model.head.weight.requires_grad_(False)
    model.head.bias.grad = torch.ones(1)
    model.frame[0].eval()
    before, random = contents(model), torch.get_rng_state()
    distill(model, inputs(), trainable="proj", steps=2, checkpointing=True)
    after = contents(model)
    assert {key: after[key] for key in after if key != "values"} == {key: before[key] for key in before if key != "values"}
    assert [m.training for m in model.modules()].count(False) == len(list(model.frame[0].modules()))
    assert torch.equal(model.head.bias.grad, torch.ones(1))
    assert lite3r_modules(model)["cross.0"].state.config.dense_below == 10
    assert torch.equal(torch.get_rng_state(), random)


def test_the_teacher_is_the_dense_model_whatever_lora_learned() -> None:
    model = sparse_toy()
    x = inputs(1)[0]
    expected = toy()(x)
    distill(model, inputs(), steps=3, learning_rate=1e-2)
    with as_teacher(model):
        assert torch.equal(model(x), expected)
    remove_lite3r(model)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_teacher_does_not_follow_its_student(checkpointing: bool) -> None:
    model, data = sparse_toy(dense_below=0), inputs(2)
    only: dict[str, Any] = {"trainable": "blocks", "blocks": 0.0, "cameras": 0.0, "checkpointing": checkpointing}
    result = distill(model, data, steps=8, learning_rate=1e-4, warmup_steps=0, validation=data, **only)
    with torch.no_grad():
        errors = [tensor_losses(tensors_of(model(x)), tensors_of(toy()(x)))["other"].item() for x in data]
    assert result.best_step
    assert result.best == pytest.approx(sum(errors) / len(errors), rel=1e-5)
    assert any("were trained" in note for note in describe(model).notes)


def test_what_learned_of_the_model_itself_is_not_left_out_of_a_checkpoint(tmp_path: Path) -> None:
    model, x = sparse_toy(), inputs(1)[0]
    distill(model, inputs(2), trainable="blocks", steps=1)
    with pytest.raises(CheckpointError, match="whole=True"):
        save_lite3r(model, tmp_path)
    assert not list(tmp_path.iterdir())
    save_lite3r(model, tmp_path / "1", whole=True)
    loaded = load_lite3r(toy(), tmp_path / "1")
    assert torch.equal(loaded(x), model(x))
    with pytest.raises(CheckpointError, match="whole=True"):  # nor out of the next
        save_lite3r(loaded, tmp_path / "2")
    assert [line for line in str(describe(loaded)).splitlines() if "were trained" in line] == [
        line for line in str(describe(model)).splitlines() if "were trained" in line
    ]
    save_lite3r(loaded, tmp_path / "2", whole=True)
    assert torch.equal(load_lite3r(toy(), tmp_path / "2")(x), model(x))


def test_a_host_in_half_precision_trains_what_is_in_full() -> None:
    model = apply_lite3r(toy().bfloat16(), **FIELDS)
    result = distill(model, [x.bfloat16() for x in inputs(1)], steps=8, learning_rate=1e-3)
    assert result.last_loss is not None
    assert result.first_loss is not None
    assert result.last_loss < result.first_loss
    assert model.head.weight.dtype == torch.bfloat16


def test_lora_that_is_there_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    model = sparse_toy()
    names = add_lora(model, rank=2)
    distill(model, inputs(), steps=2)
    assert model.get_parameter(f"{names[0]}.lora_A.default.weight").shape[0] == 2
    assert "goes on, of rank 2 and alpha 2 around 8 Linears; lora_rank=16 would be" in capsys.readouterr().err
    distill(model, inputs(), steps=2, lora_rank=2)
    assert "goes on" not in capsys.readouterr().err
    before = contents(model)
    for wrong in ({"lora_rank": 3}, {"lora_rank": 16}, {"config": DistillConfig(lora_alpha=8)}, {"lora_scopes": ("global",)}):
        with pytest.raises(ConfigError, match=f"the model has LoRA already.*{'lora_alpha' if 'config' in wrong else next(iter(wrong))}"):
            distill(model, inputs(), steps=2, **wrong)
    assert contents(model) == before


@pytest.mark.parametrize("precision", ["full", "fp8_qat"])
def test_the_active_adapter_of_peft_learns(precision: Any, tmp_path: Path) -> None:
    model: Any = get_peft_model(toy(), Lite3RPeftConfig(**FIELDS, precision=precision, r=2, lora_scopes=("global",)))  # pyright: ignore
    model.add_adapter("other", Lite3RPeftConfig(**FIELDS, precision=precision, r=2, lora_scopes=("global",)))
    before, trains = state(model), [(name, p.requires_grad) for name, p in model.named_parameters()]
    result = distill(model, inputs(), steps=20, learning_rate=1e-3)
    assert result.first_loss is not None
    assert result.last_loss is not None
    assert result.last_loss < 0.8 * result.first_loss
    names = changed(model, before)
    assert all(
        "proj_lin.modules_to_save.default" in name or ("cross" in name and "lora_" in name and ".default." in name) for name in names
    )
    assert len(names) == 2 * (1 + 2 * 2)  # blocks, of a linear branch and two Linears
    assert [(name, p.requires_grad) for name, p in model.named_parameters()] == trains
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(toy(), str(tmp_path))
    x = inputs(1)[0]
    assert torch.equal(loaded(x), model(x))
    with model.disable_adapter():
        assert torch.equal(model(x), toy()(x))


@pytest.mark.parametrize("trainable", ["proj+norms", "blocks", "proj+lora"])
def test_what_an_adapter_of_peft_would_not_hold_does_not_learn(trainable: Any) -> None:
    model: Any = get_peft_model(toy(), Lite3RPeftConfig(**FIELDS, lora_scopes=()))
    before = contents(model)
    with pytest.raises(ConfigError, match=r"adapter of PEFT in .*proj_lin.*would not hold"):
        distill(model, inputs(), trainable=trainable, steps=1)
    assert contents(model) == before
    distill(model, inputs(), trainable="proj", steps=1)


def test_checkpointing_learns_the_same(tmp_path: Path) -> None:
    for name in ("kept", "again"):
        distill(sparse_toy(), inputs(), steps=4, **logged(tmp_path / name, checkpointing=name == "again"))
    assert metrics(tmp_path / "again") == pytest.approx(metrics(tmp_path / "kept"), rel=1e-5)


def test_the_learning_rate_rises_and_falls(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"trainable": "proj", "learning_rate": 1.0, "final_learning_rate": 0.5, "warmup_steps": 2}
    distill(sparse_toy(), inputs(), steps=5, **logged(tmp_path, **fields))
    assert list(metrics(tmp_path, "learning_rate").values()) == pytest.approx([0.5, 0.9, 0.8, 0.7, 0.6])


def test_steps_are_counted_in_batches_of_batches() -> None:
    config = DistillConfig(trainable="proj", epochs=3, accumulate=2, batch_size=2)
    result = distill(sparse_toy(), inputs(8), config)
    assert (result.steps, result.samples) == (6, 24)


def test_a_run_by_the_clock_ends() -> None:
    result = distill(sparse_toy(), inputs(), trainable="proj", minutes=0.01)
    assert result.stopped == "the time is over"
    assert result.steps > 1


def test_the_best_weights_are_kept_and_patience_ends_it() -> None:
    model = sparse_toy()
    branch = lite3r_modules(model)["cross.0"].proj_lin.weight
    measures, seen = iter([5.0, 3.0, 4.0, 3.5, 1.0]), []

    def measure(given: nn.Module) -> float:
        assert given is model
        seen.append(branch.detach().clone())
        return next(measures)

    result = distill(model, inputs(), trainable="proj", steps=50, validation=measure, validate_every=1, patience=2)
    assert (result.best, result.best_step, result.steps) == (3.0, 1, 3)
    assert "2 validations" in result.stopped
    assert torch.equal(branch, seen[1])
    assert not torch.equal(branch, seen[3])


def test_the_average_is_what_the_model_has_in_the_end() -> None:
    plain, model = sparse_toy(), sparse_toy()
    branch, averaged = (lite3r_modules(each)["cross.0"].proj_lin.weight for each in (plain, model))
    weights: list[Tensor] = []
    distill(plain, _Watched(inputs(), lambda: weights.append(branch.detach().clone())), trainable="proj", steps=3)
    expected = weights[0]
    for step, value in enumerate((*weights[1:], branch.detach()), 1):
        expected = expected.lerp(value, 1 - min(0.3, (1 + step) / (10 + step)))
    distill(model, inputs(), trainable="proj", steps=3, ema=0.3)
    assert torch.equal(averaged, expected)
    assert not torch.equal(averaged, branch)


def test_the_average_is_what_is_judged() -> None:
    model, judged = sparse_toy(), []
    branch = lite3r_modules(model)["cross.0"].proj_lin.weight

    def measure(_: nn.Module) -> float:
        judged.append(branch.detach().clone())
        return -float(len(judged))

    distill(model, inputs(), trainable="proj", steps=2, ema=0.9, validation=measure, validate_every=1)
    assert torch.equal(branch, judged[-1])
    assert len(judged) == 3


class _Watched(list[Tensor]):
    """A list that says when it is asked for an item."""

    def __init__(self, items: list[Tensor], told: Callable[[], object]) -> None:
        super().__init__(items)
        self.told = told

    def __getitem__(self, index: Any) -> Any:
        self.told()
        return super().__getitem__(index)


# Bad input


def converted() -> nn.Module:
    return convert(sparse_toy(precision="fp8_qat"), fp8_backend="emulated")


class TwoToys(nn.Module):
    """Two models with Lite3R in one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = sparse_toy(), sparse_toy()


def half() -> nn.Module:
    return sparse_toy().half()


def flattened() -> nn.Module:
    """As FullyShardedDataParallel leaves a module."""
    model = sparse_toy()
    model.head.register_parameter("_flat_param", nn.Parameter(torch.zeros(1)))
    return model


@pytest.mark.parametrize(
    ("model", "data", "fields", "error", "says"),
    [
        (sparse_toy, [], {}, InputError, "there is no data: the list is empty"),
        (sparse_toy, iter([]), {}, InputError, "ended before the first step"),
        (sparse_toy, "photos", {}, InputError, "got str: put"),
        (sparse_toy, torch.zeros(1, 3, 3, 24, 24), {}, InputError, "got Tensor: put"),
        (sparse_toy, {"images": 1}, {}, InputError, "got dict"),
        (sparse_toy, None, {}, InputError, "got NoneType"),
        (sparse_toy, inputs(2, views=1), {}, InputError, "one view in each sample"),
        (sparse_toy, inputs(2), {"validation": iter([])}, InputError, "run through again and again"),
        (sparse_toy, inputs(2), {"validation": []}, InputError, "no validation data"),
        (sparse_toy, iter(inputs(2)), {"steps": None, "epochs": 1}, ConfigError, "epochs need data that tells its length"),
        (sparse_toy, iter(inputs(2)), {"workers": 1}, ConfigError, "workers=0"),
        (sparse_toy, torch.utils.data.DataLoader(inputs(2)), {"batch_size": 2}, ConfigError, "belong to the DataLoader"),
        (sparse_toy, inputs(2), {"stepps": 3}, ConfigError, r"unknown .*stepps"),
        (sparse_toy, inputs(2), {"config": {"steps": 3}}, ConfigError, "config is a DistillConfig"),
        (converted, inputs(2), {}, ConvertedError, "before convert"),
        (Toy, inputs(2), {}, NotAppliedError, "apply_lite3r"),
        (TwoToys, inputs(2), {}, NotAppliedError, "2 parts"),
        (lambda: 3, inputs(2), {}, ModelTypeError, "got int"),
        (lambda: sparse_toy(linear_branch="none"), inputs(2), {}, ConfigError, "linear_branch is 'none'"),
        (lambda: sparse_toy(keep_ratio=1.0), inputs(2), {}, ConfigError, "nothing to learn"),
        (half, inputs(2), {"trainable": "blocks"}, WeightsError, "float16"),
        (flattened, inputs(2), {}, WeightsError, "use fully_shard"),
        (lambda: sparse_toy().to("meta"), inputs(2), {}, WeightsError, "meta"),
        (sparse_toy, inputs(2), {"lora_scopes": ("encoder",)}, lite3r_plugin.errors.NoSitesError, "encoder"),
    ],
)
def test_bad_input_is_refused_and_leaves_the_model(
    model: Callable[[], Any], data: Any, fields: dict[str, Any], error: type[Exception], says: str
) -> None:
    made = model()
    before = contents(made) if isinstance(made, nn.Module) and not any(p.is_meta for p in made.parameters()) else None
    with pytest.raises(error, match=says):
        distill(made, data, **{"steps": 2, **fields})
    assert before is None or contents(made) == before


def test_an_output_folder_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    model = sparse_toy()
    for folder, says in ((tmp_path, "not empty: pass resume=True"), (tmp_path / "file", "cannot be used")):
        with pytest.raises(InputError, match=says):
            distill(model, inputs(), steps=1, output_dir=folder)
    assert lite3r_modules(model)["cross.0"].calls.sparse == 0


def test_a_parameter_without_a_gradient_is_named() -> None:
    model = sparse_toy()
    model.cross[1].forward = lambda x: x  # as if that site were skipped
    with pytest.raises(TrainingError, match=r"1 of 2 parameters .* such as cross\.1\.proj_lin"):
        distill(model, inputs(), trainable="proj", steps=2)


def test_data_that_sparse_attention_takes_whole_is_refused() -> None:
    model = sparse_toy(block_q=128, block_k=128)
    with pytest.raises(TrainingError, match="all gradients of the first step are 0"):
        distill(model, inputs(), trainable="proj", steps=2)


def test_labels_are_taken() -> None:
    model = tiny_testbed()
    image = torch.rand(1, 3, 3, 48, 48)
    labels = lite3r_plugin.training.data.ModelOutputs(depth=torch.ones(1, 3, 48, 48))
    only_labels: dict[str, Any] = {"task": 1.0, "predictions": 0.0, "blocks": 0.0, "cameras": 0.0}
    result = distill(model, [Sample(image, labels)], trainable="proj", steps=1, **only_labels)
    assert set(result.losses) == {"task/depth"}
    with pytest.raises(InputError, match="label"):
        distill(model, [image], trainable="proj", steps=1, **only_labels)


# What goes wrong on the way


def test_a_gradient_that_is_not_finite_stops_at_the_last_good_weights(tmp_path: Path) -> None:
    good, model = sparse_toy(), sparse_toy()
    fields: dict[str, Any] = {"trainable": "proj", "schedule": "constant", "warmup_steps": 0}
    data = inputs(6)
    distill(good, iter(data[:3]), steps=9, **fields)
    data[3] = data[3] * float("nan")
    with pytest.raises(TrainingError, match=r"not finite at step 4: .* weights of step 3, the last good ones; what was saved is in"):
        distill(model, iter(data), steps=6, **logged(tmp_path, save_every=1, **fields))
    assert list(metrics(tmp_path)) == [1, 2, 3]
    assert checkpoint.saved_step(tmp_path) == 3
    assert changed(model, state(good)) == set()


@pytest.mark.parametrize("trainable", ["blocks", "proj+lora"])
def test_only_the_weights_that_a_run_started_from_go_on(trainable: Any, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"trainable": trainable, "learning_rate": 1e-3, "warmup_steps": 0, "output_dir": str(tmp_path)}
    model = sparse_toy()
    with pytest.raises(KeyboardInterrupt):
        distill(model, Faulty(inputs(), 4, KeyboardInterrupt()), steps=6, save_every=1, **fields)
    if trainable == "proj+lora":
        distill(model, inputs(), steps=6, resume=True, **fields)  # nothing of the dense model has changed
        merge_lora(model)
    with pytest.raises(CheckpointError, match="not those that the run in"):
        distill(model, inputs(), steps=8, resume=True, **fields)
    distill(sparse_toy(), inputs(), steps=8, resume=True, **fields)


def test_what_validation_does_to_the_model_is_taken_back() -> None:
    def measure(model: nn.Module) -> float:
        with torch.enable_grad():
            model.eval()(inputs(1)[0]).sum().backward()
        model.train()
        model.requires_grad_(True)
        return 1.0

    fields: dict[str, Any] = {"trainable": "proj", "steps": 4}
    model, plain = sparse_toy(), sparse_toy()
    distill(model, inputs(), validation=measure, **fields)
    distill(plain, inputs(), validation=lambda model: 1.0, **fields)
    assert changed(model, state(plain)) == set()
    assert [module.training for module in model.modules()] == [module.training for module in plain.modules()]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_model_that_changes_its_input_is_refused() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.toy = toy()

        def forward(self, x: Tensor) -> Tensor:
            return self.toy(x.mul_(2))

    model = apply_lite3r(InPlace().eval(), **FIELDS)
    with pytest.raises(InputError, match="changes its input in place"):
        distill(model, inputs(), trainable="proj", steps=1)


def test_weights_that_make_the_loss_infinite_are_taken_back() -> None:
    model = sparse_toy()
    before = state(model)
    with pytest.raises(TrainingError, match=r"the loss is not finite at step 2: the model has the weights of step 0"):
        distill(model, inputs(), trainable="proj", steps=6, learning_rate=1e30, warmup_steps=0)
    assert changed(model, before) == set()


@pytest.mark.parametrize("value", [None, "0.5", [1.0, 2.0], torch.ones(2), 1j])
def test_a_measure_that_is_no_number_is_refused_before_the_first_step(value: Any) -> None:
    data = Faulty(inputs(), 1, AssertionError("a step was taken"))
    with pytest.raises(InputError, match=r"validation is a function of the model that returns a number, .*; it returned"):
        distill(sparse_toy(), data, trainable="proj", steps=2, validation=lambda model: value)


def test_a_measure_may_be_a_tensor() -> None:
    result = distill(sparse_toy(), inputs(), trainable="proj", steps=1, validation=lambda model: torch.tensor([0.5]))
    assert result.best == 0.5


def test_a_run_that_was_over_goes_on_to_the_same_numbers(tmp_path: Path) -> None:
    first = distill(sparse_toy(), inputs(), trainable="proj", steps=2, output_dir=tmp_path)
    again = distill(sparse_toy(), inputs(), trainable="proj", steps=2, output_dir=tmp_path, resume=True)
    assert again.samples_per_second == pytest.approx(first.samples / first.seconds)
    assert (again.steps, again.last_loss) == (first.steps, first.last_loss)


class Asked(Toy):
    """Takes a second argument and fails at what is none, as models with queries do."""

    def forward(self, images: Tensor, queries: Tensor | None = None) -> Tensor:
        if queries is not None and queries.shape[-1] != 2:
            raise RuntimeError("The size of tensor a (1) must match the size of tensor b (2)")
        return super().forward(images)


class Masked(Toy):
    """Takes a mask as its second argument."""

    def forward(self, images: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(images, mask=mask)


@pytest.mark.parametrize(
    ("make", "item", "says"),
    [
        (Toy, (inputs(1)[0], 3), r"\(Tensor \[1, 3, 3, 24, 24\], int\): too many positional arguments. .*Leave labels"),
        (Asked, [inputs(1)[0], torch.tensor([3])], r"Tensor \[1\]\): tensor\(\[3\]\) was passed to it by position"),
        (Masked, (inputs(1)[0], torch.tensor([3])), r"was passed to it by position"),
        (Asked, {"images": inputs(1)[0], "label": 3}, r"label=int\): got an unexpected keyword argument 'label'"),
        (Asked, {"queries": torch.ones(1, 2)}, r"missing a required argument: 'images'"),
        (Toy, object(), r"\(object\): there is no tensor in it"),
    ],
)
def test_items_that_are_no_inputs_are_named(make: type[Toy], item: Any, says: str) -> None:
    model = apply_lite3r(make(), **FIELDS)
    before = contents(model)
    for run in (lambda: distill(model, [item], trainable="proj", steps=1), lambda: calibrate(model, [item, item])):
        with pytest.raises(InputError, match=says):
            run()
        assert contents(model) == before


def test_errors_of_the_model_itself_are_not_explained_away() -> None:
    model = apply_lite3r(Asked(), **FIELDS)
    with pytest.raises(RuntimeError, match="must match the size"):
        distill(model, [(inputs(1)[0], torch.ones(1, 3))], trainable="proj", steps=1)


def test_a_measure_that_is_not_finite_stops() -> None:
    with pytest.raises(TrainingError, match="validation after step 0 is nan"):
        distill(sparse_toy(), inputs(), steps=2, validation=lambda model: float("nan"))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("network")])
def test_after_an_interruption_the_model_has_the_weights_of_the_last_step(error: BaseException, capsys: pytest.CaptureFixture) -> None:
    whole, model = sparse_toy(), sparse_toy()
    fields: dict[str, Any] = {"trainable": "proj", "schedule": "constant", "warmup_steps": 0}
    before = contents(model)
    distill(whole, inputs(), steps=3, **fields)
    with pytest.raises(type(error)):
        distill(model, Faulty(inputs(), 4, error), steps=9, **fields)
    assert f"{type(error).__name__}; the model has the weights of step 3" in capsys.readouterr().err
    assert changed(model, state(whole)) == set()
    after = contents(model)
    assert {key: after[key] for key in after if key != "values"} == {key: before[key] for key in before if key != "values"}


@pytest.mark.slow
def test_an_interruption_anywhere_leaves_the_model_usable() -> None:
    """Before lines that are spread over the whole run: nothing but the weights is another than before, and they are finite."""
    for line in range(150, 3200, 290):
        model = sparse_toy()
        before = contents(model)
        done = not interrupted(lambda model=model: distill(model, inputs(2), trainable="proj", steps=2), line)
        after = contents(model)
        assert {key: after[key] for key in after if key != "values"} == {key: before[key] for key in before if key != "values"}
        assert all(value.isfinite().all() for value in state(model).values())
        with lite3r_disabled(model):
            model(inputs(1)[0])
        if done:
            break
    else:
        return
    assert line > 1000


def test_a_full_disk_is_named_and_nothing_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, whole = sparse_toy(), sparse_toy()
    write, calls = checkpoint.save_file, iter(range(99))

    def save_file(tensors: Any, path: Path, metadata: Any) -> None:
        if next(calls) == 1:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        write(tensors, path, metadata)

    monkeypatch.setattr(checkpoint, "save_file", save_file)
    fields: dict[str, Any] = {"steps": 6, "trainable": "proj", "save_every": 2}
    with pytest.raises(CheckpointError, match=r"step 4 .*No space left on device; that of step 2 is whole.*weights in memory.*step 4"):
        distill(model, inputs(), **logged(tmp_path / "a", **fields))
    assert [path.name for path in (tmp_path / "a").iterdir() if path.name.startswith(".")] == []
    distill(sparse_toy(), inputs(), resume=True, **logged(tmp_path / "a", **fields))
    distill(whole, inputs(), **logged(tmp_path / "b", **fields))
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")


# Going on


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"trainable": "blocks", "accumulate": 2}, marks=pytest.mark.slow),
        {"ema": 0.9, "batch_size": 2, "trainable": "proj"},
        pytest.param({"mixed_precision": "bf16"}, marks=pytest.mark.slow),
    ],
)
def test_a_stopped_run_goes_on_to_the_same_losses_and_weights(fields: dict[str, Any], tmp_path: Path) -> None:
    whole, model = sparse_toy(), sparse_toy()
    fields = {"steps": 8, "save_every": 1, "validate_every": 3, "validation": inputs(2), **fields}
    distill(whole, inputs(), **logged(tmp_path / "whole", **fields))
    items = 5 * fields.get("accumulate", 1) * fields.get("batch_size", 1) + 2
    with pytest.raises(KeyboardInterrupt):
        distill(sparse_toy(), Faulty(inputs(), items, KeyboardInterrupt()), **logged(tmp_path / "parts", **fields))
    before = metrics(tmp_path / "parts")
    assert 2 < len(before) < 8
    result = distill(model, inputs(), **logged(tmp_path / "parts", resume=True, **fields))
    for name in ("loss", "gradient_norm", "learning_rate", "validation"):
        assert metrics(tmp_path / "parts", name) == metrics(tmp_path / "whole", name)
    assert changed(model, state(whole)) == set()
    assert result.steps == 8


def test_a_generator_and_a_loader_go_on_where_they_were(tmp_path: Path) -> None:
    def stream() -> Iterator[Tensor]:
        yield from inputs(9)

    def loader() -> torch.utils.data.DataLoader[Tensor]:
        return torch.utils.data.DataLoader([x[0] for x in inputs(7)], batch_size=2, shuffle=True)

    for kind in (stream, loader):
        whole, parts = tmp_path / f"{kind.__name__}-whole", tmp_path / f"{kind.__name__}-parts"
        fields: dict[str, Any] = {"trainable": "proj", "schedule": "constant", "warmup_steps": 0}
        distill(sparse_toy(), kind(), steps=6, **logged(whole, **fields))
        distill(sparse_toy(), kind(), steps=3, **logged(parts, **fields))
        distill(sparse_toy(), kind(), steps=6, **logged(parts, resume=True, **fields))
        assert metrics(parts) == metrics(whole)
        assert len(metrics(parts)) == 6


def test_data_that_ends_ends_the_run() -> None:
    result = distill(sparse_toy(), (x for x in inputs(3)), trainable="proj", steps=9)
    assert (result.steps, result.stopped) == (3, "the data ended")


def test_resuming_without_a_state_starts_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert distill(sparse_toy(), inputs(), trainable="proj", steps=1, output_dir=tmp_path, resume=True).steps == 1
    assert "nothing to go on from" in capsys.readouterr().err
    assert distill(sparse_toy(), inputs(), trainable="proj", steps=1, output_dir=tmp_path, resume=True).steps == 1
    assert "going on from step 1" in capsys.readouterr().err


def test_resuming_with_what_auto_comes_to(tmp_path: Path) -> None:
    distill(sparse_toy(), inputs(), trainable="proj", steps=1, output_dir=tmp_path)
    model = sparse_toy(block_choice=describe(sparse_toy()).config.chosen_by)
    assert distill(model, inputs(), trainable="proj", steps=2, output_dir=tmp_path, resume=True).steps == 2


@pytest.mark.parametrize(
    ("fields", "lite3r", "says"),
    [
        ({"trainable": "blocks"}, {}, "other parameters"),
        ({"batch_size": 2}, {}, "batch_size was 1, is 2"),
        ({"ema": 0.5}, {}, "ema was None"),
        ({}, {"keep_ratio": 0.2}, "belongs to another model: its configuration"),
    ],
)
def test_a_state_of_another_run_is_refused(fields: dict[str, Any], lite3r: dict[str, Any], says: str, tmp_path: Path) -> None:
    distill(sparse_toy(), inputs(), trainable="proj", steps=1, output_dir=tmp_path)
    model = sparse_toy(**lite3r)
    before = contents(model)
    with pytest.raises(CheckpointError, match=says):
        distill(model, inputs(), **{"trainable": "proj", "steps": 2, "output_dir": tmp_path, "resume": True, **fields})
    assert contents(model) == before


def test_a_damaged_state_is_refused(tmp_path: Path) -> None:
    distill(sparse_toy(), inputs(), trainable="proj", steps=1, output_dir=tmp_path)
    path = tmp_path / checkpoint.STATE_NAME
    whole = path.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    text = whole.index(b'"seconds')
    flipped = [*range(0, 8), *range(header, len(whole), (len(whole) - header) // 20), *range(text, text + 400, 20), len(whole) - 1]
    for place in flipped:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(CheckpointError, match=r"damaged|of another version"):
            checkpoint.read_state(tmp_path)
    path.write_bytes(whole[:-9])
    with pytest.raises(CheckpointError, match="damaged"):
        distill(sparse_toy(), inputs(), trainable="proj", steps=2, output_dir=tmp_path, resume=True)
    path.write_bytes(whole)
    assert checkpoint.read_state(tmp_path) is not None


def test_other_settings_are_said_when_a_run_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    distill(sparse_toy(), inputs(), trainable="proj", steps=1, output_dir=tmp_path)
    distill(sparse_toy(), inputs(), trainable="proj", steps=2, learning_rate=1e-3, output_dir=tmp_path, resume=True)
    assert "other settings: steps was 1, is 2, learning_rate was 0.0005, is 0.001" in capsys.readouterr().err


# What is said


def test_the_first_line_says_what_trains_and_the_second_what_it_costs(capsys: pytest.CaptureFixture) -> None:
    result = distill(sparse_toy(), inputs(), trainable="proj", steps=4)
    first, second, last = capsys.readouterr().err.splitlines()
    assert "proj, 512 of 19,073 parameters learn (2.68%); 4 steps of 1 sample, cpu, float32; loss: normalised error" in first
    assert "a step takes" in second
    assert "to go" in second
    assert last == str(result).splitlines()[0]
    assert "512 of 19,073" in str(result)


def test_tensorboard_is_asked_for_when_it_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("accelerate.utils.is_tensorboard_available", lambda: False)
    with pytest.raises(ConfigError, match="pip install tensorboard"):
        distill(sparse_toy(), inputs(), steps=1, output_dir=tmp_path, trackers=["tensorboard"])


def test_trackers_of_accelerate_get_the_same_numbers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    distill(sparse_toy(), inputs(), trainable="proj", steps=2, output_dir=tmp_path, trackers=["tensorboard"], log_every=1)
    assert list(tmp_path.rglob("events.out*"))


def test_metrics_without_a_half_line(tmp_path: Path) -> None:
    distill(sparse_toy(), inputs(), trainable="proj", steps=2, **logged(tmp_path))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "loss": 1.0}\n{"step": 3, "los')
    distill(sparse_toy(), inputs(), trainable="proj", steps=3, resume=True, **logged(tmp_path))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]


def test_views_that_attend_to_another_are_several() -> None:
    """As in DUSt3R: each site has one view of queries and one of keys."""
    model = apply_lite3r(croco_hosts.make(), TEST_CONFIG, keep_ratio=0.3)
    data = [(croco_hosts.view(48, 64, i), croco_hosts.view(48, 64, i + 9)) for i in range(2)]
    assert distill(model, data, steps=1).steps == 1


def test_a_model_with_a_scripted_part() -> None:
    """Whose tables are not those of other modules."""
    assert not is_lora(torch.jit.script(nn.ReLU()))
    assert not keeps_copies(torch.jit.script(nn.ReLU()))
