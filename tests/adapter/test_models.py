"""Images in, weights in, predictions out: hostile files, strict loading, geometry."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from lite3r_adapters.depth_anything_3 import model as da3
from lite3r_adapters.pi3 import model as pi3
from lite3r_adapters.vggt import model as vggt
from lite3r_plugin.adapter.models import ModelEntry
from lite3r_plugin.adapter.weights import find_weights, load_weights
from lite3r_plugin.errors import AdapterError, InputError
from lite3r_plugin.scene.images import choose_views, find_images, load_image
from lite3r_plugin.scene.prediction import Prediction, depth_error, fit_intrinsics, unproject


def entry(**fields: object) -> ModelEntry:
    """An entry of a Linear; nothing predicts anything."""
    made = ModelEntry("linear", "", lambda: nn.Linear(3, 2), lambda images: torch.zeros(1), lambda model, images: None)
    return dataclasses.replace(made, **fields)


# --- images


def test_natural_order_and_selection(tmp_path: Path) -> None:
    for name in ("10.png", "2.png", "b1.JPG", ".hidden.png", "notes.txt"):
        Image.new("RGB", (4, 4)).save(tmp_path / name, format="PNG")
    (tmp_path / "folder.png").mkdir()
    found = find_images(tmp_path)
    assert [p.name for p in found] == ["2.png", "10.png", "b1.JPG"]
    assert [p.name for p in choose_views(found, 2)] == ["2.png", "10.png"]
    assert choose_views(found, None) == found


def test_folders_without_images(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        find_images(tmp_path / "none")
    with pytest.raises(InputError, match="it is empty"):
        find_images(tmp_path)
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(InputError, match="1 files are of other kinds"):
        find_images(tmp_path)
    with pytest.raises(InputError, match="is a file"):
        find_images(tmp_path / "a.txt")


def test_exif_orientation(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.new("RGB", (30, 20), "red").save(tmp_path / "a.jpg", exif=exif)
    assert load_image(tmp_path / "a.jpg").size == (20, 30)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_over_white(tmp_path: Path, mode: str) -> None:
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    image.putpixel((1, 1), (0, 0, 0, 255))
    image.convert(mode).save(tmp_path / "a.png")
    pixels = np.asarray(load_image(tmp_path / "a.png"))
    assert pixels.shape == (4, 4, 3)
    assert (pixels[0, 0] == 255).all()
    assert (pixels[1, 1] == 0).all()


def test_16_bit_grey_is_scaled(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 65535, 32896]], dtype=np.uint16)).save(tmp_path / "a.png")
    assert np.asarray(load_image(tmp_path / "a.png"))[0, :, 0].tolist() == [0, 255, 128]


@pytest.mark.parametrize("mode", ["1", "L", "CMYK"])
def test_other_modes(tmp_path: Path, mode: str) -> None:
    Image.new(mode, (4, 4)).save(tmp_path / "a.tif")
    assert load_image(tmp_path / "a.tif").mode == "RGB"


def test_damaged_images_are_named(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.png")
    data = (tmp_path / "whole.png").read_bytes()
    Image.new("F", (2, 2)).save(tmp_path / "float.tif")
    for name, content in (("cut.png", data[: len(data) // 2]), ("text.jpg", b"not an image"), ("empty.png", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=name):
            load_image(tmp_path / name)
    with pytest.raises(InputError, match="floating-point"):
        load_image(tmp_path / "float.tif")


@pytest.mark.parametrize("module", [vggt, da3, pi3])
def test_preprocess_takes_all_shapes(module: object) -> None:
    for size in ((640, 480), (480, 640), (5, 3), (900, 2), (2, 300)):
        out = module.preprocess([Image.new("RGB", size, "gray")])
        assert out.dtype == torch.float32
        assert out.shape[:2] == (1, 3)
        assert out.shape[2] % 14 == 0 < out.shape[2]
        assert out.shape[3] % 14 == 0 < out.shape[3]
    mixed = module.preprocess([Image.new("RGB", (640, 480)), Image.new("RGB", (300, 400))])
    assert mixed.shape[0] == 2


def test_preprocess_sizes() -> None:
    photo = [Image.new("RGB", (779, 520), (255, 0, 0))]
    assert vggt.preprocess(photo).shape[2:] == (350, 518)
    assert vggt.preprocess([Image.new("RGB", (300, 900))]).shape[2:] == (518, 518)
    assert pi3.preprocess(photo).shape[2:] == (406, 616)
    out = da3.preprocess(photo)
    assert out.shape[2:] == (336, 504)
    torch.testing.assert_close(out[0, 0, 0, 0].item(), (1 - 0.485) / 0.229, rtol=1e-5, atol=0)


# --- weights


def test_weights_round_trip(tmp_path: Path) -> None:
    torch.manual_seed(1)
    source = nn.Linear(3, 2)
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    torch.save({"model": source.state_dict()}, tmp_path / "model.pt")
    for weights in (tmp_path / "model.safetensors", tmp_path / "model.pt", tmp_path):
        model = entry().build(str(weights))
        assert torch.equal(model.weight, source.weight)
        assert not model.training


def test_renamed_and_left_out_tensors(tmp_path: Path) -> None:
    state = {f"model.{k}": v for k, v in nn.Linear(3, 2).state_dict().items()} | {"extra.weight": torch.ones(1)}
    save_file(state, tmp_path / "a.safetensors")
    model = entry(rename=lambda name: None if name.startswith("extra.") else name.removeprefix("model.")).build(
        str(tmp_path / "a.safetensors")
    )
    assert torch.equal(model.weight, state["model.weight"])


def test_weights_of_another_model(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(2, 4), "bias": torch.zeros(2), "scale": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=r"1 unexpected \(scale\); 1 of another shape \(weight \[2, 4\] for \[2, 3\]\)"):
        load_weights(nn.Linear(3, 2), tmp_path / "a.safetensors")
    save_file({"bias": torch.zeros(2)}, tmp_path / "b.safetensors")
    with pytest.raises(InputError, match=r"1 missing \(weight\)"):
        load_weights(nn.Linear(3, 2), tmp_path / "b.safetensors")


class _Evil:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return os.mkdir, (self.path,)


def test_hostile_weights(tmp_path: Path) -> None:
    torch.save({"weight": _Evil(str(tmp_path / "harm"))}, tmp_path / "evil.pt")
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0")
    for name, message in (("evil.pt", "cannot be read"), ("list.pt", "no state dict"), ("cut.safetensors", "cannot be read")):
        with pytest.raises(InputError, match=message):
            load_weights(nn.Linear(3, 2), tmp_path / name)
    assert not (tmp_path / "harm").exists()


def test_weights_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.ckpt").write_bytes(b"")
    for weights, message in (
        ("none.safetensors", "no weights file"),
        ("a b", "no weights file"),
        (str(tmp_path / "a.ckpt"), "weights are"),
    ):
        with pytest.raises(InputError, match=message):
            find_weights(weights)

    def offline(*_: object) -> str:
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    with pytest.raises(InputError, match=r"someone/model cannot be had .*no network.*pass its path"):
        find_weights("someone/model")


def test_random_weights_are_the_same_every_time() -> None:
    state = torch.get_rng_state()
    assert torch.equal(entry().build("random").weight, entry().build("random").weight)
    assert torch.equal(state, torch.get_rng_state())


def test_missing_libraries_and_defaults() -> None:
    with pytest.raises(InputError, match=r"needs the library 'no_such_library'.*: pip install it"):
        entry(library="no_such_library", install="pip install it").build("random")
    with pytest.raises(InputError, match="no default weights"):
        entry().build()

    def create() -> nn.Module:
        raise ImportError("no cv2")

    with pytest.raises(InputError, match=r"cannot be imported .no cv2"):
        entry(create=create).build("random")


# --- geometry


def test_prediction_checks_shapes() -> None:
    good = {
        "depth": torch.ones(2, 3, 4, dtype=torch.float64), "confidence": torch.ones(2, 3, 4), "points": torch.ones(2, 3, 4, 3),
        "world_to_camera": torch.ones(2, 3, 4), "intrinsics": torch.ones(2, 3, 3), "images": torch.ones(2, 3, 4, 3),
    }  # fmt: skip
    made = Prediction(**good)
    assert made.depth.dtype == torch.float32
    assert made.num_views == 2
    for name in good:
        with pytest.raises(AdapterError, match="Prediction"):
            Prediction(**good | {name: torch.ones(2, 3)})


def test_unproject_inverts_projection() -> None:
    rotation = torch.linalg.qr(torch.randn(2, 3, 3, dtype=torch.float64)).Q
    camera = torch.cat((rotation, torch.randn(2, 3, 1, dtype=torch.float64)), -1)
    intrinsics = torch.tensor([[30.0, 0, 8], [0, 25, 6], [0, 0, 1]], dtype=torch.float64).expand(2, 3, 3)
    depth = 1 + torch.rand(2, 12, 16, dtype=torch.float64)
    points = unproject(depth, camera, intrinsics)
    seen = torch.einsum("sij,shwj->shwi", camera[..., :3], points) + camera[:, None, None, :, 3]
    torch.testing.assert_close(seen[..., 2], depth)
    pixels = torch.einsum("sij,shwj->shwi", intrinsics, seen)
    torch.testing.assert_close(pixels[0, 5, 7, :2] / pixels[0, 5, 7, 2], torch.tensor([7.5, 5.5], dtype=torch.float64))


def test_intrinsics_are_found_again() -> None:
    intrinsics = torch.tensor([[300.0, 0, 32], [0, 280, 24], [0, 0, 1]]).expand(2, 3, 3)
    points = unproject(1 + torch.rand(2, 48, 64), torch.eye(3, 4).expand(2, 3, 4), intrinsics)
    points[:, :5] += torch.randn(2, 5, 64, 3)  # outliers
    torch.testing.assert_close(fit_intrinsics(points), intrinsics, rtol=0.01, atol=0.01)


def test_depth_error() -> None:
    truth = torch.tensor([[[1.0, 2.0], [4.0, 0.0]]])
    error = depth_error(truth * 1.5, truth)
    assert error.mean == error.maximum == pytest.approx(0.5)
    assert depth_error(truth * 1.5, truth, align_scale=True).maximum == pytest.approx(0, abs=1e-7)
    assert np.isnan(depth_error(truth, torch.zeros_like(truth)).mean)
