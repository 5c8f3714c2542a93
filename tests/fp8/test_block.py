"""Fused blocks against the host's own forward on the same FP8 Linears."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from numerics import relative_error
from pre_norm_blocks import DIM, Block
from torch import Tensor, nn
from toys import PATCH, SPECIAL, Adapter, toy_adapter

from lite3r_plugin import AttentionSite, FusedQKV, PreNormBlock, TokenSource, apply_lite3r, convert, describe
from lite3r_plugin.apply.lookup import lite3r_modules
from lite3r_plugin.fp8.block import Fp8Block
from lite3r_plugin.fp8.linear import Fp8Linear
from lite3r_plugin.ops.fp8 import naive
from lite3r_plugin.wrapper import was_exchanged

__all__ = ["toy_adapter"]  # the fixture
SPARSE = dict(keep_ratio=0.3, dense_below=0, block_q=16, block_k=16)


class Model(nn.Module):
    def __init__(self, kind: str = "gelu", scaled: bool = True, make: type[Block] = Block) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, DIM, PATCH, PATCH)
        self.special = nn.Parameter(torch.randn(SPECIAL, DIM))
        self.blocks = nn.ModuleList(make(kind, scaled) for _ in range(2))
        self.kind, self.scaled = kind, scaled

    def forward(self, images: Tensor, **options: Any) -> Tensor:
        x = self.embed(images).flatten(2).transpose(1, 2)
        x = torch.cat((self.special.expand(len(x), -1, -1), x), 1)
        for block in self.blocks:
            x = block(x, **options)
        return x


def sites(model: nn.Module) -> list[AttentionSite] | None:
    if not isinstance(model, Model):
        return None
    up, down = ("mlp.w12", "mlp.w3") if model.kind == "swiglu" else ("mlp.0", "mlp.2")
    gains: dict[str, Any] = dict(gain1="ls1.gamma", gain2="ls2.gamma") if model.scaled else {}
    tokens = TokenSource("embed", (PATCH, PATCH), SPECIAL)
    blocks = [PreNormBlock(f"blocks.{i}", up, down, model.kind, **gains) for i in range(2)]  # pyright: ignore[reportArgumentType]
    return [AttentionSite(f"{b.fqn}.attn", "frame", DIM // 2, FusedQKV(2, attn_drop="attn_drop"), tokens, b) for b in blocks]


@pytest.fixture(autouse=True)
def _adapter(adapter: Adapter) -> None:
    adapter.answer = sites


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the passes that ran."""
    seen: list[str] = []

    def counted(name: str) -> Any:
        real = getattr(naive, name)
        return lambda *args, **kwargs: (seen.append(name), real(*args, **kwargs))[1]

    for name in ("quantize", "layer_norm_quantize", "residual_norm_quantize", "gelu_quantize", "swiglu_quantize", "heads_quantize"):
        monkeypatch.setattr(naive, name, counted(name))
    return seen


def images() -> Tensor:
    return torch.rand(2, 3, 32, 40, generator=torch.Generator().manual_seed(1))


def host_forward(model: nn.Module, x: Tensor) -> Tensor:
    """`model` on the same FP8 Linears, its blocks unfused."""
    for block in model.modules():
        if isinstance(block, Fp8Block):
            block.forward = block.run_host  # pyright: ignore[reportAttributeAccessIssue]
    try:
        return model(x)
    finally:
        for block in model.modules():
            if isinstance(block, Fp8Block):
                del block.__dict__["forward"]


@pytest.mark.parametrize("kind", ["gelu", "gelu_tanh", "swiglu"])
@pytest.mark.parametrize("scaled", [True, False])
@torch.no_grad()
def test_equals_the_host(kind: str, scaled: bool, calls: list[str]) -> None:
    model = apply_lite3r(Model(kind, scaled).eval(), **SPARSE, precision="fp8")
    assert sum(isinstance(m, Fp8Block) for m in model.modules()) == 2
    calls.clear()
    fused = model(images())
    activation = "swiglu_quantize" if kind == "swiglu" else "gelu_quantize"
    named = [call for call in calls if call != "quantize"]  # which the others call
    assert named == ["layer_norm_quantize", "heads_quantize", "residual_norm_quantize", *(["layer_norm_quantize"] * 1), activation] * 2
    assert calls.count("quantize") == 8
    assert relative_error(fused, host_forward(model, images())) < 5e-3
    for dtype in (torch.bfloat16, torch.float16):
        assert model.to(dtype)(images().to(dtype)).dtype == dtype


