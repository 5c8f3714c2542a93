"""convert_official: every tensor of a published checkpoint is used or named, and what comes out computes what the authors' code did."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from official import DA3_NAMES, VGGT_NAMES, SmallVGGT, attention_names, deployed, listed, official_state, patterns
from torch import Tensor, nn

from lite3r_plugin import apply_lite3r, describe, load_lite3r
from lite3r_plugin.adapter import find_sites
from lite3r_plugin.apply.lookup import lite3r_modules
from lite3r_plugin.errors import AlreadyAppliedError, CheckpointError, ConfigError, InputError, ModelTypeError, UnknownModelError
from lite3r_plugin.hub import convert_official

IMAGES = (1, 3, 3, 70, 98)
BRANCH = "aggregator.global_blocks.1.attn.proj_lin.weight"
State = dict[str, Tensor]


def vggt() -> SmallVGGT:
    return SmallVGGT(depth=2, trunk=2).eval()


@pytest.fixture
def model() -> nn.Module:
    return vggt()


@pytest.fixture
def state(model: nn.Module) -> State:
    return official_state(model)


def save(path: Path, state: Any) -> Path:
    """As the authors' training does."""
    torch.save({"model": state, "optim": None, "step": 113, "extra": {}}, path)
    return path


def same(first: nn.Module, second: nn.Module) -> bool:
    mine, theirs = first.state_dict(), second.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_the_small_model_has_the_names_of_the_published_vggt() -> None:
    with torch.device("meta"):
        names = list(official_state(SmallVGGT()))
    assert (len(names), len(patterns(names))) == (1493, 145)
    assert patterns(names) == listed(VGGT_NAMES)


def test_all_names_of_the_published_vggt_are_used(tmp_path: Path) -> None:
    model = SmallVGGT()
    state = official_state(model)
    done = convert_official(save(tmp_path / "vggt.pt", state), model, tmp_path / "out")
    assert done.branches == {(64, 64): 72, (128, 128): 4}
    assert done.weights == 1493 - 2 * 76
    assert sum(done.dropped.values()) == 76
    loaded = load_lite3r(SmallVGGT(), tmp_path / "out")
    for name, module in lite3r_modules(loaded).items():
        assert torch.equal(module.proj_lin.weight, state[f"{name}.proj_lin.weight"])
    assert len(lite3r_modules(loaded)) == 76


def test_what_they_deployed_is_computed(model: nn.Module, state: State, tmp_path: Path) -> None:
    """With keep_ratio=1: their dense attention and their linear branch, at every site, those of the camera head included."""
    convert_official(save(tmp_path / "vggt.pt", state), model, tmp_path / "out", keep_ratio=1.0)
    loaded = load_lite3r(vggt(), tmp_path / "out")
    images = torch.rand(IMAGES)
    with torch.no_grad():
        dense, theirs = model(images), deployed(model, state)(images)
        torch.testing.assert_close(loaded(images), theirs, atol=1e-4, rtol=1e-4)
    assert (dense - theirs).abs().max() > 1e-2  # or nothing was compared


def test_the_configuration_is_as_near_as_it_gets(model: nn.Module, state: State, tmp_path: Path) -> None:
    done = convert_official(save(tmp_path / "vggt.pt", state), model, tmp_path / "out")
    loaded = load_lite3r(vggt(), tmp_path / "out")
    config = describe(loaded).config
    assert config == done.config
    assert (config.linear_branch, config.feature_map, config.block_means, config.pin, config.dense_below) == (
        "all",
        "elu",
        False,
        "none",
        0,
    )
    assert set(config.scopes) == {"frame", "global", "encoder", "camera"}
    with torch.no_grad():
        loaded(torch.rand(IMAGES))
    ran = {site.scope: site.calls for site in describe(loaded).sites}
    assert ran["global"].sparse
    assert ran["camera"].dense
    assert {site.keep_ratio for site in describe(loaded).sites if site.scope == "camera"} == {1.0}
    assert {site.keep_ratio for site in describe(loaded).sites if site.scope != "camera"} == {0.3}


def test_the_report_says_what_differs(model: nn.Module, state: State, tmp_path: Path) -> None:
    file = save(tmp_path / "vggt.pt", state)
    text = str(convert_official(file, model, tmp_path / "out"))
    for part in (str(file), "6 of 64 x 64, 2 of 128 x 128", "8 lam, which nothing reads", "blocks of 64 keys", "epsilon"):
        assert part in text
    assert "convert(model) stores those in FP8 that fp8_filter takes" in text
    text = str(convert_official(file, model, tmp_path / "out", keep_ratio=1.0, precision="fp8", fp8_backend="emulated"))
    assert "attention is dense with the linear branch on top" in text
    assert "convert(model)" not in text
    assert describe(load_lite3r(vggt(), tmp_path / "out")).phase == "fp8"


