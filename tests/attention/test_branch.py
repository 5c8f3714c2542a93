"""The projection of the linear branch: its dtype and device, its start, and weights that only their module can use."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import accelerate
import pytest
import torch
from held_weights import hold, lend
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from toys import Attention, Toy, images, toy_adapter

from lite3r_plugin import apply_lite3r, calibrate, convert, lite3r_disabled, load_lite3r, remove_lite3r, save_lite3r
from lite3r_plugin.apply.lookup import lite3r_modules
from lite3r_plugin.attention.branch import branch_weight
from lite3r_plugin.errors import WeightsError
from lite3r_plugin.fp8.qat import FakeQuantLinear
from lite3r_plugin.testbed import Testbed, TestbedConfig
from lite3r_plugin.testing import TEST_CONFIG

__all__ = ["toy_adapter"]  # the fixture
CPU = torch.device("cpu")


def small_testbed() -> Testbed:
    """With norms of queries and keys and a rotary embedding."""
    torch.manual_seed(0)
    return Testbed(TestbedConfig(dim=64, depth=2, stem=16)).eval().requires_grad_(False)


def sparse(model: nn.Module, **fields: object) -> nn.Module:
    """With branches that do something."""
    apply_lite3r(model, TEST_CONFIG, **fields)
    for i, site in enumerate(branches(model)):
        nn.init.normal_(site.weight, std=0.3, generator=torch.Generator().manual_seed(i))
    return model


def branches(model: nn.Module) -> list[nn.Linear]:
    return [site.proj_lin for site in lite3r_modules(model).values() if site.sparse]


def photographs() -> Tensor:
    return torch.rand(1, 3, 3, 48, 64, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def depth(model: nn.Module) -> Tensor:
    return model(photographs())["depth"]


class TestWeightsThatAreLentForACall:
    @pytest.mark.parametrize("linear_branch", ["all", "marginal"])
    @pytest.mark.parametrize("fuse", [True, False])
    @pytest.mark.parametrize(
        "offload", [lend, lambda model: accelerate.cpu_offload(model, execution_device=CPU)], ids=["lent", "accelerate"]
    )
    def test_after_apply(self, offload: Callable[[nn.Module], nn.Module], fuse: bool, linear_branch: str) -> None:
        model = sparse(small_testbed(), fuse=fuse, linear_branch=linear_branch)
        expected = depth(model)
        torch.testing.assert_close(depth(offload(model)), expected)

    @pytest.mark.parametrize(
        "offload", [lend, lambda model: accelerate.cpu_offload(model, execution_device=CPU)], ids=["lent", "accelerate"]
    )
    def test_before_apply_the_branch_is_where_the_host_computes(self, offload: Callable[[nn.Module], nn.Module]) -> None:
        expected = depth(sparse(small_testbed()))
        model = sparse(offload(small_testbed()))
        assert {branch.weight.device for branch in branches(model)} == {CPU}
        torch.testing.assert_close(depth(model), expected)

    def test_by_the_attention_module_for_all_inside(self) -> None:
        """Its own forward has to run, whatever the site says of its Linears."""
        expected, model = depth(sparse(small_testbed())), small_testbed()
        for block in model.aggregator.global_blocks:
            lend(block.attn, whole=True)
        torch.testing.assert_close(depth(sparse(model)), expected)

    def test_twice(self, adapter: object) -> None:
        """Who wraps a host and later what took its place wraps each."""

        class Biased(Attention):
            def __init__(self, dim: int, num_heads: int) -> None:
                super().__init__(dim, num_heads)
                self.bias = nn.Parameter(torch.randn(dim))

            def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
                return super().forward(x + self.bias, mask)

        model = Toy(make=Biased).eval()
        expected = model(images())
        model = accelerate.cpu_offload(model, execution_device=CPU)
        apply_lite3r(model, TEST_CONFIG, keep_ratio=1.0, fuse=False)
        for site in model.cross:
            accelerate.hooks.add_hook_to_module(site, accelerate.hooks.ModelHook())
        torch.testing.assert_close(model(images()), expected)
        assert [site.calls.dense for site in model.cross] == [1, 1]
        for site in model.cross:
            accelerate.hooks.remove_hook_from_module(site)
        torch.testing.assert_close(model(images()), expected)
        torch.testing.assert_close(remove_lite3r(model)(images()), expected)

    def test_by_a_block_for_all_inside(self) -> None:
        """After apply all is there when it is needed; before, nobody can tell where a branch belongs."""
        model = sparse(small_testbed())
        expected = depth(model)
        for block in model.aggregator.global_blocks:
            lend(block, whole=True)
        torch.testing.assert_close(depth(model), expected)
        model = small_testbed()
        for block in model.aggregator.global_blocks:
            lend(block, whole=True)
        with pytest.raises(
            WeightsError,
            match=r"site 'aggregator\.global_blocks\.0\.attn' .*for a call of aggregator\.global_blocks\.0 .*apply_lite3r first",
        ):
            apply_lite3r(model, TEST_CONFIG)
        assert not lite3r_modules(model)
        expected = depth(small_testbed())
        torch.testing.assert_close(depth(apply_lite3r(model, TEST_CONFIG, keep_ratio=1.0, linear_branch="none")), expected)

    def test_by_a_block_of_accelerate(self) -> None:
        model = small_testbed()
        kind = type(model.aggregator.global_blocks[0]).__name__
        model = accelerate.cpu_offload(model, execution_device=CPU, preload_module_classes=[kind])
        with pytest.raises(WeightsError, match=r"for a call of aggregator\.global_blocks\.0 as a whole .*apply_lite3r first, offload then"):
            apply_lite3r(model, TEST_CONFIG)

    def test_by_the_whole_model(self) -> None:
        model = lend(small_testbed(), whole=True)
        with pytest.raises(WeightsError, match=r"come only for a call of the model as a whole"):
            apply_lite3r(model, TEST_CONFIG)

    def test_a_model_that_is_to_be_loaded_is_not_refused(self) -> None:
        with torch.device("meta"):
            model = Testbed(TestbedConfig(dim=64, depth=1, stem=8))
        model.register_forward_pre_hook(lambda *_: None)
        assert {branch.weight.device.type for branch in branches(apply_lite3r(model, TEST_CONFIG))} == {"meta"}

    @pytest.mark.parametrize("precision", ["fp8", "fp8_qat"])
    def test_fp8_is_refused_before_anything_changes(self, precision: str) -> None:
        model = lend(small_testbed())
        with pytest.raises(WeightsError, match=r"comes only for each call \(CPU offload\): use FP8 first"):
            apply_lite3r(model, TEST_CONFIG, precision=precision)
        assert not lite3r_modules(model)
        torch.testing.assert_close(depth(model), depth(small_testbed()))

    @pytest.mark.parametrize("precision", ["fp8", "fp8_qat"])
    def test_fp8_may_be_offloaded(self, precision: str) -> None:
        model = sparse(small_testbed(), precision=precision)
        expected = depth(model)
        torch.testing.assert_close(depth(lend(model)), expected)

    def test_norms_without_values_never_reach_attention(self) -> None:
        model = sparse(small_testbed())
        model.aggregator.global_blocks[1].attn.q_norm.to("meta")
        with pytest.raises(WeightsError, match=r"the weight of the norm of queries is on meta .* Load weights first"):
            depth(model)
        model = sparse(small_testbed(), precision="fp8")
        model.aggregator.frame_blocks[1].norm2.to("meta")
        with pytest.raises(WeightsError, match=r"norm2\.weight is on meta"):
            depth(model)


class TestWeightsOfAClassOfTheirOwn:
    def test_after_apply_they_are_used_by_their_linears(self) -> None:
        model = sparse(small_testbed())
        expected = depth(model)
        torch.testing.assert_close(depth(hold(model)), expected)

    @pytest.mark.parametrize("precision", ["fp8", "fp8_qat"])
    def test_fp8_is_refused_before_anything_changes(self, precision: str) -> None:
        model = hold(small_testbed())
        with pytest.raises(WeightsError, match=r"is a OnlyLinear: FP8 takes plain weights"):
            apply_lite3r(model, TEST_CONFIG, precision=precision)
        assert not lite3r_modules(model)
        assert depth(sparse(model)).isfinite().all()

    def test_a_model_that_trains_for_fp8_refuses_them(self) -> None:
        model = hold(sparse(small_testbed(), precision="fp8_qat"))
        with pytest.raises(WeightsError, match=r"rounds to FP8 in training was given a OnlyLinear"):
            depth(model)
        with pytest.raises(WeightsError, match=r"is a OnlyLinear"):
            convert(model)


def replicas(model: nn.Module) -> list[nn.Module]:
    """As `torch.nn.parallel.replicate` begins, which takes no CPUs."""
    return [module._replicate_for_data_parallel() for module in model.modules()]


class TestDataParallel:
    @pytest.mark.parametrize("fields", [{}, {"fuse": False}, {"precision": "fp8_qat"}, {"precision": "fp8"}])
    def test_is_refused_by_name(self, fields: dict[str, object]) -> None:
        model = sparse(small_testbed(), **fields)
        with pytest.raises(WeightsError, match=r"DataParallel .* use torch\.nn\.parallel\.DistributedDataParallel"):
            replicas(model)
        if fields.get("precision") != "fp8":
            with lite3r_disabled(model), pytest.raises(WeightsError, match="DistributedDataParallel"):
                replicas(model)


class TestDtypes:
    @pytest.mark.parametrize(
        ("host", "branch"), [(torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)]
    )
    @pytest.mark.parametrize("precision", ["full", "fp8_qat"])
    def test_a_branch_has_fp32_at_least_and_the_output_the_dtype_of_the_host(
        self, adapter: object, host: torch.dtype, branch: torch.dtype, precision: str
    ) -> None:
        model = sparse(Toy().to(host).eval(), precision=precision)
        assert {p.weight.dtype for p in branches(model)} == {branch}
        assert model(images(dtype=host)).dtype == host
        if host != torch.float64:
            model.to(host)  # the user's wish
            assert {p.weight.dtype for p in branches(model)} == {host}
            assert model(images(dtype=host)).dtype == host

    def test_a_checkpoint_keeps_it(self, adapter: object, tmp_path: Path) -> None:
        model = sparse(Toy().bfloat16().eval())
        other = Toy().bfloat16().eval()
        other.load_state_dict({name: x for name, x in model.state_dict().items() if "proj_lin" not in name})
        save_lite3r(model, tmp_path)
        load_lite3r(other, tmp_path)
        assert all(torch.equal(a.weight, b.weight) for a, b in zip(branches(model), branches(other), strict=True))
        assert torch.equal(model(images(dtype=torch.bfloat16)), other(images(dtype=torch.bfloat16)))

    @pytest.mark.parametrize("linear_branch", ["all", "marginal"])
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_small_steps_of_a_half_precision_model_count(self, adapter: object, dtype: torch.dtype, linear_branch: str) -> None:
        model = sparse(Toy().to(dtype).eval().requires_grad_(False), linear_branch=linear_branch)
        weights = [branch.weight for branch in branches(model)]
        before = [weight.detach().clone() for weight in weights]
        optimizer, scaler = torch.optim.Adam(weights, 1e-5), torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
        scaler.scale(model(images(dtype=dtype)).float().square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert all((weight != old).all() for weight, old in zip(weights, before, strict=True))


class TestDeferredInitialisation:
    @pytest.mark.parametrize("precision", ["full", "fp8_qat"])
    def test_branches_and_counters_start_at_zero(self, adapter: object, precision: str) -> None:
        dense = Toy().eval()
        with torch.device("meta"):
            model = Toy().eval()
        apply_lite3r(model, TEST_CONFIG, precision=precision)
        model.to_empty(device="cpu")
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.fill_(7)  # what memory may hold
        for module in model.modules():
            if isinstance(reset := getattr(module, "reset_parameters", None), Callable):
                reset()
        model.load_state_dict(dense.state_dict(), strict=False)
        assert not any(branch.weight.any() for branch in branches(model))
        assert not any(m.infinities.any() for m in model.modules() if isinstance(m, FakeQuantLinear))
        torch.testing.assert_close(model(images()), apply_lite3r(dense, TEST_CONFIG, precision=precision)(images()))


@pytest.fixture
def process_group() -> Iterator[torch.distributed.DeviceMesh]:
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    try:
        yield torch.distributed.init_device_mesh("cpu", (1,))
    finally:
        torch.distributed.destroy_process_group()


class TestShardedByFsdp2:
    @torch.no_grad()
    @pytest.mark.parametrize("blocks", [True, False], ids=["blocks", "root alone"])
    def test_it_runs_and_is_calibrated(self, process_group: torch.distributed.DeviceMesh, adapter: object, blocks: bool) -> None:
        whole = sparse(Toy().eval())
        model = copy.deepcopy(whole)
        for site in model.cross if blocks else ():
            fully_shard(site, mesh=process_group)
        fully_shard(model, mesh=process_group)
        given = [images() + i for i in range(3)]
        torch.testing.assert_close(model(given[0]), whole(given[0]))
        calibrate(whole, given)
        calibrate(model, given)
        for shard, branch in zip(branches(model), branches(whole), strict=True):
            assert isinstance(shard.weight, DTensor)
            torch.testing.assert_close(shard.weight.full_tensor(), branch.weight.detach(), check_dtype=False)
        torch.testing.assert_close(model(given[0]), whole(given[0]))

    @torch.no_grad()
    def test_a_branch_that_is_sharded_alone(self, process_group: torch.distributed.DeviceMesh, adapter: object) -> None:
        model = sparse(Toy().eval())
        expected = model(images())
        for branch in branches(model):
            fully_shard(branch, mesh=process_group)
        torch.testing.assert_close(model(images()), expected)
        for branch in branches(model):  # as nobody gathers it
            branch.__class__ = type(branch).__bases__[-1]
            branch._forward_pre_hooks.clear()
            branch._forward_hooks.clear()
            branch.weight = nn.Parameter(distribute_tensor(branch.weight.detach(), process_group))
        torch.testing.assert_close(model(images()), expected)


@pytest.mark.parametrize(
    ("change", "says"),
    [(lend, "on the meta device and has no values to replace"), (hold, "is a OnlyLinear: do this before weights are quantised")],
)
def test_calibration_refuses_what_it_cannot_write(adapter: object, change: Callable[[nn.Module], nn.Module], says: str) -> None:
    model = change(sparse(Toy().eval()))
    with pytest.raises(WeightsError, match=rf"cannot fit cross\.0\.proj_lin: it .*{says}"):
        calibrate(model, iter(()))


def test_a_plain_weight_is_read_as_it_is(adapter: object) -> None:
    model = sparse(Toy().eval())
    site = model.cross[0]
    assert branch_weight(site.proj_lin, images(), site.site) is site.proj_lin.weight
