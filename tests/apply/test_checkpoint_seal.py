"""What is not as it was saved is refused, and so are numbers that no weight can have, whatever their checksums say."""

from __future__ import annotations

import json
import math
import random
import shutil
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import JSON, WEIGHTS, edit, seal, snapshot
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from toys import Toy, images, toy_adapter

from lite3r_plugin import apply_lite3r, load_lite3r, save_lite3r
from lite3r_plugin.apply.lookup import lite3r_modules
from lite3r_plugin.errors import CheckpointError, WeightsError
from lite3r_plugin.testing import TEST_CONFIG

__all__ = ["toy_adapter"]  # the fixture
pytestmark = pytest.mark.usefixtures("adapter")
KINDS = ("branches", "fp8", "whole", "whole fp8")


def make(kind: str = "branches", branch: float | None = None, toy: Callable[[], Toy] = Toy, **fields: Any) -> Toy:
    """A Toy with Lite3R and with branches that are not zero."""
    model = apply_lite3r(toy().eval(), TEST_CONFIG, precision="fp8" if "fp8" in kind else "full", **fields)
    for module in lite3r_modules(model).values():
        if module.sparse:
            nn.init.normal_(module.proj_lin.weight) if branch is None else nn.init.constant_(module.proj_lin.weight, branch)
    return model


def save(kind: str, folder: Path) -> Path:
    save_lite3r(make(kind), folder, whole="whole" in kind)
    return folder


def refused(folder: Path, match: str, toy: Callable[[], Toy] = Toy) -> None:
    """Loading raises, and the model is what it was."""
    model = toy().eval()
    before = snapshot(model)
    with pytest.raises(CheckpointError, match=match):
        load_lite3r(model, folder)
    assert snapshot(model) == before


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_bit_of_the_weights_is_refused(kind: str, tmp_path: Path) -> None:
    path = save(kind, tmp_path) / WEIGHTS
    raw, rng = path.read_bytes(), random.Random(kind)
    header = 8 + struct.unpack("<Q", raw[:8])[0]
    places = [rng.randrange(header, len(raw)) for _ in range(25)] + [rng.randrange(header) for _ in range(15)]
    for place in places:
        data = bytearray(raw)
        data[place] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        refused(tmp_path, "damaged|do not belong together|lacks")


