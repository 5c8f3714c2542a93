"""Models of the command line: what they make of images, and weights, loaded strictly from hostile files."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from lite3r_adapters.depth_anything_3 import model as da3
from lite3r_adapters.fast3r import model as fast3r
from lite3r_adapters.mapanything import model as mapanything
from lite3r_adapters.pi3 import model as pi3
from lite3r_adapters.vggt import model as vggt
from lite3r_plugin.adapter.models import ModelEntry
from lite3r_plugin.adapter.plugins import find_model
from lite3r_plugin.adapter.weights import find_weights, load_weights
from lite3r_plugin.errors import AdapterError, InputError


def entry(**fields: object) -> ModelEntry:
    """An entry of a Linear; nothing predicts anything."""
    made = ModelEntry("linear", "", lambda: nn.Linear(3, 2), lambda images: torch.zeros(1), lambda model, images: None)
    return dataclasses.replace(made, **fields)


@pytest.mark.parametrize("module", [vggt, da3, pi3, mapanything, fast3r])
def test_preprocess_takes_all_shapes(module: Any) -> None:
    for size in ((640, 480), (480, 640), (5, 3), (900, 2), (2, 300)):
        out = module.preprocess([Image.new("RGB", size, "gray")])
        assert out.dtype == torch.float32
        assert out.shape[:2] == (1, 3)
        assert out.shape[2] % module.PATCH == 0 < out.shape[2]
        assert out.shape[3] % module.PATCH == 0 < out.shape[3]
    mixed = module.preprocess([Image.new("RGB", (640, 480)), Image.new("RGB", (300, 400))])
    assert mixed.shape[0] == 2


def test_preprocess_sizes() -> None:
    photo = [Image.new("RGB", (779, 520), (255, 0, 0))]
    assert vggt.preprocess(photo).shape[2:] == (350, 518)
    assert vggt.preprocess([Image.new("RGB", (300, 900))]).shape[2:] == (518, 518)
    assert pi3.preprocess(photo).shape[2:] == (406, 616)
    out = da3.ENTRIES["da3-small"].inputs(photo)
    assert out.shape[2:] == (336, 504)
    torch.testing.assert_close(out[0, 0, 0, 0].item(), (1 - 0.485) / 0.229, rtol=1e-5, atol=0)


@pytest.mark.parametrize("arguments", [lambda x: x, lambda x: (x,), lambda x: {"images": x}])
def test_a_forward_is_called_as_the_entry_says(arguments: Any) -> None:
    class Model(nn.Module):
        def forward(self, images: torch.Tensor, scale: float = 2.0) -> torch.Tensor:
            return images * scale

    assert torch.equal(entry(arguments=arguments).run(Model(), torch.ones(1, 2)), torch.full((1, 2), 2.0))


@pytest.mark.parametrize("name", ["mapanything", "fast3r"])
def test_models_that_take_a_list_of_views(name: str) -> None:
    images = torch.rand(2, 3, 3, 8, 12)
    (views,) = {"mapanything": mapanything, "fast3r": fast3r}[name].arguments(images)
    assert len(views) == 3
    assert all(torch.equal(view["img"], images[:, i]) for i, view in enumerate(views))
    if name == "fast3r":
        assert views[0]["true_shape"].tolist() == [[8, 12]] * 2


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

    def offline(*_: object, **__: object) -> str:
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(InputError, match=r"someone/model cannot be had .*pass its path.*no network"):
        find_weights("someone/model")


def test_random_weights_are_the_same_every_time() -> None:
    state = torch.get_rng_state()
    assert torch.equal(entry().build("random").weight, entry().build("random").weight)
    assert torch.equal(state, torch.get_rng_state())


def test_the_resolution_is_that_of_square_photographs() -> None:
    sides = {"vggt": 518, "da3-large": 504, "pi3": 504, "mapanything": 518, "fast3r": 512, "testbed": 224}
    assert {name: find_model(name).resolution for name in sides} == sides


def test_missing_libraries_and_defaults() -> None:
    with pytest.raises(InputError, match=r"needs the library 'no_such_library'.*: pip install it"):
        entry(library="no_such_library", install="pip install it").build("random")
    with pytest.raises(InputError, match="no default weights"):
        entry().build()

    def create() -> nn.Module:
        raise ImportError("no cv2")

    with pytest.raises(InputError, match=r"^the model 'linear' cannot be imported .ImportError: no cv2.$"):
        entry(create=create).build("random")


def test_a_package_that_the_library_needs_is_named_as_what_is_missing() -> None:
    def create() -> nn.Module:
        import evo_of_nobody  # noqa: F401  # pyright: ignore[reportMissingImports]

        raise AssertionError

    def part() -> nn.Module:
        import json.evo_of_nobody  # noqa: F401  # pyright: ignore[reportMissingImports]

        raise AssertionError

    named = r"the library 'torch' of the model 'linear' imports 'evo_of_nobody', which is not installed: install it"
    with pytest.raises(InputError, match=f"^{named}, or all that the model needs: pip install a b$"):
        entry(library="torch", install="pip install a b", create=create).build("random")
    with pytest.raises(InputError, match=f"^{named}$"):
        entry(library="torch", create=create).build("random")
    with pytest.raises(InputError, match=r"^the library 'torch' of .* cannot be imported \(.*json.evo_of_nobody.*\): pip install a b$"):
        entry(library="torch", install="pip install a b", create=part).build("random")


@pytest.mark.parametrize(
    ("field", "value", "kind"),
    [
        ("summary", None, "a string"),
        ("create", "Testbed", "a function"),
        ("library", 5, "a string or None"),
        ("rename", "prefix.", "a function or None"),
        ("min_views", 0, "a positive integer"),
        ("min_views", True, "a positive integer"),
    ],
)
def test_an_entry_with_a_field_of_the_wrong_kind_is_refused(field: str, value: object, kind: str) -> None:
    with pytest.raises(AdapterError, match=rf"{field} is {kind}, got {value!r}"):
        entry(**{field: value})


def test_a_model_that_is_none_is_refused() -> None:
    with pytest.raises(AdapterError, match="made dict, not a"):
        entry(create=dict).build("random")


@pytest.mark.parametrize("pixels", [None, torch.zeros(3, 4, 4), torch.zeros(2, 3, 4, 4), torch.zeros(1, 3, 4, 4, dtype=torch.uint8)])
def test_pixels_of_another_form_are_refused(pixels: object) -> None:
    with pytest.raises(AdapterError, match=r"of 1 images, not \[1, 3, H, W\] float32"):
        entry(preprocess=lambda images: pixels, normalize=lambda x: x).inputs([object()])
