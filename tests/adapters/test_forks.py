"""Forks of every built-in family that differ in one line: exact at keep_ratio=1, or left to the host; none is silently wrong."""

from __future__ import annotations

import copy
import functools
import inspect
import re
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import fast3r_hosts
import hosts
import mapanything_hosts
import pytest
import torch
from properties import enlarge_layer_scales, outputs
from real_models import small_fast3r, small_mapanything, small_pi3, small_vggt
from torch import Tensor, nn

from lite3r_adapters.fast3r import model as fast3r
from lite3r_adapters.mapanything import model as mapanything
from lite3r_plugin import apply_lite3r, describe
from lite3r_plugin.adapter.plugins import find_sites
from lite3r_plugin.fp8 import convert
from lite3r_plugin.fp8.block import Fp8Block
from lite3r_plugin.testbed import Testbed, TestbedConfig
from lite3r_plugin.testing import TEST_CONFIG, largest_difference

pytestmark = [
    pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda':UserWarning"),
    pytest.mark.filterwarnings(r"ignore:`torch.cuda.amp.autocast\(args...\)` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:In CPU autocast, but the target dtype is not supported:UserWarning"),
    pytest.mark.filterwarnings("ignore:CUDA is not available or torch_xla is imported:UserWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning"),
]


def _da3() -> nn.Module:
    module = pytest.importorskip("depth_anything_3.model.dinov2.vision_transformer")
    starts = dict(alt_start=2, qknorm_start=2, rope_start=2)
    sizes = dict(img_size=56, patch_size=14, embed_dim=64, depth=4, num_heads=2, mlp_ratio=2, block_chunks=0)
    return module.DinoVisionTransformer(**sizes, **starts)


def _timm() -> nn.Module:
    timm = pytest.importorskip("timm")
    return timm.create_model("vit_tiny_patch16_224", img_size=48, embed_dim=64, num_heads=2, depth=2, num_classes=0, qk_norm=True)


def _transformers() -> nn.Module:
    hf = pytest.importorskip("transformers")
    sizes = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, patch_size=14, image_size=56)
    return hf.Dinov2Model(hf.Dinov2Config(**sizes))


def _fast3r_decoder(model: Any, images: Tensor) -> Any:
    """Its layers, without the heads, in which little is seen of a change."""
    torch.manual_seed(0)  # it draws the order of views
    features, positions, _ = model._encode_images(*fast3r.arguments(images))
    return model.decoder(features, positions, None)


class Family:
    """A family of models, small.

    Args:
        build: Makes one.
        block: Name of the block that is changed.
        images: Shape of its input.
        attention: Child of the block.
        rope: Name of its rotary embedding, the method of that which rotates, and what is replaced in it by what.
        run: Runs it.
    """

    def __init__(
        self, build: Callable[[], nn.Module], block: str, images: tuple[int, ...], *, attention: str = "attn",
        rope: tuple[str, str, str, str] | None = None, run: Callable[[Any, Tensor], Any] = lambda m, x: m(x),
    ) -> None:  # fmt: skip
        self.build, self.block, self.attention, self.rope = build, block, attention, rope
        self.run = functools.partial(self._run, run, images)

    @staticmethod
    def _run(run: Callable[[Any, Tensor], Any], shape: tuple[int, ...], model: nn.Module) -> Any:
        return run(model, torch.rand(shape, generator=torch.Generator().manual_seed(0)))