@torch.no_grad()
def test_autocast_keeps_the_dtypes_of_the_host() -> None:
    model = apply_lite3r(Model().eval(), **SPARSE, precision="fp8")
    with torch.autocast("cpu", torch.bfloat16):
        fused, host = model(images()), host_forward(model, images())
    assert fused.dtype == host.dtype
    assert relative_error(fused, host) < 2e-2


def test_gradients_training_and_other_arguments_run_the_host(calls: list[str]) -> None:
    model = apply_lite3r(Model().eval(), **SPARSE, precision="fp8")
    x = images().requires_grad_()
    model(x).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    assert "residual_norm_quantize" not in calls
    with torch.no_grad():
        model.train()(images())
        assert "residual_norm_quantize" not in calls
        model.eval()(images(), mask=None)
        assert "residual_norm_quantize" in calls


@torch.no_grad()
def test_an_argument_that_only_the_block_knows(calls: list[str]) -> None:
    class Flagged(Block):
        def forward(self, x: Tensor, flag: str | None = None) -> Tensor:
            return super().forward(x) if flag is None else x

    model = apply_lite3r(Model(make=Flagged).eval(), **SPARSE, precision="fp8")
    calls.clear()
    x = model(images(), flag="skip")
    assert not calls
    assert not torch.equal(model(images()), x)


@torch.no_grad()
@pytest.mark.parametrize("what", ["norm", "linear"])
def test_blocks_that_cannot_be_fused_run_as_they_are(what: str) -> None:
    model = Model().eval()
    for block in model.blocks:
        if what == "norm":
            block.norm2 = nn.RMSNorm(DIM)
        else:
            block.mlp[0] = nn.modules.linear.NonDynamicallyQuantizableLinear(DIM, 64)
    apply_lite3r(model, **SPARSE, precision="fp8")
    assert not any(isinstance(m, Fp8Block) for m in model.modules())
    assert any(isinstance(m, Fp8Linear) for m in model.modules())
    assert model(images()).isfinite().all()


class Opaque:
    """Calls a forward, but does not tell with what."""

    __signature__ = 5

    def __init__(self, forward: Any) -> None:
        self.forward = forward

    def __call__(self, *args: Any) -> Any:
        return self.forward(*args)


@torch.no_grad()
def test_a_block_whose_arguments_cannot_be_read_runs_its_own_forward() -> None:
    model = Model().eval()
    model.blocks[1].forward = Opaque(model.blocks[1].forward)
    apply_lite3r(model, **SPARSE, precision="fp8")
    assert [isinstance(block, Fp8Block) for block in model.blocks] == [True, False]
    assert relative_error(model(images()), host_forward(model, images())) < 5e-3


@torch.no_grad()
def test_an_unfused_site_gets_its_input_in_high_precision(calls: list[str]) -> None:
    model = apply_lite3r(Model().eval(), **SPARSE, precision="fp8", fuse=False)
    calls.clear()
    assert relative_error(model(images()), host_forward(model, images())) < 5e-3
    assert calls.count("residual_norm_quantize") == 2


@torch.no_grad()
def test_hooks_and_replaced_modules_are_seen() -> None:
    model = apply_lite3r(Model().eval(), **SPARSE, precision="fp8")
    x = torch.rand(2, 3, 24, 32)
    expected, seen = model(x), []
    block = model.blocks[0]
    for name in ("norm1", "attn", "attn.qkv", "ls1", "mlp", "mlp.0", "mlp.1"):
        handle = block.get_submodule(name).register_forward_hook(lambda module, args, out, name=name: seen.append((name, type(args[0]))))
        torch.testing.assert_close(model(x), expected, rtol=0.1, atol=0.1)
        assert seen.pop() == (name, torch.Tensor)
        handle.remove()
    assert torch.equal(model(x), expected)
    others = {"mlp.1": nn.ReLU(), "mlp.0": nn.Linear(DIM, 64), "attn.qkv": nn.Linear(DIM, 3 * DIM), "norm2": nn.Identity()}
    for name, other in others.items():
        before = block.get_submodule(name)
        block.set_submodule(name, other)
        changed = model(x)
        assert not torch.equal(changed, expected)
        with torch.enable_grad():
            torch.testing.assert_close(model(x), changed, rtol=0.1, atol=0.1)
        block.set_submodule(name, before)


