"""Whatever the default device is, tensors are made where their inputs are: on the meta device, which has no values, nothing is made."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pairs import costly
from PIL import Image
from torch import Tensor, nn
from written_scenes import render as rendered
from written_scenes import write_layout

import lite3r_adapters
import lite3r_plugin
from lite3r_plugin import apply_lite3r, calibrate, convert, describe, lite3r_disabled, load_lite3r, remove_lite3r, save_lite3r
from lite3r_plugin.adapter.plugins import find_model
from lite3r_plugin.apply.lookup import lite3r_modules
from lite3r_plugin.bench.models import make_images
from lite3r_plugin.ops.fp8 import passes
from lite3r_plugin.ops.sla import sparse_linear_attention
from lite3r_plugin.runtime.exact import rotary_tables, token_positions
from lite3r_plugin.scene.data import Frame, Scene, Views, open_scenes
from lite3r_plugin.scene.export import PointCloud, point_cloud, render
from lite3r_plugin.scene.geometry import Geometry, fit_intrinsics, relative_to_first
from lite3r_plugin.scene.images import to_tensor
from lite3r_plugin.scene.metrics import constant_geometry, depth_metrics, pair_errors, paired_bootstrap, point_metrics, pose_metrics
from lite3r_plugin.scene.prediction import Prediction
from lite3r_plugin.scene.procedural import ProcScenes, TextureBank, covisibility, reprojection_check
from lite3r_plugin.testbed import Testbed, TestbedConfig
from lite3r_plugin.testbed.evaluate import depth_errors, pose_errors
from lite3r_plugin.testbed.film import develop, jpeg
from lite3r_plugin.testbed.gate import gate_scenes
from lite3r_plugin.testing import TEST_CONFIG

IMAGES = torch.rand(1, 3, 3, 48, 64, generator=torch.Generator().manual_seed(0))


def sparse(**fields: Any) -> nn.Module:
    torch.manual_seed(0)
    model = Testbed(TestbedConfig(dim=64, depth=2, stem=16)).eval()
    apply_lite3r(model, TEST_CONFIG, **fields)
    for site in lite3r_modules(model).values():
        if site.sparse:
            nn.init.normal_(site.proj_lin.weight)
    return model


def depth(model: nn.Module) -> Tensor:
    return model(IMAGES)["depth"]


def trained(model: nn.Module) -> Tensor:
    depth(model).square().mean().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def calibrated(model: nn.Module) -> Tensor:
    calibrate(model, [IMAGES, 1 - IMAGES], judged=1)
    return depth(model)


def converted(model: nn.Module) -> Tensor:
    convert(model)
    model.to(torch.bfloat16).float()
    describe(model)
    return depth(model)


def dense(model: nn.Module) -> Tensor:
    with lite3r_disabled(model):
        out = depth(model)
    return torch.cat((out, depth(remove_lite3r(model))))


@pytest.mark.parametrize(
    ("run", "fields"),
    costly(
        [depth, trained, calibrated, converted, dense],
        [{}, {"linear_branch": "marginal", "block_means": True}, {"fuse": False}, {"precision": "fp8_qat"}],
    ),
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_models(run: Callable[[nn.Module], Tensor], fields: dict[str, Any]) -> None:
    expected, model = run(sparse(**fields)), sparse(**fields)
    with torch.device("meta"):
        found = run(model)
    assert not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    torch.testing.assert_close(found, expected, equal_nan=True)


@pytest.mark.parametrize("precision", ["full", "fp8"])
def test_apply_and_checkpoints(tmp_path: Path, precision: str) -> None:
    model, other = sparse(precision=precision), Testbed(TestbedConfig(dim=64, depth=2, stem=16)).eval()
    other.load_state_dict({k: v for k, v in sparse().state_dict().items() if "proj_lin" not in k})
    with torch.device("meta"):
        save_lite3r(model, tmp_path)
        load_lite3r(other, tmp_path)
        torch.testing.assert_close(depth(other), depth(model))
    assert not any(tensor.is_meta for tensor in (*other.parameters(), *other.buffers()))


@pytest.mark.parametrize("linear", ["none", "all", "marginal"])
@pytest.mark.parametrize("pinned_tokens", [0, 20])
def test_operators(linear: str, pinned_tokens: int) -> None:
    q, k, v, proj = (torch.randn(*shape) for shape in [(1, 2, 70, 16)] * 3 + [(16, 16)])
    outputs = []
    for scope in (contextlib.nullcontext(), torch.device("meta")):
        with scope:
            out = sparse_linear_attention(
                q, k, v, keep_ratio=0.3, negligible_ratio=0.2, linear=linear, proj=proj, block_means=True, block_q=16, block_k=16,
                pinned_tokens=pinned_tokens,
            )  # fmt: skip
            rows = passes(v).gelu_quantize(out, "none")
            outputs.append((out, rows.data.float(), rows.scale))
    torch.testing.assert_close(*outputs)


def test_positions_and_tables() -> None:
    with torch.device("meta"):
        positions = token_positions(2, 3, 7, 1, torch.device("cpu"))
        tables = rotary_tables(8, 100.0, torch.device("cpu"), torch.float32)
    assert {tensor.device for tensor in (positions, *tables)} == {torch.device("cpu")}
    assert positions[0, :3].tolist() == [[0, 0], [1, 1], [1, 2]]


TRUTH = rendered(views=3, height=24, width=32)
LAYOUTS = ["blendedmvs", "7scenes", "colmap", "dtu-idr", "nerfstudio", "strecha"]


def geometry(shift: float = 0.0) -> Geometry:
    """What is known of a rendered scene, or what a model that is a little off predicts of it."""
    move = torch.tensor([[[0.0], [0.0], [shift]]]) * torch.arange(3.0)[:, None, None]
    return Geometry(TRUTH["depth"] * (1 + shift), TRUTH["w2c"] + torch.nn.functional.pad(move, (3, 0)), TRUTH["K"], TRUTH["valid"])


def prediction() -> Prediction:
    depth = TRUTH["depth"]
    return Prediction(depth, 1 + depth, TRUE.points(), TRUTH["w2c"], TRUTH["K"], TRUTH["rgb"].permute(0, 2, 3, 1))


MINE, TRUE = geometry(0.1), geometry()


def measures() -> Any:
    return [
        depth_metrics(MINE.depth, TRUE.depth, TRUE.valid),
        depth_metrics(MINE.depth, TRUE.depth, TRUE.valid, align="view"),
        pose_metrics(MINE.world_to_camera, TRUE.world_to_camera),
        pose_metrics(*(torch.cat((g.world_to_camera, g.world_to_camera.new_tensor([[[0, 0, 0, 1]]] * 3)), 1) for g in (MINE, TRUE))),
        pair_errors(MINE.world_to_camera, TRUE.world_to_camera),
        point_metrics(MINE.points(), TRUE.points(), TRUE.valid, max_points=100),
        constant_geometry(TRUE),
        paired_bootstrap([0.1 * i for i in range(9)], [0.1 * i * i for i in range(9)], resamples=100),
    ]


def views() -> Views:
    frames = [
        Frame("0", TRUTH["rgb"][0], TRUTH["K"][0].double(), TRUTH["w2c"][0].double(), TRUTH["depth"][0], TRUTH["valid"][0]),
        Frame("1", TRUTH["rgb"][1], TRUTH["K"][1].double(), TRUTH["w2c"][1].double()),
    ]
    return Scene("rendered", tuple(frames), "here").sample([0, 1], (20, 28))


def sample() -> dict[str, Tensor]:
    found = views()
    return {**found.as_sample(), "relative": relative_to_first(TRUTH["w2c"]), "intrinsics": fit_intrinsics(TRUE.points())}


def clouds() -> Any:
    cloud = point_cloud(prediction(), max_points=200)
    return cloud, render(cloud, (40, 60)), render(PointCloud(cloud.points.double(), cloud.colors), (40, 60))


def drawn() -> Any:
    bank = TextureBank.procedural(4, 16, "cpu", seed=0)
    made = ProcScenes(bank, "cpu", seed=1)(1, 2, 24, 32)
    return made, reprojection_check(made), covisibility(made)


def of_the_testbed() -> Any:
    images = TRUTH["rgb"][None]
    gate = gate_scenes([5_000], views=2, height=16, width=16)
    errors = depth_errors(MINE.depth[None], TRUE.depth[None], TRUTH["valid"][None])
    poses = [pose_errors(TRUTH["w2c"][None], TRUTH["w2c"][None], torch.full((1, 3), ok, device="cpu")) for ok in (True, False)]
    return gate, errors, poses, develop(images, torch.Generator().manual_seed(0)), jpeg(images, images.new_ones(1, 1, 1, 1, 1))


def images() -> Any:
    return to_tensor([Image.new("RGB", (4, 3), "red")]), make_images(2, 28, torch.device("cpu"), seed=0)


def built() -> Any:
    entry = dataclasses.replace(find_model("testbed"), create=lambda: Testbed(TestbedConfig(dim=64, depth=1, stem=8)))
    return entry.build("random").state_dict()


def plain(found: Any) -> Any:
    """The tensors and numbers of records, however nested; words are left out."""
    if dataclasses.is_dataclass(found) and not isinstance(found, type):
        found = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
    if isinstance(found, dict):
        return {name: plain(value) for name, value in found.items()}
    if isinstance(found, (tuple, list)):
        return [plain(value) for value in found if not isinstance(value, str)]
    return found


@pytest.mark.parametrize("run", [measures, views, sample, clouds, drawn, of_the_testbed, images, built])
def test_scenes(run: Callable[[], Any]) -> None:
    with torch.device("meta"):  # first, lest what is kept was made outside
        found = run()
    torch.testing.assert_close(plain(found), plain(run()), equal_nan=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_files(layout: str, tmp_path: Path) -> None:
    data = f"{layout}:{write_layout(TRUTH, layout, tmp_path / 'data')}"
    with torch.device("meta"):
        found = open_scenes(data)[0].sample([0, 1])
    torch.testing.assert_close(plain(found), plain(open_scenes(data)[0].sample([0, 1])))


# What makes a tensor out of nothing, where the default device is, unless it is told another.
FACTORIES = {
    "arange",
    "as_tensor",
    "asarray",
    "empty",
    "eye",
    "full",
    "linspace",
    "logspace",
    "ones",
    "rand",
    "randint",
    "randn",
    "randperm",
}
FACTORIES |= {"scalar_tensor", "tensor", "tril_indices", "triu_indices", "zeros"}


def calls(tree: ast.AST, inside: tuple[str, ...] = ()) -> Iterator[tuple[ast.Call, tuple[str, ...]]]:
    """The calls of a module, each with the functions that it is in."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Call):
            yield node, inside
        yield from calls(node, (*inside, node.name) if isinstance(node, ast.FunctionDef) else inside)


def test_what_makes_tensors_names_a_device() -> None:
    """But for parameters, which are made where `with torch.device(...)` says, and for what stands in such a context."""
    unnamed, seen = [], 0
    for package in (lite3r_plugin, lite3r_adapters):
        root = Path(str(package.__file__)).parent
        for path in sorted(root.rglob("*.py")):
            for call, inside in calls(ast.parse(path.read_text())):
                name = ast.unparse(call.func).removeprefix("torch.")
                if name not in FACTORIES or ast.unparse(call.func) == name:
                    continue
                seen += 1
                if "__init__" in inside or (path.name == "gate.py" and inside[0] in ("_draw", "_cameras")):
                    continue
                if not any(keyword.arg in ("device", None) for keyword in call.keywords):
                    unnamed.append(f"{path.relative_to(root)}:{call.lineno}: {ast.unparse(call)}")
    assert seen > 100
    assert not unnamed, "\n".join(unnamed)