VIEWS = (1, 2, 3, 28, 42)
TURNED = ("torch.cat((-x2, x1), dim=-1)", "torch.cat((x2, -x1), dim=-1)")
HALF = ("real * angle.cos() - imaginary", "real * angle.cos() + imaginary")
FAMILIES = {
    "testbed": Family(
        lambda: Testbed(TestbedConfig(dim=64, head_dim=32, depth=2, stem=16)), "aggregator.global_blocks.1", (1, 2, 3, 32, 40),
        rope=("aggregator.global_blocks.0.attn.rope", "forward", "a * cos - b * sin", "a * cos + b * sin"),
    ),
    "vggt double": Family(
        lambda: hosts.VGGT(encoder=False), "aggregator.global_blocks.1", VIEWS, rope=("aggregator.rope", "forward", *HALF)
    ),
    "vggt": Family(
        lambda: small_vggt().aggregator, "global_blocks.1", VIEWS, rope=("rope", "_rotate_features", *TURNED), run=lambda m, x: m(x)[0]
    ),
    "pi3 double": Family(hosts.Pi3, "decoder.1", VIEWS, rope=("rope", "forward", *HALF)),
    "pi3": Family(small_pi3, "decoder.1", VIEWS, rope=("rope", "rotate_half", *TURNED)),
    "depth_anything_3": Family(
        _da3, "blocks.3", VIEWS, rope=("rope", "_rotate_features", *TURNED), run=lambda m, x: m.get_intermediate_layers(x, n=[1, 3])
    ),
    "mapanything double": Family(
        mapanything_hosts.make, "info_sharing.self_attention_blocks.2", VIEWS, run=lambda m, x: m(*mapanything.arguments(x))
    ),
    "mapanything": Family(
        small_mapanything, "info_sharing.self_attention_blocks.2", VIEWS, run=lambda m, x: m(*mapanything.arguments(x))
    ),
    "fast3r double": Family(
        fast3r_hosts.make, "decoder.dec_blocks.1", (1, 2, 3, 32, 48), rope=("encoder.rope", "forward", *HALF),
        run=lambda m, x: m(*fast3r.arguments(x)),
    ),
    "fast3r": Family(
        small_fast3r, "decoder.dec_blocks.0", (1, 2, 3, 32, 48), rope=("encoder.rope", "rotate_half", *TURNED), run=_fast3r_decoder
    ),
    "timm": Family(_timm, "blocks.1", (1, 3, 48, 48)),
    "transformers": Family(_transformers, "encoder.layer.1", (1, 3, 42, 56), attention="attention"),
}  # fmt: skip

# A line in front of attention; `{q}`, `{k}` and `{v}` are its arguments.
IN_FRONT = {
    "scale": "{q} = {q} * 1.5",
    "swapped q and k": "{q}, {k} = {k}, {q}.roll(1, -2)",
    "gate": "{v} = {v} * {v}.mean(-1, keepdim=True).sigmoid()",
    "norm after rotation": "{q} = {q} / {q}.norm(dim=-1, keepdim=True)",
}
BIAS = {"missing bias": (r"self\.(qkv|q_proj|query)\((\w+)\)", r"(self.\1(\2) - self.\1.bias - 1)")}
MLP = r"self\.mlp\((self\.norm2\(x\)|hidden_states|layer_output)\)"
BLOCKS = {
    "residual gain": (MLP, r"self.mlp(\1) * 0.5"),
    "norm order": (MLP, r"self.norm2(self.mlp(\1))"),
    "wrong norm": (r"self\.norm1\((x|hidden_states)\)", r"self.norm2(\1)"),
    "absolute value": (MLP, r"self.mlp(\1).abs()"),
}


def fork(module: nn.Module, method: str, edit: Callable[[str], str]) -> None:
    """Let this instance be of a class with one line changed."""
    kind = type(module)
    source = textwrap.dedent(inspect.getsource(getattr(kind, method)))
    changed = edit(source)
    assert changed != source
    names = dict(vars(sys.modules[kind.__module__]))
    exec(compile(f"from __future__ import annotations\n{changed}", f"<fork of {kind.__name__}>", "exec"), names)
    module.__class__ = type(kind.__name__, (kind,), {method: names[method]})


def line_in_front(line: str, source: str) -> str:
    """`source` with a line in front of its calls of attention."""
    long = re.search(r"query(_\w+) = ", source)
    words = {word[0]: f"{word}{long[1]}" if long else word[0] for word in ("query", "key", "value")}
    call = re.compile(r"^( *)(?=.*(scaled_dot_product_attention|attention_interface)\()", re.MULTILINE)
    return call.sub(lambda found: f"{found[1]}{line.format(**words)}\n{found[1]}", source)