def test_the_model_is_left_as_it_is(model: nn.Module, state: State, tmp_path: Path) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = {name: tensor + 1 for name, tensor in state.items()}
    convert_official(save(tmp_path / "vggt.pt", state), model, tmp_path / "out")
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not lite3r_modules(model)


def test_all_weights_are_kept(state: State, tmp_path: Path) -> None:
    convert_official(save(tmp_path / "vggt.pt", state), vggt(), tmp_path / "out")
    with torch.device("meta"):
        empty = vggt()
    loaded = load_lite3r(empty, tmp_path / "out").state_dict()
    assert loaded.keys() == {name for name in state if not name.endswith(".lam")}
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.items())


def test_equal_base_weights_are_left_out(model: nn.Module, state: State, tmp_path: Path) -> None:
    torch.save(model.state_dict(), tmp_path / "base.pt")
    file = save(tmp_path / "vggt.pt", state)
    whole = convert_official(file, vggt(), tmp_path / "whole")
    done = convert_official(file, vggt(), tmp_path / "out", base=str(tmp_path / "base.pt"))
    assert (whole.whole, done.whole) == (True, False)
    sizes = [(tmp_path / name / "lite3r.safetensors").stat().st_size for name in ("whole", "out")]
    assert sizes[1] < sizes[0] / 3
    images = torch.rand(IMAGES)
    both = [load_lite3r(made, tmp_path / name)(images) for made, name in ((vggt(), "whole"), (model, "out"))]
    assert torch.equal(*both)


def test_other_base_weights_are_refused(model: nn.Module, state: State, tmp_path: Path) -> None:
    base = model.state_dict()
    base["camera_head.token_norm.weight"] = base["camera_head.token_norm.weight"].nextafter(torch.tensor(9.0))
    torch.save(base, tmp_path / "base.pt")
    file = save(tmp_path / "vggt.pt", state)
    with pytest.raises(InputError, match=r"1 of \d+ weights .* differ from .*: camera_head.token_norm.weight.*leave out the base"):
        convert_official(file, model, tmp_path / "out", base=str(tmp_path / "base.pt"))
    del base["camera_head.token_norm.weight"]
    torch.save(base, tmp_path / "base.pt")
    with pytest.raises(InputError, match=r"lacks camera_head.token_norm.weight"):
        convert_official(file, model, tmp_path / "out", base=str(tmp_path / "base.pt"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model."])
def test_prefixes_of_wrappers(prefix: str, model: nn.Module, state: State, tmp_path: Path) -> None:
    convert_official(save(tmp_path / "a.pt", {f"{prefix}{name}": tensor for name, tensor in state.items()}), model, tmp_path / "a")
    convert_official(save(tmp_path / "b.pt", state), model, tmp_path / "b")
    assert same(load_lite3r(vggt(), tmp_path / "a"), load_lite3r(vggt(), tmp_path / "b"))


def test_a_bare_state_dict(model: nn.Module, state: State, tmp_path: Path) -> None:
    torch.save(state, tmp_path / "bare.pth")
    assert convert_official(tmp_path / "bare.pth", model, tmp_path / "out").weights == len(model.state_dict())


def test_smoothing_cancels_out(model: nn.Module, state: State, tmp_path: Path) -> None:
    """A stage-1 file: its Linears divide the input by what they multiply the weight by."""
    smoothed = dict(state)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ".mlp." in name:
            smoothed[f"{name}.smooth"] = torch.rand(module.in_features) + 0.5
    smoothed["aggregator.global_blocks.1.attn.proj_lin.smooth"] = torch.ones(64)
    done = convert_official(save(tmp_path / "a.pt", smoothed), model, tmp_path / "a", keep_ratio=1.0)
    assert done.dropped["smooth of INT4 training, which cancels out"] == 2 * 2 * 4 + 1
    assert "16 Linears were smoothed" in str(done)
    images, loaded = torch.rand(IMAGES), load_lite3r(vggt(), tmp_path / "a")
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), deployed(model, state)(images), atol=1e-4, rtol=1e-4)


def rename(old: str, new: str) -> Callable[[State], Any]:
    return lambda state: state.update({new: state.pop(old)})


def put(name: str, tensor: Tensor) -> Callable[[State], Any]:
    return lambda state: state.update({name: tensor})


