"""What adapters say of the outputs of their models: the same numbers as the command line reads off, with gradients, also in training."""

from __future__ import annotations

import dataclasses
from typing import Any

import pluggy
import pytest
import torch
from hosts import VGGT
from real_models import small_da3, small_vggt
from torch import Tensor, nn

from lite3r_plugin import hookimpl
from lite3r_plugin.adapter import AdapterWarning, ModelOutputs, find_outputs, hookspecs, model_entries, plugins
from lite3r_plugin.errors import AdapterError
from lite3r_plugin.testbed import Testbed, TestbedConfig

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:register_new_resolver\(\) is deprecated:UserWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda':UserWarning"),
    pytest.mark.filterwarnings(r"ignore:`torch.cuda.amp.autocast\(args...\)` is deprecated:FutureWarning"),
]


def small_testbed() -> nn.Module:
    return Testbed(TestbedConfig(dim=64, depth=1, head_dim=32, stem=8)).eval()


def small_pi3() -> nn.Module:
    """Heads and outputs of Pi3 around the structural double."""
    import hosts

    class Net(hosts.Pi3):
        def __init__(self) -> None:
            super().__init__()
            self.point_head = self.conf_head = self.camera_head = nn.Identity()

        def forward(self, images: Tensor) -> dict[str, Tensor]:
            super().forward(images)
            batch, views, _, height, width = images.shape
            local = torch.rand(batch, views, height, width, 3) + 1 + 0 * self.register_token.sum()
            pose = torch.eye(4).repeat(batch, views, 1, 1)
            pose[..., :3, :3] = torch.linalg.qr(torch.randn(batch, views, 3, 3)).Q
            pose[..., :3, 3] = torch.randn(batch, views, 3)
            points = torch.einsum("bsij,bshwj->bshwi", pose[..., :3, :3], local) + pose[:, :, None, None, :3, 3]
            return {"points": points, "local_points": local, "conf": local[..., :1], "camera_poses": pose}

    return Net().eval()


MODELS = {"testbed": small_testbed, "vggt": small_vggt, "da3-small": small_da3, "pi3": small_pi3}


@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_those_of_the_command_line(name: str) -> None:
    model, images = MODELS[name](), torch.rand(1, 3, 3, 112, 112)
    mapped = find_outputs(model)
    assert mapped is not None
    torch.manual_seed(1)
    outputs = mapped(model(images))
    torch.manual_seed(1)
    with torch.no_grad():
        predicted = model_entries()[name].predict(model, images[0])
    for field in ("depth", "world_to_camera", "intrinsics", "points"):
        if (value := getattr(outputs, field)) is not None and not (name == "testbed" and field == "points"):  # it has a head for these too
            torch.testing.assert_close(value[0].detach(), getattr(predicted, field), msg=lambda text, field=field: f"{field}: {text}")
    assert outputs.depth is not None
    assert outputs.depth.requires_grad
    assert outputs.world_to_camera is not None
    assert (outputs.camera is not None) == (name in ("testbed", "vggt"))
    assert all(x.shape[:2] == (1, 3) for x in outputs.other)
    assert len(outputs.other) == (2 if name == "testbed" else 1)


@pytest.mark.parametrize("name", ["testbed", "vggt"])
def test_in_training_and_in_wrappers(name: str) -> None:
    model = MODELS[name]().train()
    mapped = find_outputs(torch.compile(model, backend="eager"))
    assert mapped is find_outputs(model)
    assert mapped(model(torch.rand(1, 2, 3, 112, 112))).depth.shape == (1, 2, 112, 112)


def test_heads_that_are_missing() -> None:
    model = small_vggt()
    model.depth_head = None
    outputs = find_outputs(model)(model(torch.rand(1, 2, 3, 112, 112)))
    assert outputs.depth is None
    assert outputs.intrinsics is None
    assert outputs.world_to_camera.shape == (1, 2, 3, 4)


def test_networks_with_a_family_inside_have_outputs_of_their_own() -> None:
    assert find_outputs(VGGT()) is None  # its heads are others
    assert find_outputs(nn.Sequential(small_testbed())) is None
    assert find_outputs(small_testbed().aggregator) is None
    assert find_outputs(nn.Linear(1, 1)) is None


def test_an_adapter_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Plugin:
        answer: Any = None

        @hookimpl
        def lite3r_outputs(self, model: nn.Module) -> Any:
            if self.answer == "error":
                raise RuntimeError("oh")
            return self.answer

    manager, plugin = pluggy.PluginManager(hookspecs.PROJECT), Plugin()
    manager.add_hookspecs(hookspecs)
    manager.register(plugin, name="mine")
    monkeypatch.setattr(plugins, "get_manager", lambda: manager)
    assert find_outputs(nn.Linear(1, 1)) is None
    plugin.answer = "error"
    with pytest.warns(AdapterWarning, match="'mine'.*failed.*oh"):
        assert find_outputs(nn.Linear(1, 1)) is None
    plugin.answer = ModelOutputs(camera=torch.ones(1, 2, 3))
    with pytest.warns(AdapterWarning, match="no function"):
        assert find_outputs(nn.Linear(1, 1)) is None
    plugin.answer = ModelOutputs
    assert find_outputs(nn.Linear(1, 1)) is ModelOutputs


def test_outputs_fit_together() -> None:
    depth = torch.ones(2, 3, 4, 5)
    whole = ModelOutputs(depth, torch.ones(2, 3, 4, 5, 3), torch.ones(2, 3, 3, 4), torch.ones(2, 3, 3, 3), torch.ones(2, 3, 9), (depth,))
    for change in (
        {"points": torch.ones(2, 3, 4, 6, 3)}, {"world_to_camera": torch.ones(2, 3, 4, 4)}, {"intrinsics": torch.ones(2, 4, 3, 3)},
        {"camera": torch.ones(3, 9)}, {"depth": depth.long()}, {"depth": [depth]}, {"other": [depth]}, {"other": (1.0,)},
    ):  # fmt: skip
        with pytest.raises(AdapterError, match=next(iter(change))):
            dataclasses.replace(whole, **change)
    with pytest.raises(AdapterError, match="nothing in it"):
        ModelOutputs()
