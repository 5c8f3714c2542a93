"""Checkpoints of converted models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import JSON, WEIGHTS, edit
from safetensors.torch import load_file
from torch import Tensor, nn
from toys import Toy, images, toy_adapter

from lite3r_plugin import apply_lite3r, convert, describe, load_lite3r, save_lite3r
from lite3r_plugin.apply.lookup import block_linears, lite3r_modules
from lite3r_plugin.attention.trial import Trials, Verdict
from lite3r_plugin.errors import BackendError, CheckpointError
from lite3r_plugin.ops.fp8 import E4M3

__all__ = ["toy_adapter"]  # the fixture
pytestmark = pytest.mark.usefixtures("adapter")
SPARSE = dict(keep_ratio=0.3, dense_below=0, block_q=16, block_k=16)


@pytest.fixture
def dense() -> Toy:
    return Toy().eval()


def copy_of(dense: Toy) -> Toy:
    other = Toy().eval()
    other.load_state_dict(dense.state_dict())
    return other


@pytest.fixture
def model(dense: Toy) -> Toy:
    model = apply_lite3r(copy_of(dense), **SPARSE, precision="fp8")
    for site in lite3r_modules(model).values():
        if site.sparse:
            nn.init.normal_(site.proj_lin.weight)
    return model


def test_round_trip(model: Toy, dense: Toy, tmp_path: Path) -> None:
    save_lite3r(model, tmp_path)
    stored = load_file(tmp_path / WEIGHTS)
    assert {t.dtype for name, t in stored.items() if name.endswith("weight_data")} == {E4M3}
    assert sum("weight_data" in name for name in stored) == sum("weight_scale" in name for name in stored) == 8
    assert len(stored) == 8 + 8 + 2
    nn.init.zeros_(dense.cross[0].qkv.weight)  # its own weights do not matter
    loaded = load_lite3r(dense, tmp_path)
    assert torch.equal(loaded(images()), model(images()))
    assert describe(loaded).config == describe(model).config
    assert describe(loaded).linears == {"in FP8 (emulated)": 8}


def test_the_backend_belongs_to_the_machine(model: Toy, dense: Toy, tmp_path: Path) -> None:
    convert(model, fp8_backend="emulated")
    save_lite3r(model, tmp_path)
    assert json.loads((tmp_path / JSON).read_text())["config"]["fp8_backend"] == "auto"
    assert describe(load_lite3r(dense, tmp_path)).config.fp8_backend == "auto"


def test_a_model_without_weights(model: Toy, tmp_path: Path) -> None:
    model.register_buffer("table", torch.rand(3), persistent=False)
    save_lite3r(model, tmp_path, whole=True)
    with torch.device("meta"):
        empty = Toy()
    empty.register_buffer("table", torch.empty(3, device="meta"), persistent=False)
    loaded = load_lite3r(empty.eval(), tmp_path)
    assert not any(t.is_meta for t in (*loaded.parameters(), *loaded.buffers()))
    assert torch.equal(loaded(images()), model(images()))
    assert torch.equal(loaded.table, model.table)


def test_what_is_loaded_has_memory_of_its_own(model: Toy, tmp_path: Path) -> None:
    """A file has its tensors at any address, and products round by the alignment of their operands."""
    save_lite3r(model, tmp_path, whole=True)
    with torch.device("meta"):
        empty = Toy()
    loaded = load_lite3r(empty.eval(), tmp_path)
    tensors = [*loaded.parameters(), *loaded.buffers()]
    assert all(tensor.data_ptr() % 64 == 0 for tensor in tensors)
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == len(tensors)


def test_no_copy_in_high_precision_is_made(model: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a model on the meta device is filled, no tensor as large as a block's weight exists in another dtype.

    But for those of a trial, one site's or block's at a time.
    """
    from torch.utils._python_dispatch import TorchDispatchMode

    save_lite3r(model, tmp_path, whole=True)
    sizes = {m.weight_data.numel() for m in block_linears(model)} - {t.numel() for t in model.parameters()}
    assert sizes
    made: list[Tensor] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            made.extend(t for t in (out if isinstance(out, (list, tuple)) else [out]) if isinstance(t, Tensor) and not t.is_meta)
            return out

    with torch.device("meta"):
        empty = Toy()
    monkeypatch.setattr(Trials, "of", lambda *_: Verdict(None, 1))
    with Watch():
        load_lite3r(empty, tmp_path)
    assert made
    assert {t.dtype for t in made if t.numel() in sizes and t.dtype.itemsize > 1} <= {torch.bool}


def test_the_rest_may_come_from_elsewhere(model: Toy, dense: Toy, tmp_path: Path) -> None:
    save_lite3r(model, tmp_path)
    with torch.device("meta"):
        empty = Toy()
    loaded = load_lite3r(empty.eval(), tmp_path)
    ours = {f"{name}.weight" for name in json.loads((tmp_path / JSON).read_text())["fp8"]}
    rest = {name: tensor for name, tensor in dense.state_dict().items() if name not in ours}
    loaded.load_state_dict(rest, strict=False, assign=True)
    assert torch.equal(loaded(images()), model(images()))


def test_converting_without_weights() -> None:
    with torch.device("meta"):
        model = Toy()
    convert(apply_lite3r(model, **SPARSE))
    assert all(m.weight_data.is_meta and m.weight_data.dtype == E4M3 for m in block_linears(model))


