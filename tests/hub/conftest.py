"""What tests of the Hub share: a checkpoint, and what was measured of it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from fake_hub import randomize_branches, tiny

from lite3r_plugin import apply_lite3r, save_lite3r
from lite3r_plugin.adapter.plugins import find_model
from lite3r_plugin.apply.seal import fingerprint
from lite3r_plugin.evaluation import ModelPair, compare
from lite3r_plugin.files import to_json
from lite3r_plugin.scene.data import open_scenes


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of `tiny` with branches that are not zero."""
    model, folder = apply_lite3r(tiny(), keep_ratio=0.5, dense_below=0), tmp_path_factory.mktemp("saved")
    randomize_branches(model)
    save_lite3r(model, folder)
    return folder


@pytest.fixture(scope="session")
def evaluation(saved: Path) -> str:
    """What `lite3r eval --checkpoint` writes of it, from one scene, repeated, for speed."""
    data = "procedural:scenes=1,views=2,size=64"
    entry = dataclasses.replace(find_model("testbed"), create=tiny)
    found = compare(ModelPair.load(entry, saved, "random"), open_scenes(data), views=2, max_points=500).to_dict()
    found["scenes"] = {method: scores * 8 for method, scores in found["scenes"].items()}
    return to_json(found | {"data": data, "split": None, "weights": None, "checkpoint": fingerprint(saved)})


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint."""
    return Path(shutil.copytree(saved, tmp_path / "checkpoint"))


@pytest.fixture
def measured(evaluation: str) -> dict[str, Any]:
    """The evaluation as data."""
    return json.loads(evaluation)


@pytest.fixture
def metrics(evaluation: str, tmp_path: Path) -> Path:
    """Its file."""
    (tmp_path / "eval.json").write_text(evaluation)
    return tmp_path / "eval.json"
