"""Converted models: what their Linears compute, what they hold, what they refuse."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from numerics import relative_error
from torch import nn
from torch.nn.utils import prune
from toys import Adapter, Attention, Separate, Toy, images, toy_adapter

from lite3r_plugin import apply_lite3r, convert, describe, lite3r_disabled, remove_lite3r
from lite3r_plugin.apply.lookup import block_linears, lite3r_modules
from lite3r_plugin.errors import BackendError, ConfigError, ConvertedError, NoSitesError, NotAppliedError, WeightsError
from lite3r_plugin.fp8.linear import Fp8Linear
from lite3r_plugin.ops.fp8 import E4M3, dequantize, fake_quantize, naive, quantize

__all__ = ["toy_adapter"]  # the fixture
SPARSE = dict(keep_ratio=0.3, dense_below=0, block_q=16, block_k=16)


def converted(inputs: int = 24, outputs: int = 10, bias: bool = True, dtype: torch.dtype = torch.float32) -> tuple[nn.Linear, Fp8Linear]:
    linear = nn.Linear(inputs, outputs, bias=bias, dtype=dtype)
    return linear, Fp8Linear.quantized(linear, "emulated")


class TestLinear:
    def test_what_was_made_on_the_meta_device_holds_nothing_until_it_is_loaded(self) -> None:
        made = Fp8Linear(24, 10, nn.Parameter(torch.empty(10, device="meta")), "emulated", torch.float32, torch.device("meta"))
        made.to_empty(device="cpu")
        made.infinities.fill_(7)
        made.reset_parameters()
        assert not made(torch.randn(3, 24)).any()
        assert not made.infinities.any()
        _, other = converted()
        made.load_state_dict(other.state_dict())
        x = torch.randn(3, 24)
        assert torch.equal(made(x), other(x))

    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("shape", [(24,), (7, 24), (2, 3, 24)], ids=str)
    def test_is_the_definition(self, shape: tuple[int, ...], bias: bool) -> None:
        linear, fp8 = converted(bias=bias)
        x = torch.randn(shape)
        expected = naive.linear(quantize(x), quantize(linear.weight.detach()), linear.bias)
        assert torch.equal(fp8(x), expected)
        assert torch.equal(fp8(quantize(x)), expected)
        assert relative_error(fp8(x), linear(x)) < 0.06

    def test_of_heads(self) -> None:
        _, fp8 = converted()
        x = torch.randn(2, 3, 5, 8)
        assert torch.equal(fp8.of_heads(x), fp8(x.transpose(1, 2).flatten(2)))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_dtypes(self, dtype: torch.dtype) -> None:
        linear, fp8 = converted(dtype=dtype)
        x = torch.randn(4, 24, dtype=dtype)
        assert fp8(x).dtype == fp8(quantize(x)).dtype == dtype
        assert relative_error(fp8(x), linear(x)) < 0.06

    def test_autocast(self) -> None:
        _, fp8 = converted()
        x = torch.randn(4, 24)
        with torch.autocast("cpu", torch.bfloat16):
            assert fp8(x).dtype == fp8(quantize(x)).dtype == torch.bfloat16
            torch.testing.assert_close(fp8(x).float(), fp8(x).float())

    @pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (17, 3), (45, 33)])
    def test_sizes_that_are_no_multiples_of_16(self, inputs: int, outputs: int) -> None:
        linear, fp8 = converted(inputs, outputs)
        x = torch.randn(5, inputs)
        torch.testing.assert_close(fp8(x), F.linear(fake_quantize(x), fake_quantize(linear.weight), linear.bias))

    @pytest.mark.parametrize("shape", [(0, 24), (3, 0, 24)], ids=str)
    def test_empty_batches(self, shape: tuple[int, ...]) -> None:
        assert converted()[1](torch.empty(shape)).shape == (*shape[:-1], 10)

    def test_infinity_saturates_and_nan_stays(self) -> None:
        _, fp8 = converted()
        x = torch.randn(4, 24)
        x[1, 3], x[2, 5], x[3, 0] = math.inf, -math.inf, math.nan
        y = fp8(x)
        assert y[:3].isfinite().all()
        assert y[3].isnan().all()
        assert fp8.infinities.item() == 2
        assert torch.equal(y[0], fp8(x[:1])[0])

    def test_gradients_pass_through(self) -> None:
        _, fp8 = converted()
        x, grad = torch.randn(4, 24, requires_grad=True), torch.randn(4, 10)
        y = fp8(x)
        y.backward(grad)
        torch.testing.assert_close(x.grad, grad @ fp8.weight)
        torch.testing.assert_close(y.detach(), fp8(x.detach()))
        assert not any(p.requires_grad for p in fp8.parameters())
        x = torch.randn(2, 3, 5, 8, requires_grad=True)
        fp8.of_heads(x).sum().backward()
        assert x.grad is not None

    def test_moving_keeps_fp8(self) -> None:
        linear, fp8 = converted()
        codes = fp8.weight_data.clone()
        for move in (nn.Module.bfloat16, nn.Module.half, nn.Module.double, lambda m: m.to("cpu", torch.float32)):
            move(fp8)
            assert (fp8.weight_data.dtype, fp8.weight_scale.dtype) == (E4M3, torch.float32)
            assert fp8.bias.dtype == fp8.weight.dtype
        assert torch.equal(fp8.weight_data.view(torch.uint8), codes.view(torch.uint8))
        assert torch.equal(fp8.weight, dequantize(quantize(linear.weight.detach())))
        assert fp8.to("meta").weight_data.is_meta

    def test_copies(self) -> None:
        _, fp8 = converted()
        x = torch.randn(3, 24)
        for other in (copy.deepcopy(fp8), pickle.loads(pickle.dumps(fp8))):
            assert torch.equal(other(x), fp8(x))
            assert other.weight_data.dtype == E4M3
            other.weight_scale.zero_()
            assert not torch.equal(other(x), fp8(x))

    def test_original_weights_are_not_taken_for_fp8(self) -> None:
        linear, fp8 = converted()
        with pytest.raises(ConvertedError, match="is a weight of the original model"):
            fp8.load_state_dict(linear.state_dict())
        fp8.load_state_dict(converted()[1].state_dict())

    def test_half_the_bytes_of_bf16(self) -> None:
        _, fp8 = converted(1024, 1024)
        assert fp8.weight_data.nbytes + fp8.weight_scale.nbytes <= 0.52 * 2 * 1024 * 1024
        assert sum(t.nbytes for t in (*fp8.parameters(), *fp8.buffers())) <= 0.52 * 2 * 1024 * 1024


@pytest.mark.usefixtures("adapter")
class TestModel:
    def test_precision_fp8_is_apply_and_convert(self) -> None:
        model = Toy().eval()
        other = convert(apply_lite3r(copy.deepcopy(model), **SPARSE))
        apply_lite3r(model, **SPARSE, precision="fp8")
        assert torch.equal(model(images()), other(images()))
        assert describe(model).config == describe(other).config
        assert describe(model).linears == {"in FP8 (emulated)": 8}
        assert type(model.head) is nn.Linear
        assert {m.backend for m in block_linears(model)} == {"emulated"}

    @pytest.mark.parametrize("make", [Attention, Separate, lambda d, h: Attention(d, h, "routed")])
    def test_equals_its_training(self, make) -> None:
        model = Toy(make=make).eval()
        dense = model(images())
        apply_lite3r(model, **SPARSE, precision="fp8_qat")
        for site in lite3r_modules(model).values():
            if site.sparse:
                nn.init.normal_(site.proj_lin.weight, std=0.3)
        trained = model(images())
        convert(model)
        assert relative_error(model(images()), trained) < 1e-2 < relative_error(dense, trained)
        assert describe(model).config.precision == "fp8"

    def test_the_projection_keeps_its_rounded_weight(self) -> None:
        model = apply_lite3r(Toy(), **SPARSE, precision="fp8_qat")
        site = next(site for site in lite3r_modules(model).values() if site.sparse)
        nn.init.normal_(site.proj_lin.weight)
        rounded = fake_quantize(site.proj_lin.weight.detach())
        assert not torch.equal(site.proj_lin.weight, rounded)
        convert(model)
        assert torch.equal(site.proj_lin.weight, rounded)

    def test_there_is_no_way_back(self) -> None:
        model = apply_lite3r(Toy(), **SPARSE, precision="fp8")
        with pytest.raises(ConvertedError, match="remove_lite3r needs the weights"):
            remove_lite3r(model)
        with pytest.raises(ConvertedError, match="lite3r_disabled needs the weights"), lite3r_disabled(model):
            pass

    @pytest.mark.parametrize("qat", [True, False])
    def test_an_impossible_backend_leaves_the_model_as_it_was(self, qat: bool) -> None:
        model = Toy().eval()
        dense = model(images())
        with pytest.raises(BackendError, match='fp8_backend="scaled_mm" cannot run a Linear 32 -> 96 here: the model is on cpu'):
            apply_lite3r(model, precision="fp8", fp8_backend="scaled_mm")
        assert torch.equal(model(images()), dense)
        assert not lite3r_modules(model)
        apply_lite3r(model, **SPARSE, precision="fp8_qat" if qat else "full")
        before = model(images())
        with pytest.raises(BackendError):
            convert(model, fp8_backend="weight_only")
        with pytest.raises(ConfigError):
            convert(model, fp8_backend="none")  # pyright: ignore[reportArgumentType]
        assert torch.equal(model(images()), before)
        remove_lite3r(model)
        assert torch.equal(model(images()), dense)

    def test_auto_takes_nothing_that_is_slower(self) -> None:
        model = apply_lite3r(Toy().eval(), **SPARSE)
        before = model(images())
        with pytest.raises(BackendError, match="no Linear of this model is faster in FP8 at 500 tokens here"):
            convert(model, tokens=500)
        assert torch.equal(model(images()), before)
        convert(model, fp8_backend="emulated", tokens=500)  # an explicit wish is fulfilled

    def test_linears_that_stay_are_shown(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("lite3r_plugin.fp8.convert.fp8_pays", lambda device, tokens, inputs, outputs, fused: outputs > 32)
        model = convert(apply_lite3r(Toy(), **SPARSE), tokens=500)
        assert describe(model).linears == {"in full precision": 4, "in FP8 (emulated)": 4}
        assert "4 Linears left as they are: not faster in FP8 at 500 tokens" in str(describe(model))

    def test_a_broken_weight_is_not_hidden(self) -> None:
        model = apply_lite3r(Toy(), **SPARSE)
        with torch.no_grad():
            model.frame[1].proj.weight[3, 4] = math.nan
        with pytest.raises(WeightsError, match=r"frame\.1\.proj\.weight, 32 x 32, has infinities or NaN"):
            convert(model)
        assert not any(isinstance(m, Fp8Linear) for m in model.modules())

    def test_not_applied(self) -> None:
        with pytest.raises(NotAppliedError):
            convert(Toy())

    def test_nothing_to_convert(self, adapter: Adapter) -> None:
        class NoLinear(Attention):
            def __init__(self, dim: int, heads: int) -> None:
                super().__init__(dim, heads, "routed")
                self.qkv = nn.modules.linear.NonDynamicallyQuantizableLinear(dim, 3 * dim)
                self.proj = nn.modules.linear.NonDynamicallyQuantizableLinear(dim, dim)

        with pytest.raises(NoSitesError, match=r"has a torch\.nn\.Linear to convert"):
            convert(apply_lite3r(Toy(make=NoLinear), **SPARSE))

    @torch.no_grad()
    def test_converting_again_chooses_backends_again(self) -> None:
        model = apply_lite3r(Toy().eval(), **SPARSE, precision="fp8")
        before, weights = model(images()), [m.weight_data for m in block_linears(model)]
        for linear in block_linears(model):
            linear.backend = "scaled_mm"  # as if it came from a GPU
        with pytest.raises(BackendError, match=r"convert\(model\) again"):
            model(images())
        convert(model)
        assert torch.equal(model(images()), before)
        assert all(a is m.weight_data for a, m in zip(weights, block_linears(model), strict=True))

    def test_old_weights_are_freed_at_once(self) -> None:
        model = apply_lite3r(Toy(), **SPARSE, precision="fp8_qat")
        linears = block_linears(model)
        convert(model)
        assert all(linear.weight is None for linear in linears)

    def test_infinities_show(self) -> None:
        model = apply_lite3r(Toy().eval(), **SPARSE, precision="fp8")
        with torch.no_grad():
            model.embed.bias[2] = math.inf
        model(images())
        assert describe(model).infinities > 0
        assert f"infinities saturated so far: {describe(model).infinities}" in str(describe(model))

    def test_copies(self) -> None:
        model = apply_lite3r(Toy().eval(), **SPARSE, precision="fp8")
        expected = model(images())
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(images()), expected)

    def test_compiled_equals_eager(self) -> None:
        model = apply_lite3r(Toy().eval(), **SPARSE, precision="fp8")
        expected = model(images())
        torch._dynamo.reset()
        model.compile(backend="aot_eager")
        torch.testing.assert_close(model(images()), expected, rtol=1e-4, atol=1e-4)
        torch._dynamo.reset()


@pytest.mark.usefixtures("adapter")
@pytest.mark.parametrize("precision", ["full", "fp8_qat", "fp8"])
def test_adapters_are_to_be_merged_before(precision: Any) -> None:
    lora = peft.LoraConfig(r=2, target_modules=["qkv"], init_lora_weights=False)
    model = peft.get_peft_model(Toy().eval(), lora)  # pyright: ignore[reportArgumentType]
    if precision != "fp8":
        apply_lite3r(model, **SPARSE, precision=precision)
    before = model(images())
    with pytest.raises(WeightsError, match=r"frame\.0\.qkv is inside of an adapter \(Linear\).* merge_lora.*merge_and_unload"):
        convert(model) if precision != "fp8" else apply_lite3r(model, **SPARSE, precision=precision)
    assert torch.equal(model(images()), before)
    merged = model.merge_and_unload()
    convert(merged) if precision != "fp8" else apply_lite3r(merged, **SPARSE, precision=precision)
    assert describe(merged).linears == {"in FP8 (emulated)": 8}


def test_gradients_of_a_bias_alone() -> None:
    linear, fp8 = converted()
    assert fp8.bias is linear.bias
    fp8.bias.requires_grad_()
    fp8(torch.ones(3, 24)).sum().backward()
    assert torch.equal(fp8.bias.grad, torch.full((10,), 3.0))


@pytest.mark.usefixtures("adapter")
class TestWholes:
    @pytest.mark.parametrize("precision", ["fp8", "fp8_qat"])
    def test_weights_that_are_made_are_refused_before_anything_changes(self, precision: str) -> None:
        model = Toy().eval()
        linear = next(m for m in model.cross[0].modules() if isinstance(m, nn.Linear))
        prune.l1_unstructured(linear, "weight", 0.5)
        expected, keys = model(images()), list(model.state_dict())
        with pytest.raises(WeightsError, match=r"cross\.0\.\w+\.weight is no parameter .*make it permanent first"):
            apply_lite3r(model, **SPARSE, precision=precision)
        assert torch.equal(model(images()), expected)
        assert list(model.state_dict()) == keys
        assert not lite3r_modules(model)

    @pytest.mark.parametrize("precision", ["fp8", "fp8_qat"])
    def test_weights_that_are_stored_in_fp8_already_are_refused(self, precision: str) -> None:
        model = Toy()
        linear = model.cross[1].proj
        linear.weight = nn.Parameter(linear.weight.detach().to(torch.float8_e5m2), requires_grad=False)
        with pytest.raises(
            WeightsError, match=r"^cross\.1\.proj\.weight is stored in torch\.float8_e5m2.* leave the Linear out by fp8_filter"
        ):
            apply_lite3r(model, precision=precision)
        assert not lite3r_modules(model)
        apply_lite3r(model, precision=precision, fp8_filter=("*qkv", "cross.0.proj"))
        assert model.cross[1].proj is linear

    def test_linears_of_another_class_are_named(self) -> None:
        model = Toy().eval()
        linear = next(m for m in model.cross[0].modules() if isinstance(m, nn.Linear))
        torch.nn.utils.parametrizations.weight_norm(linear)
        notes = describe(apply_lite3r(model, **SPARSE, precision="fp8")).notes
        assert notes == ("1 Linear left as it is: of class ParametrizedLinear",)

    def test_a_part_is_refused(self) -> None:
        model = apply_lite3r(Toy().eval(), **SPARSE, precision="fp8_qat")
        for verb in (convert, remove_lite3r):
            with pytest.raises(NotAppliedError, match="holds 1 of the 2 attention modules"):
                verb(model.cross[0])
        assert describe(convert(model)).linears.keys() == {"in FP8 (emulated)"}

    def test_parts_on_their_own_are_refused_together(self) -> None:
        model = nn.ModuleList([apply_lite3r(Toy().eval(), **SPARSE, precision="fp8_qat") for _ in range(2)])
        for verb in (convert, describe):
            with pytest.raises(NotAppliedError, match="2 parts of this ModuleList on their own"):
                verb(model)
        assert not lite3r_modules(remove_lite3r(model))

    @pytest.mark.parametrize("precision", ["fp8", "fp8_qat"])
    def test_what_is_made_in_inference_mode_serves_outside_of_it(self, precision: str) -> None:
        model = Toy().eval()
        with torch.inference_mode():
            apply_lite3r(model, **SPARSE, precision=precision)
        model(images()).sum().backward()

    def test_hooks_stay(self) -> None:
        model, seen = Toy().eval(), []
        linear = next(m for m in model.cross[0].modules() if isinstance(m, nn.Linear))
        linear.register_forward_hook(lambda module, args, out: seen.append(args[0].shape))
        apply_lite3r(model, **SPARSE, precision="fp8")(images())
        assert seen

    def test_a_branch_that_is_not_finite_is_refused(self) -> None:
        model = apply_lite3r(Toy().eval(), **SPARSE, precision="fp8_qat")
        nn.init.constant_(model.cross[0].proj_lin.weight, math.nan)
        with pytest.raises(WeightsError, match=r"proj_lin\.weight has infinities or NaN"):
            convert(model)
