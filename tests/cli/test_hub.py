"""`lite3r convert-official`, `lite3r push` and `lite3r eval --checkpoint`: from a file of the authors to the Hub, as users go."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from commands import fails, lite3r
from fake_hub import Hub, randomize_branches
from official import SmallVGGT, official_state

from lite3r_adapters.testbed.model import ENTRIES
from lite3r_plugin import apply_lite3r, describe, hookimpl, load_lite3r, save_lite3r
from lite3r_plugin.adapter import plugins
from lite3r_plugin.adapter.models import ModelEntry
from lite3r_plugin.adapter.plugins import find_model


class Plugin:
    @hookimpl
    def lite3r_models(self) -> dict[str, ModelEntry]:
        """A VGGT in small."""
        small = dataclasses.replace(ENTRIES["testbed"], name="small-vggt", create=lambda: SmallVGGT(depth=1, trunk=1))
        return {"small-vggt": small}


@pytest.fixture(autouse=True)
def _small() -> Iterator[None]:
    plugin = Plugin()
    plugins.get_manager().register(plugin, name="small")
    yield
    plugins.get_manager().unregister(plugin)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    fake = Hub()
    monkeypatch.setattr("huggingface_hub.HfApi", lambda token=None: fake)
    return fake


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Of the model `tiny`, with the random weights that the commands give it, and branches that are not zero."""
    model = apply_lite3r(find_model("tiny").build("random"), keep_ratio=0.5, dense_below=0)
    randomize_branches(model)
    save_lite3r(model, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def test_convert_official(tmp_path: Path) -> None:
    model = SmallVGGT(depth=1, trunk=1)
    torch.save({"model": official_state(model), "optim": None}, tmp_path / "vggt.pt")
    torch.save(model.state_dict(), tmp_path / "base.pt")
    command = ("convert-official", tmp_path / "vggt.pt", "--model", "small-vggt", "--out")
    output = lite3r(*command, tmp_path / "out").stdout
    assert "3 of 64 x 64, 1 of 128 x 128" in output
    assert "What differs" in output
    assert describe(load_lite3r(SmallVGGT(depth=1, trunk=1), tmp_path / "out")).branch_parameters == 3 * 64**2 + 128**2
    lite3r(*command, tmp_path / "dense", "--keep-ratio", "1", "--config", "precision=fp8", "--base", tmp_path / "base.pt")
    config = describe(load_lite3r(model, tmp_path / "dense")).config
    assert (config.keep_ratio, config.precision) == (1, "fp8")


def test_what_cannot_be_converted(tmp_path: Path) -> None:
    torch.save(SmallVGGT(depth=1, trunk=1).state_dict(), tmp_path / "plain.pt")
    command = ("convert-official", tmp_path / "plain.pt", "--out", tmp_path / "out", "--model")
    assert "holds no proj_lin.weight" in fails(*command, "small-vggt")
    assert "no installed adapter can build 'nosuch'" in fails(*command, "nosuch")
    assert "unknown configuration field" in fails(*command, "small-vggt", "--config", "nosuch=1")


def test_eval_and_push(checkpoint: Path, hub: Hub, tmp_path: Path) -> None:
    lite3r(
        "eval", "--model", "tiny", "--weights", "random", "--checkpoint", checkpoint, "--data", "procedural:scenes=1,views=2,size=64",
        "--views", "2", "--device", "cpu", "--max-points", "500", "--json", tmp_path / "eval.json",
    )  # fmt: skip
    report = json.loads((tmp_path / "eval.json").read_text())
    assert report["config"]["keep_ratio"] == 0.5
    assert report["fidelity"][0]["depth_abs_rel"] > 0
    stated = ("--license", "mit", "--base-model", "me/tiny")
    assert "random weights" in fails("push", checkpoint, "me/x", *stated, "--metrics", tmp_path / "eval.json")
    assert hub.calls == []
    (tmp_path / "eval.json").write_text(json.dumps(report | {"weights": "me/tiny"}))
    output = lite3r("push", checkpoint, "me/x", "--license", "mit", "--metrics", tmp_path / "eval.json", "--public").stdout
    assert 'load_lite3r(model, "me/x")' in output
    assert dict(hub.calls)["create_repo"] == {"repo_id": "me/x", "private": False}
    assert b"| AbsRel" in hub.files["README.md"]
    assert b"base_model: me/tiny" in hub.files["README.md"]


def test_push_asks_for_what_it_needs(checkpoint: Path, hub: Hub, tmp_path: Path) -> None:
    assert "no license is known" in fails("push", checkpoint, "me/x", "--base-model", "me/tiny")
    assert "repo_id is owner/name" in fails("push", checkpoint, "x")
    assert "is no folder" in fails("push", tmp_path / "none", "me/x", "--license", "mit")
    assert hub.calls == []


def test_a_checkpoint_has_its_configuration(checkpoint: Path) -> None:
    command = ("eval", "--model", "tiny", "--weights", "random", "--checkpoint")
    assert "leave out --config and --keep-ratio" in fails(*command, checkpoint, "--keep-ratio", "0.5")
    assert "holds no lite3r_config.json" in fails(*command, checkpoint / "none")
