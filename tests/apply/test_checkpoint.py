"""save_lite3r and load_lite3r: a round trip, and every way in which a checkpoint can be wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import JSON, WEIGHTS, edit
from safetensors.torch import load_file
from torch import nn
from toys import Toy, images, toy_adapter

from lite3r_plugin import apply_lite3r, describe, load_lite3r, remove_lite3r, save_lite3r
from lite3r_plugin.apply.lookup import lite3r_modules
from lite3r_plugin.errors import AlreadyAppliedError, CheckpointError, NotAppliedError, UnknownModelError
from lite3r_plugin.testing import TEST_CONFIG

__all__ = ["toy_adapter"]  # the fixture
pytestmark = pytest.mark.usefixtures("adapter")

CONFIG = TEST_CONFIG.replace(keep_ratio={"cross.1": 0.5, "*": 0.3}, negligible_ratio=0.2, linear_branch="marginal", feature_map="elu")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint of a Toy with branches that are not zero."""
    model = apply_lite3r(Toy(), CONFIG)
    for module in lite3r_modules(model).values():
        nn.init.normal_(module.proj_lin.weight)
    save_lite3r(model, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.mark.parametrize("name", ["", "\0", "a" * 300, None, 3, b"abc", "file/below"], ids=repr)
def test_where_nothing_can_be_saved(name: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    with pytest.raises(CheckpointError, match=r"takes the name of a directory|cannot be"):
        save_lite3r(apply_lite3r(Toy(), CONFIG), name)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_round_trip(tmp_path: Path) -> None:
    dense = Toy().eval()
    model = Toy().eval()
    model.load_state_dict(dense.state_dict())
    apply_lite3r(model, CONFIG)
    for module in lite3r_modules(model).values():
        nn.init.normal_(module.proj_lin.weight)
    save_lite3r(model, tmp_path / "a" / "b")
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == [WEIGHTS, JSON]
    loaded = load_lite3r(dense, tmp_path / "a" / "b")
    assert loaded is dense
    assert describe(loaded).config == CONFIG
    assert torch.equal(loaded(images()), model(images()))


def test_only_the_branches_are_stored(saved: Path) -> None:
    assert set(load_file(saved / WEIGHTS)) == {"cross.0.proj_lin.weight", "cross.1.proj_lin.weight"}


def test_no_branches_at_all(tmp_path: Path) -> None:
    save_lite3r(apply_lite3r(Toy(), CONFIG, linear_branch="none"), tmp_path)
    assert describe(load_lite3r(Toy(), tmp_path)).config.linear_branch == "none"


def test_saving_again_replaces_the_files_and_leaves_nothing_else(saved: Path) -> None:
    save_lite3r(apply_lite3r(Toy(), CONFIG, keep_ratio=0.7), saved)
    assert sorted(path.name for path in saved.iterdir()) == [WEIGHTS, JSON]
    assert describe(load_lite3r(Toy(), saved)).config.keep_ratio == 0.7


def test_a_failing_save_leaves_the_old_files(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(tensors: Any, path: Path, metadata: Any) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left")

    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    monkeypatch.setattr("lite3r_plugin.apply.checkpoint.save_file", fail)
    with pytest.raises(OSError, match="no space left"):
        save_lite3r(apply_lite3r(Toy(), CONFIG), saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def edit_json(**changes: Any) -> Callable[[Path], None]:
    """Set fields of the record; None removes one."""

    def change(record: dict[str, Any]) -> None:
        record.update(changes)
        for key in [key for key, value in changes.items() if value is None]:
            del record[key]

    return lambda directory: edit(directory, record=change)


def edit_weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    return lambda directory: edit(directory, weights=change)


def truncate(name: str, size: int) -> Callable[[Path], None]:
    return lambda directory: (directory / name).write_bytes((directory / name).read_bytes()[:size]) and None


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / JSON).unlink(), f"holds no {JSON}; load_lite3r takes a directory written by save_lite3r"),
        (lambda d: (d / WEIGHTS).unlink(), f"holds no {WEIGHTS}"),
        (truncate(JSON, 40), "is damaged: .*; save it again"),
        (lambda d: (d / JSON).write_bytes(b"\xff\xfe\x00"), "is damaged"),
        (lambda d: (d / JSON).write_text("[1]"), "has the format version None, and lite3r-plugin .* reads 1: it is damaged"),
        (truncate(WEIGHTS, 100), "is damaged"),
        (truncate(WEIGHTS, 0), "is damaged"),
        (lambda d: (d / WEIGHTS).write_bytes(b"\x80\x04pickle"), "is damaged"),
        (edit_json(format=2), "has the format version 2, and lite3r-plugin .* reads 1: install a newer release"),
        (edit_json(sites=None), r"lacks \['sites'\]"),
        (edit_json(config={"version": 9}), "does not fit this Toy: configuration version 9"),
        (edit_json(config={"version": 1, "keep_ratio": 7}), "does not fit this Toy: keep_ratio must be"),
        (edit_json(config=[1]), "'config' is no JSON object"),
        (edit_json(sites=[1]), "'sites' is no JSON object"),
        (edit_json(config={"version": 1, "scopes": ["encoder"]}), "does not fit this Toy: .*scope"),
        (edit_json(config={"version": 1, "keep_ratio": {"cross.9": 0.5}}), r"does not fit this Toy: .*cross\.9"),
        (edit_weights(lambda w: w.pop("cross.0.proj_lin.weight")), r"'cross\.0\.proj_lin\.weight' is missing, extra or of another shape"),
        (edit_weights(lambda w: w.update(x=torch.zeros(1))), "'x' is missing, extra or of another shape"),
        (edit_weights(lambda w: w.update({"cross.1.proj_lin.weight": torch.zeros(8, 8)})), r"'cross\.1\.proj_lin\.weight'"),
    ],
)
def test_damage_is_named_and_the_model_is_dense_again(saved: Path, damage: Callable[[Path], Any], message: str) -> None:
    damage(saved)
    model = Toy()
    dense, keys = model(images()), list(model.state_dict())
    with pytest.raises(CheckpointError, match=message):
        load_lite3r(model, saved)
    assert lite3r_modules(model) == {}
    assert list(model.state_dict()) == keys
    assert torch.equal(model(images()), dense)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            lambda: Toy(depth=3),
            "belongs to another model: it was saved from a Toy with 2 sites .adapter 'toy'., this is a Toy with 3; .*'cross.2'",
        ),
        (lambda: Toy(dim=64), "belongs to another model: .*'cross.0'"),
    ],
)
def test_another_model(saved: Path, other: Callable[[], Toy], message: str) -> None:
    model = other()
    with pytest.raises(CheckpointError, match=message):
        load_lite3r(model, saved)
    assert lite3r_modules(model) == {}