def test_a_flipped_bit_of_the_configuration_is_refused_or_changes_nothing(tmp_path: Path) -> None:
    path = save("whole fp8", tmp_path) / JSON
    raw, rng, blank = path.read_bytes(), random.Random(0), 0
    record = json.loads(raw)
    for _ in range(60):
        data = bytearray(raw)
        data[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
        try:
            load_lite3r(Toy().eval(), tmp_path)
        except CheckpointError:
            continue
        blank += 1
        assert json.loads(data) == record
    assert blank < 10


def test_white_space_is_no_damage(tmp_path: Path) -> None:
    path = save("branches", tmp_path) / JSON
    path.write_bytes(json.dumps(json.loads(path.read_text())).replace(", ", ",\r\n").encode())
    load_lite3r(Toy(), tmp_path)


@pytest.mark.parametrize("other", [dict(feature_map="elu"), dict(linear_branch="all"), dict()])
def test_the_files_of_two_saves_do_not_belong_together(other: dict[str, Any], tmp_path: Path) -> None:
    """Not even where configuration and names are the same."""
    save_lite3r(make(branch=1.0), tmp_path / "a")
    save_lite3r(make(branch=2.0, **other), tmp_path / "b")
    shutil.copy(tmp_path / "a" / JSON, tmp_path / "b" / JSON)
    refused(tmp_path / "b", "do not belong together: a save was interrupted between them, .* is whole")


def test_a_save_that_is_interrupted_between_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says that the weights are whole, and what they hold makes a checkpoint again."""
    from lite3r_plugin.apply import checkpoint

    save_lite3r(make(branch=1.0, feature_map="softmax"), tmp_path)
    real = checkpoint.replacing

    def full(path: Path) -> Any:
        if path.suffix == ".json":
            raise OSError(28, "No space left on device")
        return real(path)

    monkeypatch.setattr(checkpoint, "replacing", full)
    with pytest.raises(OSError, match="No space left"):
        save_lite3r(make(branch=2.0, feature_map="elu"), tmp_path)
    refused(tmp_path, f"{WEIGHTS} is whole, and its metadata holds the configuration")
    with safe_open(tmp_path / WEIGHTS, framework="pt") as file:
        (tmp_path / JSON).write_text(file.metadata()["lite3r"])
    loaded = lite3r_modules(load_lite3r(Toy(), tmp_path))["cross.0"]
    assert loaded.state.config.feature_map == "elu"
    assert loaded.proj_lin.weight.unique().tolist() == [2.0]


def test_of_two_saves_and_damaged_besides(tmp_path: Path) -> None:
    save_lite3r(make(branch=1.0), tmp_path / "a")
    save_lite3r(make(branch=2.0), tmp_path / "b")
    shutil.copy(tmp_path / "a" / JSON, tmp_path / "b" / JSON)
    data = bytearray((tmp_path / "b" / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (tmp_path / "b" / WEIGHTS).write_bytes(data)
    refused(tmp_path / "b", "do not belong together, and the weights are damaged: .* another checksum")


def test_who_saves_at_the_same_time_leaves_one_checkpoint(tmp_path: Path) -> None:
    models = [make(branch=float(i), feature_map=feature_map) for i, feature_map in enumerate(("softmax", "elu"))]
    stop, seen = threading.Event(), set()

    def keep_saving(model: Toy) -> None:
        while not stop.is_set():
            save_lite3r(model, tmp_path)

    threads = [threading.Thread(target=keep_saving, args=(model,)) for model in models]
    save_lite3r(models[0], tmp_path)
    for thread in threads:
        thread.start()
    try:
        for _ in range(20):
            module = lite3r_modules(load_lite3r(Toy(), tmp_path))["cross.0"]
            seen.add((module.state.config.feature_map, module.proj_lin.weight[0, 0].item()))
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert seen <= {("softmax", 0.0), ("elu", 1.0)}


SCALE, CODES, WEIGHT = "cross.0.qkv.weight_scale", "cross.0.qkv.weight_data", "head.weight"


def scaled(by: float) -> Callable[[dict[str, Tensor]], None]:
    return lambda w: w.update({SCALE: w[SCALE] * by})


def put(name: str, value: float) -> Callable[[dict[str, Tensor]], None]:
    return lambda w: w[name].view(-1)[:1].fill_(value) and None


def cast(name: str, dtype: torch.dtype) -> Callable[[dict[str, Tensor]], None]:
    return lambda w: w.update({name: w[name].to(dtype)})


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("fp8", scaled(-1), "has scales that are not positive"),
        ("fp8", scaled(0), "has scales that are not positive"),
        ("fp8", put(SCALE, 3e38), "has scales with which it is beyond torch.float32"),
        ("fp8", put(SCALE, math.inf), "has infinities or NaN"),
        ("fp8", cast(SCALE, torch.float64), "is torch.float64"),
        ("fp8", cast(CODES, torch.float8_e5m2), "is torch.float8_e5m2"),
        ("branches", put("cross.0.proj_lin.weight", math.nan), "infinities or NaN in torch.float32"),
        ("branches", cast("cross.0.proj_lin.weight", torch.float8_e4m3fn), "as torch.float8_e4m3fn, but in this model it is torch.float32"),
        ("whole", put(WEIGHT, math.nan), "head.weight has infinities or NaN"),
        ("whole", put(WEIGHT, -math.inf), "head.weight has infinities or NaN"),
        ("whole", lambda w: w.update({WEIGHT: w[WEIGHT].double() + 1e300}), "has infinities or NaN in torch.float32"),
        *(
            ("whole", cast(WEIGHT, dtype), f"head.weight as {dtype}, but in this model it is torch.float32")
            for dtype in (torch.bool, torch.int32, torch.uint8, torch.complex64, torch.float8_e5m2, torch.float8_e4m3fn)
        ),
    ],
)  # fmt: skip
def test_numbers_that_no_weight_has(kind: str, change: Callable[[dict[str, Tensor]], Any], message: str, tmp_path: Path) -> None:
    edit(save(kind, tmp_path), weights=change)
    refused(tmp_path, message)


def test_scales_are_judged_in_the_dtype_of_the_model(tmp_path: Path) -> None:
    half = lambda: Toy().to(torch.float16)  # noqa: E731
    save_lite3r(make("fp8", toy=half), tmp_path)
    edit(tmp_path, weights=put(SCALE, 200.0))
    refused(tmp_path, "scales with which it is beyond torch.float16", half)
    model = Toy().to(torch.float16)
    with torch.no_grad():
        model.cross[0].qkv.weight[0] = torch.finfo(torch.float16).max
    save_lite3r(apply_lite3r(model, TEST_CONFIG, precision="fp8"), tmp_path)
    load_lite3r(half(), tmp_path)  # the largest number there is, rounded, is no infinity


def drop_fp8(record: dict[str, Any]) -> None:
    record.update(fp8={}, fp8_biases=[], tensors={n: t for n, t in record["tensors"].items() if "weight_" not in n})


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("branches", lambda r: r.update(format=True), "has the format version True, and lite3r-plugin .* reads 1: it is damaged"),
        ("branches", lambda r: r.update(format=1.0), "has the format version 1.0, and lite3r-plugin .* reads 1: it is damaged"),
        ("branches", lambda r: r["config"].update(version=1.0), "configuration version 1.0 is not 1"),
        ("branches", lambda r: r["config"].update(version=True), "configuration version True is not 1"),
        ("whole", lambda r: r.update(whole="no"), "'whole' is no truth value"),
        ("whole", lambda r: r.update(whole=1), "'whole' is no truth value"),
        ("branches", lambda r: r.update(adapter="vggt"), "was saved from a Toy .adapter 'vggt'., this is a Toy .adapter 'toy'."),
        ("branches", lambda r: r.update(adapter=["toy"]), "'adapter' is no text"),
        ("fp8", lambda r: r.update(fp8_biases=None), "'fp8_biases' is no list"),
        ("fp8", lambda r: r.update(fp8_biases=[1]), "'fp8_biases' holds something else than names"),
        ("fp8", lambda r: r.update(fp8_biases=r["fp8_biases"][1:]), "other Linears than those of this Toy have a bias"),
        ("whole", lambda r: r.update(changed=[1]), "'changed' holds something else than names"),
        ("whole", lambda r: r.update(changed=["cross.9"]), "of which 'cross.9' was trained: this Toy has none"),
        ("fp8", lambda r: r["fp8"].update({"cross.0.qkv": [96.0, 32]}), "'fp8' holds something else than shapes"),
        ("fp8", lambda r: r["fp8"].update({"cross.0.qkv": 96}), "'fp8' holds something else than shapes"),
        ("branches", lambda r: r["sites"]["cross.0"].update(head_dim=16.0), "the first that differs is 'cross.0'"),
        ("branches", lambda r: r["sites"]["cross.0"].update(sparse=1), "the first that differs is 'cross.0'"),
        ("branches", lambda r: r["sites"].update({"cross.0": None}), "the first that differs is 'cross.0'"),
        ("branches", lambda r: r["tensors"].update({"cross.0.proj_lin.weight": None}), "has another checksum, dtype or shape"),
        ("branches", lambda r: r["tensors"]["cross.0.proj_lin.weight"].update(sha256="0" * 64), "has another checksum"),
        ("branches", lambda r: r["tensors"]["cross.0.proj_lin.weight"].update(dtype="float64"), "has another checksum, dtype"),
        ("branches", lambda r: r["tensors"]["cross.0.proj_lin.weight"].update(shape=[16.0, 16]), "has another checksum, dtype or shape"),
        ("branches", lambda r: r.pop("tensors"), r"lacks \['tensors'\]; save it again"),
        ("branches", lambda r: r["config"].update(precision="fp8"), "precision is 'fp8', but there are no FP8 weights"),
    ],
)
def test_a_record_of_wrong_types(kind: str, change: Callable[[dict[str, Any]], Any], message: str, tmp_path: Path) -> None:
    edit(save(kind, tmp_path), record=change)
    refused(tmp_path, message)


def test_fp8_without_one_fp8_weight(tmp_path: Path) -> None:
    save("fp8", tmp_path)
    record = json.loads((tmp_path / JSON).read_text())
    drop_fp8(record)
    seal(tmp_path, record, {name: tensor.clone() for name, tensor in load_file(tmp_path / WEIGHTS).items() if "weight_" not in name})
    refused(tmp_path, "precision is 'fp8', but there are no FP8 weights")


def test_weights_that_another_tool_wrote(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save("branches", tmp_path)
    save_file({name: tensor.clone() for name, tensor in load_file(tmp_path / WEIGHTS).items()}, tmp_path / WEIGHTS)
    refused(tmp_path, "not of save_lite3r: it does not say what it holds")


def test_masks_may_hold_infinities_but_parameters_may_not(tmp_path: Path) -> None:
    def masked() -> Toy:
        toy = Toy().eval()
        toy.register_buffer("mask", torch.full((3,), -math.inf))
        toy.register_buffer("phases", torch.polar(torch.ones(3), torch.rand(3)))
        return toy

    model = apply_lite3r(masked(), TEST_CONFIG)
    save_lite3r(model, tmp_path, whole=True)
    loaded = load_lite3r(masked(), tmp_path)
    assert torch.equal(loaded.mask, model.mask)
    assert torch.equal(loaded.phases, model.phases)
    with torch.no_grad():
        model.head.weight[0, 0] = math.nan
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(WeightsError, match=r"head\.weight has infinities or NaN: the model is broken"):
        save_lite3r(model, tmp_path, whole=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    save_lite3r(model, tmp_path)  # it is not among the branches


def test_saving_leaves_memory_that_can_be_resized(tmp_path: Path) -> None:
    """As FSDP does with what it has gathered."""
    model = make()
    save_lite3r(model, tmp_path, whole=True)
    assert all(tensor.untyped_storage().resizable() for tensor in (*model.parameters(), *model.buffers()))


def test_tensors_that_no_file_holds(tmp_path: Path) -> None:
    model = apply_lite3r(Toy().eval(), TEST_CONFIG)
    model.register_buffer("sparse", torch.eye(2).to_sparse())
    with pytest.raises(CheckpointError, match=r"sparse is a Tensor, torch\.sparse_coo, which no checkpoint holds"):
        save_lite3r(model, tmp_path, whole=True)
    assert not list(tmp_path.iterdir())


def test_a_buffer_that_is_an_expanded_view_gets_memory_of_its_own(tmp_path: Path) -> None:
    def expanded(value: float) -> Toy:
        toy = Toy().eval()
        toy.register_buffer("ids", torch.full((1,), value).expand(5))
        return toy

    save_lite3r(apply_lite3r(expanded(1.0), TEST_CONFIG), tmp_path, whole=True)
    model = expanded(2.0)
    assert load_lite3r(model, tmp_path) is model
    assert model.ids.tolist() == [1.0] * 5
    edit(tmp_path, weights=lambda w: w[WEIGHT].fill_(math.nan))
    refused(tmp_path, "head.weight has infinities", lambda: expanded(2.0))


def test_an_error_after_everything_was_filled_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values that were overwritten, weights that FP8 replaced, and what learns: all come back."""
    from lite3r_plugin.apply import checkpoint

    save("whole fp8", tmp_path)
    model = Toy().eval()
    before = snapshot(model)

    def fail(*args: Any) -> None:
        assert snapshot(model) != before
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "run_in_fp8", fail)
    with pytest.raises(KeyboardInterrupt):
        load_lite3r(model, tmp_path)
    assert snapshot(model) == before
    model(images())


@pytest.mark.parametrize("text", ["[" * 100_000, '{"format": ' + "9" * 5000 + "}", '{"format": 1e999}', "", "null", "\ufeff{}"])
def test_json_beyond_reason(text: str, tmp_path: Path) -> None:
    (save("branches", tmp_path) / JSON).write_text(text)
    refused(tmp_path, "damaged|has the format version")
