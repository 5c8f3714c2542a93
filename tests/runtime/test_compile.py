"""Blocks of a transformer run compiled inside a context, and only there."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from interruptions import interrupted, lines_of
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from lite3r_plugin import apply_lite3r
from lite3r_plugin.fp8.block import Fp8Block
from lite3r_plugin.runtime.compile import CompiledBlocks, repeated_blocks, why_not_compiled
from lite3r_plugin.testbed import Testbed, TestbedConfig
from lite3r_plugin.wrapper import host_of

DEPTH = 2
BLOCKS = 2 * DEPTH + 2  # of the aggregator and of the camera head


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """No graphs of other tests, which would count towards the limit."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def model(depth: int = DEPTH) -> Testbed:
    torch.manual_seed(0)
    return Testbed(TestbedConfig(dim=64, head_dim=32, depth=depth, stem=8)).eval()


def images(views: int) -> Tensor:
    return torch.rand(1, views, 3, 64, 96, generator=torch.Generator().manual_seed(1))


def test_blocks_are_found_once() -> None:
    made = model()
    blocks = repeated_blocks(made)
    assert len(blocks) == BLOCKS
    assert {type(block) for block in blocks} == {type(made.aggregator.frame_blocks[0])}
    assert repeated_blocks(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))) == []
    assert len(repeated_blocks(nn.Sequential(*made.aggregator.frame_blocks))) == DEPTH  # as timm keeps them


@torch.no_grad()
def test_blocks_of_a_list_are_compiled_where_some_of_them_are_in_fp8() -> None:
    made, x, counter = model(5), images(2), CompileCounterWithBackend("eager")
    found = repeated_blocks(made)
    apply_lite3r(made, precision="fp8", fp8_backend="emulated")
    aggregator = made.aggregator
    assert [type(block) is Fp8Block for block in aggregator.frame_blocks] == [False, True, True, True, False]
    assert [host_of(block) for block in repeated_blocks(made)] == found
    expected = made(x)["depth"]
    blocks = CompiledBlocks(made, backend=counter)
    with blocks.running():
        torch.testing.assert_close(made(x)["depth"], expected)
    assert len(blocks) == len(found) - 3  # but for FP8 around sparse attention
    assert counter.frame_count


@torch.no_grad()
def test_blocks_run_compiled_inside_only() -> None:
    made, counter = model(1), CompileCounterWithBackend("eager")
    blocks = CompiledBlocks(made, backend=counter)
    expected = {views: made(images(views))["depth"] for views in (2, 3)}
    assert not blocks
    for views, depth in expected.items():
        with blocks.running():
            torch.testing.assert_close(made(images(views))["depth"], depth)
        assert blocks
    compiled = counter.frame_count
    assert 0 < compiled <= len(repeated_blocks(made))
    torch.testing.assert_close(made(images(5))["depth"].shape, torch.Size((1, 5, 64, 96)))
    assert counter.frame_count == compiled


@torch.no_grad()
def test_what_are_too_many_cases_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block with a hook of its own is a case of its own."""
    monkeypatch.setattr("lite3r_plugin.runtime.compile.RECOMPILE_LIMIT", 2)
    made = model(2)
    for blocks in made.aggregator.frame_blocks, made.aggregator.global_blocks:
        for i, block in enumerate(blocks):
            block.mlp.register_forward_hook(lambda _, args, out, by=i: out * by)
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit) as raised, CompiledBlocks(made, backend="eager").running():
        made(images(2))
    assert why_not_compiled(raised.value).startswith("blocks of one class are more than 2 cases to the compiler: ")
    assert why_not_compiled(ValueError("no")) == "ValueError: no"


@torch.no_grad()
def test_another_thread_is_not_compiled_for() -> None:
    """It may want gradients, for which nothing is compiled, and what a compiler raises is caught in the other one alone."""
    made, counter = model(1), CompileCounterWithBackend("eager")
    expected = made(images(2))["depth"]
    with CompiledBlocks(made, backend=counter).running(), ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(torch.no_grad()(made), images(2)).result()["depth"], expected)
        assert counter.frame_count == 0
        made(images(2))
    assert counter.frame_count > 0


@torch.no_grad()
def test_attention_that_may_be_sparse_stays_eager() -> None:
    """And works afterwards, also where a failure ends the context."""
    made = apply_lite3r(model(1), keep_ratio=0.5, dense_below=0, block_q=16, block_k=16)
    forwards = {name: module.forward for name, module in made.named_modules()}
    expected = made(images(2))["depth"]
    blocks = CompiledBlocks(made, backend="eager")
    with blocks.running():
        torch.testing.assert_close(made(images(2))["depth"], expected)
    with pytest.raises(RuntimeError, match="on purpose"), blocks.running():
        raise RuntimeError("on purpose")
    assert {name: module.forward for name, module in made.named_modules()} == forwards
    torch.testing.assert_close(made(images(2))["depth"], expected)


def test_an_interruption_leaves_no_forward_and_no_limit_behind() -> None:
    made = apply_lite3r(model(1), keep_ratio=0.5, dense_below=0, block_q=16, block_k=16)
    made.aggregator.global_blocks[0].attn.forward = own = made.aggregator.global_blocks[0].attn.forward
    before = {name: module.__dict__.get("forward") for name, module in made.named_modules()}
    limits = torch._dynamo.config.recompile_limit, torch._dynamo.config.fail_on_recompile_limit_hit

    def run() -> None:
        with CompiledBlocks(made, backend="eager").running():
            assert "forward" in made.camera_head.trunk[0].__dict__

    for line in range(1, lines_of(run) + 1):
        interrupted(run, line)
        assert {name: module.__dict__.get("forward") for name, module in made.named_modules()} == before, line
        assert (torch._dynamo.config.recompile_limit, torch._dynamo.config.fail_on_recompile_limit_hit) == limits, line
    assert before["aggregator.global_blocks.0.attn"] is own


@torch.no_grad()
def test_sites_get_a_forward_of_their_own_back() -> None:
    """As accelerate gives them one, to bring in weights for each call."""
    made = apply_lite3r(model(), keep_ratio=0.25, dense_below=0, block_q=32, block_k=32)
    site, calls = made.aggregator.global_blocks[0].attn, []
    forward = site.forward
    site.forward = own = lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs)
    with CompiledBlocks(made, backend="eager").running():
        made(images(2))
    assert site.__dict__["forward"] is own
    assert "forward" not in made.aggregator.global_blocks[1].attn.__dict__
    assert calls