def nan(name: str) -> Callable[[State], Any]:
    return lambda state: state[name].view(-1)[:1].fill_(torch.nan)


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants:UserWarning")
@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning")  # as torch 2.11 says it
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("camera_head.embed_pose.bias"), r"1 missing: camera_head.embed_pose.bias\. By"),
        (lambda s: s.pop(BRANCH), rf"1 missing: {BRANCH}"),
        (put("aggregator.more.weight", torch.ones(1)), r"1 that no such model has: aggregator.more.weight"),
        (put("aggregator.attn.proj_lin.weight", torch.ones(64, 64)), r"1 that no such model has: aggregator.attn.proj_lin.weight"),
        (put("aggregator.attn.lam", torch.tensor(0.5)), r"1 that no such model has: aggregator.attn.lam"),
        (put("camera_head.smooth", torch.ones(1)), r"1 that no such model has: camera_head.smooth"),
        (rename("depth_head.norm.bias", "depth_head.norm.offset"), r"1 missing: depth_head.norm.bias; 1 that .*: depth_head.norm.offset"),
        (put(BRANCH, torch.ones(32, 32)), rf"1 of another shape: {BRANCH} \[32, 32\] for \[64, 64\]"),
        (put("camera_head.trunk.0.attn.proj_lin.weight", torch.ones(64, 64)), r"trunk.0.attn.proj_lin.weight \[64, 64\] for \[128, 128\]"),
        (put("camera_head.embed_pose.bias", torch.ones(3)), r"of another shape: camera_head.embed_pose.bias \[3\] for \[128\]"),
        (put("camera_head.embed_pose.smooth", torch.ones(3)), r"of another shape: camera_head.embed_pose.smooth \[3\] for \[9\]"),
        (put("camera_head.trunk.0.attn.lam", torch.ones(2)), r"camera_head.trunk.0.attn.lam \[2\] for a scalar"),
        (nan(BRANCH), rf"damaged: {BRANCH} has infinities or NaN"),
        (nan("depth_head.norm.weight"), r"damaged: depth_head.norm.weight has infinities or NaN"),
        (put("camera_head.embed_pose.smooth", torch.zeros(9)), r"embed_pose.smooth divides by numbers that are not positive"),
        (put("depth_head.norm.weight", torch.ones(2, dtype=torch.int8)), r"depth_head.norm.weight is torch.int8"),
        (put("depth_head.norm.weight", torch.ones(2).to_sparse()), r"depth_head.norm.weight is torch.float32, torch.sparse_coo"),
        (put("depth_head.norm.weight", torch.ones(2, device="meta")), r"depth_head.norm.weight is torch.float32, torch.strided on meta"),
        (put("depth_head.norm.weight", torch.ones(2).to(torch.float8_e4m3fn)), r"depth_head.norm.weight is torch.float8"),
        (put("depth_head.norm.weight", torch.ones(1).expand(10**13)), r"depth_head.norm.weight \[10000000000000\] for \[2\]"),
        (lambda s: s.update({3: torch.ones(1)}), r"no state dict"),
        (put("camera_head.trunk.0.attn.proj_topk.weight", torch.ones(128, 128)), r"trunk.0.attn.proj_topk.weight: a second projection"),
        (put("module.depth_head.norm.bias", torch.ones(2)), r"'depth_head.norm.bias' twice"),
        (lambda s: [s.pop(name) for name in list(s) if "proj_lin" in name], r"no proj_lin.weight: it is no checkpoint of Lite3R's authors"),
    ],
)  # fmt: skip
def test_everything_else_is_named(change: Callable[[State], Any], message: str, model: nn.Module, state: State, tmp_path: Path) -> None:
    change(state)
    with pytest.raises(InputError, match=message):
        convert_official(save(tmp_path / "vggt.pt", state), model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_of_another_model_says_which(state: State, tmp_path: Path) -> None:
    from lite3r_plugin.testbed import Testbed, TestbedConfig

    file = save(tmp_path / "vggt.pt", state)
    with pytest.raises(InputError, match=r"does not fit a Testbed: \d+ missing.*\d+ that no such model has.*it is of 'vggt'"):
        convert_official(file, Testbed(TestbedConfig(dim=64, depth=1)), tmp_path / "out")
    with pytest.raises(UnknownModelError):
        convert_official(file, nn.Linear(2, 2), tmp_path / "out")


class _Evil:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return os.mkdir, (self.path,)


def test_files_that_are_none(model: nn.Module, state: State, tmp_path: Path) -> None:
    evil = tmp_path / "evil.pt"
    torch.save({"model": state, "extra": _Evil(str(tmp_path / "harm"))}, evil)
    (tmp_path / "cut.pt").write_bytes(b"PK")
    (tmp_path / "text.txt").write_text("x")
    torch.save({"model": [1]}, tmp_path / "list.pt")
    for name, message in (
        ("evil.pt", "cannot be read"), ("cut.pt", "cannot be read"), ("none.pt", "there is no file"),
        ("text.txt", "checkpoints are .pt"), ("list.pt", "no state dict"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            convert_official(tmp_path / name, model, tmp_path / "out")
    assert not (tmp_path / "harm").exists()


def test_arguments(model: nn.Module, state: State, tmp_path: Path) -> None:
    file = save(tmp_path / "vggt.pt", state)
    (tmp_path / "taken").write_text("x")
    for arguments, options, error, message in (
        ((file, model, tmp_path / "taken"), {}, CheckpointError, "is a file"),
        ((file, 3, tmp_path / "out"), {}, ModelTypeError, "a name that `lite3r adapters` lists"),
        ((file, "no-such", tmp_path / "out"), {}, InputError, "no installed adapter can build 'no-such'"),
        ((3, model, tmp_path / "out"), {}, InputError, "file is a path, got 3"),
        ((file, model, tmp_path / "out"), {"base": 3}, InputError, "base is a path, got 3"),
        ((file, model, tmp_path / "out"), {"base": "none.pt"}, InputError, "no weights file none.pt"),
        ((file, model, tmp_path / "out"), {"keep": 1}, ConfigError, "unknown configuration field"),
        ((file, model, tmp_path / "out"), {"scopes": ("global",)}, ConfigError, "leave scopes and linear_branch"),
        ((file, model, tmp_path / "out"), {"linear_branch": "none"}, ConfigError, "leave scopes and linear_branch"),
        ((file, apply_lite3r(vggt()), tmp_path / "out"), {}, AlreadyAppliedError, "pass the dense model"),
    ):
        with pytest.raises(error, match=message):
            convert_official(*arguments, **options)
    assert not (tmp_path / "out").exists()


# Depth Anything 3


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """The real model in full size, without memory; its constructor reads numbers off `torch.linspace`."""
    pytest.importorskip("depth_anything_3")
    from depth_anything_3.cfg import create_object, load_config
    from depth_anything_3.registry import MODEL_REGISTRY

    linspace = torch.linspace
    with monkeypatch.context() as patch:
        patch.setattr(torch, "linspace", lambda *args, **kwargs: linspace(*args, **{**kwargs, "device": "cpu"}))
        with torch.device("meta"):
            return create_object(load_config(MODEL_REGISTRY["da3-large"])).eval()


def numbers(model: nn.Module) -> State:
    """A state dict of the right shapes in a few bytes: each tensor is one number, repeated."""
    state = official_state(model)
    return {name: torch.full((1,) * tensor.dim(), 0.25 + i % 7).expand(tensor.shape) for i, (name, tensor) in enumerate(state.items())}


@pytest.mark.slow
@pytest.mark.filterwarnings(r"ignore:register_new_resolver\(\) is deprecated:UserWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
def test_depth_anything_3_in_full_size(large: nn.Module, tmp_path: Path) -> None:
    state = numbers(large)
    assert (len(state), len(patterns(state))) == (699, 149)
    assert patterns(state) == listed(DA3_NAMES)
    base = {f"model.{name}": state[name] for name in large.state_dict()}
    torch.save({name.removeprefix("model."): tensor for name, tensor in base.items()}, tmp_path / "base.pt")
    done = convert_official(save(tmp_path / "da3.pt", state), large, tmp_path / "out", base=str(tmp_path / "base.pt"))
    assert done.branches == {(64, 64): 28}
    assert (done.weights, done.dropped) == (699 - 56, {"lam, which nothing reads": 28})
    assert "cam_enc ran neither" in str(done)
    assert "ImageNet's normalisation" in str(done)
    assert set(done.config.scopes) == {"global", "frame", "camera"}
    record = json.loads((tmp_path / "out" / "lite3r_config.json").read_text())
    assert len(record["sites"]) == 28
    loaded = lite3r_modules(load_lite3r(large, tmp_path / "out"))
    assert len(loaded) == 28
    for name, module in loaded.items():
        assert torch.equal(module.proj_lin.weight, state[f"{name}.proj_lin.weight"])


@pytest.mark.filterwarnings(r"ignore:register_new_resolver\(\) is deprecated:UserWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
def test_a_vggt_is_no_depth_anything_3(large: nn.Module, state: State, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"does not fit a DepthAnything3Net: .*By its names it is of 'vggt'"):
        convert_official(save(tmp_path / "vggt.pt", state), large, tmp_path / "out")


def test_sites_have_every_attention(model: nn.Module) -> None:
    assert sorted(site.fqn for site in find_sites(model)[1]) == sorted(attention_names(model))
