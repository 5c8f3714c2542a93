"""`distil.py`, tiny: a matcher with random weights, on noise."""

import json

import pytest
import torch
from PIL import Image

from lite3r_plugin.errors import CheckpointError, InputError

CAMERA = "100 0 48 0 100 32 0 0 1 0 0 0 1 0 0 0 1 0 0 0 1 {x} 0 0 96 64"


@pytest.fixture
def distil():
    return pytest.importorskip("distil", reason="needs the extra 'evaluate'")


def test_the_matcher_gives_its_assignment_out(distil):
    torch.manual_seed(0)
    matcher = distil.make_matcher(tiny=True)
    pair = {name: {"descriptors": torch.randn(1, n, 128), "keypoints": torch.rand(1, n, 2)} for name, n in (("image0", 70), ("image1", 50))}
    with torch.no_grad():
        output = matcher(pair)
    best = output["log_assignment"][:, :-1, :-1].exp().amax(2)
    mutual = output["matching_scores0"] > 0
    assert output["log_assignment"].shape == (1, 71, 51)
    assert torch.equal(output["matching_scores0"][mutual], best[mutual])


@pytest.fixture
def photographs(tmp_path):
    """A scene to train on, one to validate on, and one with cameras, of noise that moves."""
    torch.manual_seed(0)
    noise = (torch.rand(64, 160, 3) * 255).byte().numpy()
    for scene in ("photographs/street", "photographs/yard", "strecha/tower/images"):
        (tmp_path / scene).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(noise[:, 8 * i : 8 * i + 96]).save(tmp_path / scene / f"{i:04}.png")
    cameras = tmp_path / "strecha/tower/gt_dense_cameras"
    cameras.mkdir()
    for i in range(3):
        (cameras / f"{i:04}.png.camera").write_text(CAMERA.format(x=i))
    return tmp_path


def command(folder, *options):
    return [
        str(folder / "photographs"), "--tiny", "--steps", "2", "--accumulate", "1", "--size", "96", "--keypoints", "96", "--seeds", "1",
        "--evaluate", str(folder / "strecha"), "--json", str(folder / "results.json"), "--judged", "2", *options,
    ]  # fmt: skip


def test_the_whole_script(distil, photographs):
    distil.main(
        command(photographs, "--validation", "yard", "--output", str(photographs / "trained"), "--cache", str(photographs / "cache"))
    )
    results = json.loads((photographs / "results.json").read_text())
    assert [row["state"] for row in results["states"]] == ["dense", "applied", "calibrated", "distilled"]
    assert all(len(row["results"]) == 2 for row in results["states"])
    assert results["states"][0]["auc_minus_dense"]["1"]["difference"] == 0
    assert results["conditions"]["scenes"] == {"training": ["street"], "validation": ["yard"], "evaluation": ["tower"]}
    assert results["training"]["pairs"] == {"training": 3, "validation": 3}
    assert results["training"]["distillation"]["steps"] == 2
    assert len(list((photographs / "cache").iterdir())) == 9

    distil.main(command(photographs, "--steps", "3", "--resume", "--validation", "yard", "--output", str(photographs / "trained")))
    resumed = json.loads((photographs / "results.json").read_text())
    assert resumed["training"]["distillation"]["steps"] == 3

    distil.main(command(photographs, "--trained", str(photographs / "trained"), "--cache", str(photographs / "cache")))
    again = json.loads((photographs / "results.json").read_text())
    assert [row["state"] for row in again["states"]] == ["dense", "distilled"]


def test_each_layer_gets_a_keep_ratio_of_its_own(distil, photographs):
    distil.main(command(photographs, "--keep", "0.5", "--block-choice", "error", "--output", str(photographs / "trained")))
    config = json.loads((photographs / "results.json").read_text())["conditions"]["lite3r"]
    assert config["block_choice"] == "error"
    assert set(config["keep_ratio"]) == {"transformers.0.self_attn", "transformers.1.self_attn"}

    distil.main(command(photographs, "--trained", str(photographs / "trained")))
    assert json.loads((photographs / "results.json").read_text())["conditions"]["lite3r"] == config


def test_scenes_of_one_name_have_features_of_their_own(distil, photographs):
    from photographs import Photographs

    from lite3r_plugin.scene.data import open_scenes

    (photographs / "others").mkdir()
    (photographs / "photographs/yard").rename(photographs / "others/street")
    Image.new("RGB", (96, 64)).save(photographs / "others/street/0000.png")
    read = Photographs(96, 96, photographs / "cache")
    first, second = (read.features(open_scenes(f"images:{photographs / name}")[0], 0) for name in ("photographs", "others"))
    assert first["descriptors"].shape != second["descriptors"].shape or not torch.equal(first["descriptors"], second["descriptors"])


def test_a_scene_that_is_evaluated_is_not_trained_on(distil, photographs):
    (photographs / "photographs/street").rename(photographs / "photographs/tower")
    with pytest.raises(InputError, match="tower would be trained and evaluated on"):
        distil.main(command(photographs))


def test_an_output_that_holds_another_run_is_refused_before_measuring(distil, photographs, monkeypatch):
    monkeypatch.setattr(distil, "measure", lambda *_: pytest.fail("it measured first"))
    (photographs / "trained/training").mkdir(parents=True)
    (photographs / "trained/training/something").touch()
    with pytest.raises(InputError, match="is not empty: pass resume=True"):
        distil.main(command(photographs, "--output", str(photographs / "trained")))


def test_a_folder_without_a_checkpoint_is_refused_before_measuring(distil, photographs, monkeypatch):
    monkeypatch.setattr(distil, "measure", lambda *_: pytest.fail("it measured first"))
    with pytest.raises(CheckpointError):
        distil.main(command(photographs, "--trained", str(photographs / "photographs")))


def test_a_scene_is_left_to_train_on(distil, photographs):
    with pytest.raises(InputError, match="none is left to train on"):
        distil.main(command(photographs, "--validation", "street", "yard"))


def test_pairs_to_judge_by_are_drawn_from_all_scenes(distil):
    drawn = distil.some(range(100), 8)
    assert len(set(drawn)) == 8
    assert min(drawn[:4]) < 50 < max(drawn[:4])
    assert drawn == distil.some(range(100), 8)
    assert sorted(distil.some(range(3), 8)) == [0, 1, 2]


def test_a_short_run_warms_up_briefly(distil):
    assert distil.config_of(distil.parse(["folder", "--minutes", "1"])).warmup_steps == 10
    assert distil.config_of(distil.parse(["folder", "--steps", "20"])).warmup_steps is None  # a tenth of them