def test_while_training(dense: Toy, tmp_path: Path) -> None:
    model = apply_lite3r(copy_of(dense), **SPARSE, precision="fp8_qat")
    for site in lite3r_modules(model).values():
        if site.sparse:
            nn.init.normal_(site.proj_lin.weight)
    save_lite3r(model, tmp_path)
    assert len(load_file(tmp_path / WEIGHTS)) == 2
    loaded = load_lite3r(copy_of(dense), tmp_path)
    assert torch.equal(loaded(images()), model(images()))
    assert torch.equal(convert(loaded)(images()), convert(model)(images()))
    save_lite3r(apply_lite3r(copy_of(dense), **SPARSE, precision="fp8_qat"), tmp_path, whole=True)
    with torch.device("meta"):
        empty = Toy()
    assert torch.equal(load_lite3r(empty.eval(), tmp_path).head.weight, dense.head.weight)


def change(path: Path, edit_it: Callable[[dict[str, Any]], Any], file: str = WEIGHTS) -> None:
    edit(path, **{"weights" if file == WEIGHTS else "record": edit_it})


DATA, SCALE = "cross.0.qkv.weight_data", "cross.0.qkv.weight_scale"


@pytest.mark.parametrize(
    ("edit", "file", "message"),
    [
        (lambda w: w.pop(DATA), WEIGHTS, r"cross\.0\.qkv\.weight_data is missing"),
        (lambda w: w.pop(SCALE), WEIGHTS, r"cross\.0\.qkv\.weight_scale is missing"),
        (lambda w: w.update({DATA: w[DATA].float()}), WEIGHTS, "is torch.float32"),
        (lambda w: w.update({DATA: w[DATA][:5].clone()}), WEIGHTS, r"\[5, 32\], not torch.float8_e4m3fn \[96, 32\]"),
        (lambda w: w.update({SCALE: w[SCALE].flatten()}), WEIGHTS, r"\[96\], not torch.float32 \[96, 1\]"),
        (lambda w: w.update({"other.weight_data": w[DATA].clone()}), WEIGHTS, "other.weight_data' is missing, extra"),
        (lambda r: r["fp8"].update({"head": [1, 32]}), JSON, "for 'head', but this model has no such Linear"),
        (lambda r: r["fp8"].update({"cross.0.qkv": [96, 64]}), JSON, r"\[96, 64\] for 'cross\.0\.qkv'"),
        (lambda r: r["config"].update(precision="full"), JSON, "precision is 'full', but there are FP8 weights"),
        (lambda r: r.update(whole=True), JSON, "does not fit its configuration"),
        (lambda r: r.pop("fp8"), JSON, r"lacks \['fp8'\]"),
        (lambda r: r.update(fp8=[]), JSON, "'fp8' is no JSON object"),
    ],
)
def test_what_does_not_fit_is_refused(model: Toy, dense: Toy, tmp_path: Path, edit: Any, file: str, message: str) -> None:
    save_lite3r(model, tmp_path)
    change(tmp_path, edit, file)
    before, keys = dense(images()), list(dense.state_dict())
    with pytest.raises(CheckpointError, match=message):
        load_lite3r(dense, tmp_path)
    assert torch.equal(dense(images()), before)
    assert list(dense.state_dict()) == keys


def test_parameters_with_several_places_are_filled_at_all_of_them(tmp_path: Path) -> None:
    def tied() -> Toy:
        toy = Toy().eval()
        toy.extra = nn.ModuleList([nn.LayerNorm(4), nn.LayerNorm(4)])
        toy.extra[1].weight = toy.extra[0].weight
        linears = (
            [m for m in toy.cross[0].modules() if isinstance(m, nn.Linear)],
            [m for m in toy.cross[1].modules() if isinstance(m, nn.Linear)],
        )
        linears[1][-1].bias = linears[0][-1].bias
        return toy

    model = apply_lite3r(tied(), **SPARSE, precision="fp8")
    save_lite3r(model, tmp_path, whole=True)
    with torch.device("meta"):
        empty = tied()
    for other in (empty, tied()):
        loaded = load_lite3r(other, tmp_path)
        assert not any(p.is_meta for _, p in loaded.named_parameters(remove_duplicate=False))
        assert loaded.extra[1].weight is loaded.extra[0].weight
        torch.testing.assert_close(loaded(images()), model(images()))


@pytest.mark.parametrize(("name", "value"), [("weight_scale", torch.nan), ("weight_data", 0x7F)])
def test_damaged_weights_are_refused(model: Toy, dense: Toy, tmp_path: Path, name: str, value: float) -> None:
    save_lite3r(model, tmp_path)

    def damage(weights: dict[str, Tensor]) -> None:
        key = next(k for k in weights if k.endswith(name))
        (weights[key].view(torch.uint8) if name == "weight_data" else weights[key]).flatten()[3:4].fill_(value)

    edit(tmp_path, weights=damage)
    with pytest.raises(CheckpointError, match="has infinities or NaN"):
        load_lite3r(dense, tmp_path)
    assert not lite3r_modules(dense)


def test_a_model_without_the_biases_is_another_model(model: Toy, tmp_path: Path) -> None:
    save_lite3r(model, tmp_path)
    other = Toy().eval()
    next(m for m in other.cross[0].modules() if isinstance(m, nn.Linear) and m.bias is not None).bias = None
    with pytest.raises(CheckpointError, match="other Linears than those of this Toy have a bias"):
        load_lite3r(other, tmp_path)


def test_a_device_that_is_not_there(model: Toy, dense: Toy, tmp_path: Path) -> None:
    save_lite3r(model, tmp_path)
    with pytest.raises(BackendError, match="device 'cuda:99' cannot be used here"):
        load_lite3r(dense, tmp_path, device="cuda:99")
    assert not lite3r_modules(dense)
    with pytest.raises(CheckpointError, match="is a file"):
        save_lite3r(model, tmp_path / JSON)