def test_a_model_that_carries_lite3r_keeps_it(saved: Path) -> None:
    model = apply_lite3r(Toy(), CONFIG, keep_ratio=0.9)
    with pytest.raises(AlreadyAppliedError):
        load_lite3r(model, saved)
    assert describe(model).config.keep_ratio == 0.9


def test_unknown_and_dense_models(saved: Path) -> None:
    with pytest.raises(UnknownModelError):
        load_lite3r(nn.Linear(2, 2), saved)
    with pytest.raises(NotAppliedError):
        save_lite3r(Toy(), saved)


def test_a_module_with_two_names(tmp_path: Path) -> None:
    def twice() -> Toy:
        toy = Toy().eval()
        toy.also = toy.cross
        return toy

    model = apply_lite3r(twice(), CONFIG)
    save_lite3r(model, tmp_path)
    loaded = load_lite3r(twice(), tmp_path)
    assert loaded.also[0] is loaded.cross[0]
    remove_lite3r(loaded)
    assert not lite3r_modules(loaded)


def test_a_whole_checkpoint_in_inference_mode(saved: Path, tmp_path: Path) -> None:
    model = load_lite3r(Toy().eval(), saved)
    save_lite3r(model, tmp_path / "whole", whole=True)
    with torch.inference_mode():
        other = load_lite3r(Toy().eval(), tmp_path / "whole")
        assert torch.equal(other(images()), model(images()))


def test_another_model_of_the_same_adapter_is_named(tmp_path: Path) -> None:
    """By its own class, whatever wraps it."""

    class Other(Toy):
        pass

    save_lite3r(apply_lite3r(nn.DataParallel(Toy(depth=3)), CONFIG), tmp_path)
    with pytest.raises(CheckpointError, match=r"saved from a Toy with 3 sites .adapter 'toy'., this is a Other with 2"):
        load_lite3r(nn.DataParallel(Other()), tmp_path)