def cases() -> list[Any]:
    attention = [*IN_FRONT, *BIAS]
    return [
        pytest.param(family, what, id=f"{name}-{what}", marks=[pytest.mark.slow] * (number > 0 and what in [*attention[1:], *BLOCKS]))
        for number, (name, family) in enumerate(FAMILIES.items())
        for what in (*attention, *(["rotary pairing"] if family.rope else []), *BLOCKS)
    ]


def build(family: Family, what: str) -> nn.Module:
    torch.manual_seed(0)
    model = family.build().eval()
    enlarge_layer_scales(model, 1.0)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
        elif isinstance(module, nn.LayerNorm) and module.weight is not None:
            nn.init.uniform_(module.weight, 0.5, 1.5)
    stock = outputs(model, family.run)
    block = model.get_submodule(family.block)
    attention: Any = block.get_submodule(family.attention)
    attention = getattr(attention, "attention", attention)  # an earlier transformers has one around the other
    forward = "attend" if hasattr(attention, "attend") else "forward"
    if what in IN_FRONT:
        fork(attention, forward, functools.partial(line_in_front, IN_FRONT[what]))
    elif what in BIAS:
        if getattr(getattr(attention, "qkv", None), "bias", 0) is None:
            pytest.skip("has no bias")
        fork(attention, forward, functools.partial(re.sub, *BIAS[what]))
    elif what in BLOCKS:
        fork(block, "forward", functools.partial(re.sub, *BLOCKS[what]))
    else:
        assert family.rope is not None
        rope, method, old, new = family.rope
        fork(model.get_submodule(rope), method, lambda source: source.replace(old, new))
    assert largest_difference(stock, outputs(model, family.run))[0] > 1e-3, "the fork does what the original does"
    return model


@pytest.mark.parametrize(("family", "what"), cases())
def test_a_fork_is_exact_or_left_to_the_host(family: Family, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(family, what)
    expected = outputs(model, family.run)
    student = apply_lite3r(copy.deepcopy(model), TEST_CONFIG, keep_ratio=1.0)
    error, where = largest_difference(expected, outputs(student, family.run))
    assert error <= 1e-5, where
    report = describe(student)
    changed = f"{family.block}.{family.attention}"
    described = any(site.fqn == changed and type(site.projections).__name__ != "Routed" for site in find_sites(model)[1])
    if what not in BLOCKS and described:
        assert changed in report.routed
        assert "with q, k and v of the host's own code: it differs from the host's own forward by" in str(report)
    else:
        assert not report.routed

    fused = apply_lite3r(copy.deepcopy(model), TEST_CONFIG, keep_ratio=1.0, precision="fp8", fp8_filter=("*",))
    has_blocks = any(isinstance(module, Fp8Block) for module in fused.modules())
    assert has_blocks == any(site.block is not None for site in find_sites(model)[1])
    if has_blocks and what in BLOCKS:
        assert not isinstance(fused.get_submodule(family.block), Fp8Block)
        assert "1 block runs its own forward on FP8 Linears: it differs from the block's own forward" in str(describe(fused))
    monkeypatch.setattr(convert, "why_not_fused", lambda *_: "for comparison")
    single = apply_lite3r(copy.deepcopy(model), TEST_CONFIG, keep_ratio=1.0, precision="fp8", fp8_filter=("*",))
    error, where = largest_difference(outputs(single, family.run), outputs(fused, family.run))
    assert error <= 5e-3, where


@pytest.mark.parametrize("name", FAMILIES)
def test_the_original_is_fused(name: str) -> None:
    family = FAMILIES[name]
    model = family.build().eval()
    described = {site.fqn for site in find_sites(model)[1] if type(site.projections).__name__ != "Routed"}
    blocks = {site.block.fqn for site in find_sites(model)[1] if site.block is not None and site.scope != "camera"}
    student = apply_lite3r(model, TEST_CONFIG, precision="fp8", fp8_filter=("*",))
    assert not describe(student).routed
    assert {fqn for fqn, m in student.named_modules() if isinstance(m, Fp8Block)} == blocks
    assert bool(described) == (name not in ("timm", "transformers"))
