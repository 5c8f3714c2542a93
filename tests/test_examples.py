"""The examples run, each as its README says."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_model
from torch import nn

from lite3r_plugin import lite3r_disabled, load_lite3r
from lite3r_plugin.adapter.plugins import find_model
from lite3r_plugin.apply.lookup import lite3r_modules
from lite3r_plugin.scene.data import open_scenes
from lite3r_plugin.scene.images import find_images, load_images

EXAMPLES = Path(__file__).parent.parent / "examples"
README = (EXAMPLES / "README.md").read_text()


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False, timeout=300)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with the third-party adapter installed, metadata and all."""
    pytest.importorskip("hatchling")
    target = str(tmp_path_factory.mktemp("site"))
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--disable-pip-version-check", "--target", target)
    result = run(sys.executable, "-m", "pip", "install", *options, str(EXAMPLES / "custom_adapter"))
    assert result.returncode == 0, result.stderr
    return target


@pytest.mark.slow
def test_the_third_party_adapter_is_found_by_its_entry_point_and_passes_its_own_tests(installed: str) -> None:
    code = (
        "import sys, pytest; from lite3r_plugin.adapter.plugins import list_adapters; "
        "print([(a.name, a.distribution) for a in list_adapters()][0]); sys.exit(pytest.main(sys.argv[1:]))"
    )
    tests = str(EXAMPLES / "custom_adapter" / "tests")
    result = run(sys.executable, "-c", code, "-q", "-p", "no:cacheprovider", tests, PYTHONPATH=installed)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.startswith("('tiny_multiview', 'tiny-multiview')\n")
    assert "2 passed" in result.stdout


# Scripts


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The current folder: four photographs, and the examples where the README has them."""
    folder = tmp_path_factory.mktemp("workspace")
    (folder / "photos").mkdir()
    (folder / "examples").symlink_to(EXAMPLES)
    scene = open_scenes("procedural:scenes=1,views=4,size=112,textures=6")[0]
    for i, view in enumerate(scene.sample(range(4), None).images):
        pixels = (view * 255).byte().permute(1, 2, 0)[:28].numpy()
        Image.fromarray(pixels).save(folder / "photos" / f"{i}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


def commands() -> list[list[str]]:
    """Those of the table that run a script of one file."""
    found = [shlex.split(command) for command in re.findall(r"\| `([^`]+)` \|$", README, re.MULTILINE)]
    return [command for command in found if any(word.endswith(".py") for word in command)]


def example(name: str, *smaller: str) -> Any:
    """What the `main` of an example returns, run as the README says but for what makes it smaller."""
    arguments = next(command[2:] for command in commands() if command[:2] == ["python", f"examples/{name}.py"])
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main([*arguments, *smaller])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_readme_has_every_example() -> None:
    shown = set(re.findall(r"\]\((?!\.\.)([\w/.]+)\)", README))
    there = {path.name for path in EXAMPLES.glob("*.py")} | {f"{path.parent.name}/README.md" for path in EXAMPLES.glob("*/README.md")}
    assert shown == there
    run = {word.removeprefix("examples/") for command in commands() for word in command if word.endswith(".py")}
    assert run == {name for name in there if name.endswith(".py")}


@pytest.fixture(scope="module")
def calibrated(workspace: Path) -> nn.Module:
    """The model of the example, which runs sparse, after it was saved."""
    return example("calibrate_photographs", "--subsets", "2", "--views", "3", "--keep-ratio", "0.1", "--dense-below", "0")


@pytest.mark.slow
def test_calibrating_on_photographs_and_loading_it_elsewhere(workspace: Path, calibrated: nn.Module) -> None:
    assert names(workspace / "calibrated") == ["lite3r.safetensors", "lite3r_config.json"]
    assert any(site.proj_lin.weight.any() for site in lite3r_modules(calibrated).values() if site.sparse)  # zero where it does not help

    prediction = example("load_and_run")
    entry = find_model("testbed")
    images = entry.inputs(load_images(find_images(workspace / "photos"))).to(next(calibrated.parameters()).device)
    with torch.no_grad(), torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
        sparse = entry.predict(calibrated, images)
        with lite3r_disabled(calibrated):
            dense = entry.predict(calibrated, images)
    torch.testing.assert_close(prediction.depth, sparse.depth)
    torch.testing.assert_close(prediction.world_to_camera, sparse.world_to_camera)
    assert not torch.allclose(prediction.depth, dense.depth)
    assert (workspace / "scene.ply").read_bytes().startswith(b"ply\n")


SCENES = "procedural:scenes=2,views=3,size=64,textures=6,seed=1"
TINY = ("--size", "64", "--views", "3", "--scenes", SCENES, "--held-out", SCENES)
"""Judged by what it trains on: of scenes that it has not seen, so few steps teach nothing."""


@pytest.mark.slow
def test_distilling_on_one_process(workspace: Path) -> None:
    model = example("distil", *TINY, "--steps", "2", "--out", "alone")
    loaded = load_lite3r(find_model("testbed").build("random"), workspace / "alone" / "model").to(next(model.parameters()).device)
    assert model.state_dict().keys() == loaded.state_dict().keys()
    differing = [name for name, value in model.state_dict().items() if not torch.allclose(value, loaded.state_dict()[name])]
    assert differing == []


@pytest.mark.slow
def test_distilling_on_two_processes(workspace: Path) -> None:
    _, *arguments = next(command for command in commands() if command[0] == "torchrun")
    launch = (sys.executable, "-m", "torch.distributed.run")  # what torchrun is
    machines = {"CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    result = run(*launch, *arguments, *TINY, "--steps", "16", **machines)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "16 steps of 2 samples, 2 processes on cpu" in result.stderr
    assert result.stdout.count("all steps are done") == 1  # only one of them says it

    folder = workspace / "distilled"
    assert names(folder / "run") == ["metrics.jsonl", "training.safetensors"]
    assert names(folder / "model") == ["lite3r.safetensors", "lite3r_config.json"]
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    held_out = [line["validation"] for line in lines if "validation" in line]
    assert len(held_out) == 11
    assert held_out[-1] < 0.9 * held_out[0]
    loaded = load_lite3r(find_model("testbed").build(), folder / "model")  # LoRA is in the weights
    changed = loaded.state_dict()["aggregator.frame_blocks.0.attn.qkv.weight"]
    assert not torch.allclose(changed, find_model("testbed").build().state_dict()["aggregator.frame_blocks.0.attn.qkv.weight"])


@pytest.mark.slow
def test_an_adapter_of_peft(workspace: Path) -> None:
    losses, difference = example("peft_adapter", "--size", "64")
    assert losses[1] < losses[0]
    assert difference < 1e-6
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(names(workspace / "adapter"))


def test_fine_tuning_a_head(workspace: Path) -> None:
    tiny = ("--scenes", "procedural:scenes=2,views=4,size=64,textures=6", "--size", "64", "--epochs", "3")
    model, losses = example("finetune_head", *tiny)
    assert losses[-1] < 0.9 * losses[0]
    fresh = find_model("testbed").build(device=next(model.parameters()).device).state_dict()
    changed = {name for name, value in model.state_dict().items() if name in fresh and (value != fresh[name]).any()}
    assert changed
    assert all(name.startswith("depth_head.") for name in changed)
    assert any(site.calls.sparse for site in lite3r_modules(model).values())

    another = find_model("testbed").build(device=next(model.parameters()).device)
    load_model(another.get_submodule("depth_head"), workspace / "head.safetensors")
    torch.testing.assert_close(another.get_submodule("depth_head").state_dict(), model.get_submodule("depth_head").state_dict())