@torch.no_grad()
def test_modules_with_a_forward_of_their_own_are_called() -> None:
    """As those are whose weights come for a call alone."""
    model = apply_lite3r(Model().eval(), **SPARSE, precision="fp8")
    x = torch.rand(2, 3, 24, 32)
    expected, seen = model(x), []
    for name in ("norm1", "norm2", "ls1", "mlp.0", "attn.qkv", "attn.proj"):
        module = model.blocks[0].get_submodule(name)
        forward = module.forward
        module.forward = lambda x, name=name, forward=forward: seen.append((name, type(x))) or forward(x)
        torch.testing.assert_close(model(x), expected, rtol=0.1, atol=0.1)
        assert seen.pop() == (name, torch.Tensor)
        del module.forward
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("learns", ["norm1.weight", "attn.proj_lin.weight", "ls1.gamma", "attn.proj.bias", "mlp.0.bias"])
def test_gradients_of_one_parameter_alone(learns: str) -> None:
    """Whether or not the input of the block has one; the fused passes have none."""
    model = apply_lite3r(Model().eval(), **SPARSE, precision="fp8").requires_grad_(False)
    for site in lite3r_modules(model).values():
        nn.init.normal_(site.proj_lin.weight)
    parameter = model.blocks[0].get_parameter(learns).requires_grad_()
    x, grads = torch.rand(2, 3, 24, 32), []
    for training in (False, True):
        model.train(training)(x).square().mean().backward()
        grads.append(parameter.grad)
        parameter.grad = None
    assert grads[0].abs().sum() > 0
    torch.testing.assert_close(grads[0], grads[1])


@torch.no_grad()
@pytest.mark.parametrize("precision", ["fp8", "fp8_qat"])
def test_a_forward_that_somebody_put_in_runs(precision: Any) -> None:
    """As LoRA of some trainers, or tools that scale or skip blocks, do; of a class nothing is seen of it."""

    def patched() -> Model:
        torch.manual_seed(0)
        model = Model().eval()
        block, linear = model.blocks[0], model.blocks[1].mlp[0]
        own, of_linear = block.forward, linear.forward
        vars(block)["forward"] = lambda x, **options: x + 0.5 * (own(x, **options) - x)
        vars(linear)["forward"] = lambda x: of_linear(x) + x.repeat(1, 1, 2)
        return model

    expected = patched()(images())
    model = apply_lite3r(patched(), keep_ratio=1.0, precision=precision, fp8_filter=("*",))
    assert relative_error(model(images()), expected) < 0.1
    said = str(describe(model))
    assert "1 Linear left as it is: with a forward that somebody else has exchanged" in said
    if precision == "fp8":
        assert "1 block runs its own forward on FP8 Linears: its forward was exchanged by somebody else" in said


@torch.no_grad()
def test_an_argument_that_is_on_by_default(calls: list[str]) -> None:
    class Switched(Block):
        def forward(self, x: Tensor, whole: bool = True) -> Tensor:
            return super().forward(x) if whole else x

    model = apply_lite3r(Model(make=Switched).eval(), **SPARSE, precision="fp8")
    calls.clear()
    x = model(images(), whole=False)
    assert not calls
    assert not torch.equal(model(images(), whole=True), x)
    assert calls


@torch.no_grad()
def test_a_forward_that_was_put_back_is_the_models_own() -> None:
    """As accelerate leaves it where its hooks were, and whoever takes his own out again."""
    model = Model().eval()
    for part in (model.blocks[0], model.blocks[0].mlp[0]):
        vars(part)["forward"] = part.forward
    add_hook_to_module(model.blocks[1], ModelHook())
    remove_hook_from_module(model.blocks[1])
    add_hook_to_module(model.blocks[1].mlp[2], ModelHook())  # and where they are
    said = str(describe(apply_lite3r(model, keep_ratio=1.0, precision="fp8", fp8_filter=("*",))))
    assert "exchanged" not in said
    assert "Linears: 8 in FP8" in said
    assert all(isinstance(block, Fp8Block) for block in model.blocks)


@pytest.mark.parametrize("hooked_first", [True, False])
def test_a_forward_with_a_hook_of_accelerate_around_it_or_inside_runs(hooked_first: bool) -> None:
    linear = nn.Linear(8, 8)
    if hooked_first:
        add_hook_to_module(linear, ModelHook())
    own = linear.forward
    vars(linear)["forward"] = lambda x: own(x) + 1
    if not hooked_first:
        add_hook_to_module(linear, ModelHook())
    assert was_exchanged(linear)


def test_a_forward_that_was_put_into_what_stands_in_for_a_linear_runs() -> None:
    model = apply_lite3r(Model().eval(), keep_ratio=1.0, precision="fp8_qat", fp8_filter=("*",))
    rounding = model.blocks[0].mlp[0]
    own = rounding.forward
    vars(rounding)["forward"] = lambda x: own(x) + 1
    convert(model)
    assert model.blocks[0].mlp[0] is rounding
    assert "1 Linear left as it is: with a forward that somebody else has exchanged" in str(describe(model))
