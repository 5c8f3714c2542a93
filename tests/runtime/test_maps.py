"""Kernels for feature maps inside of a head's forward: as compiled on a GPU, interpreted elsewhere, and where torch's own must run."""

from __future__ import annotations

import copy
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from interruptions import contents
from map_kernels import count_map_kernels
from numerics import assert_as_accurate
from operators import Seen
from rewriting import rewrite_exactly
from sla_cases import DEVICE, DTYPES
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack
from torch.utils.flop_counter import FlopCounterMode

from lite3r_plugin import hookimpl
from lite3r_plugin.adapter import ExactRewrite, get_manager
from lite3r_plugin.ops import feature_maps
from lite3r_plugin.runtime import maps
from lite3r_plugin.runtime.exact import InFp32, KeptEmbedding, in_fp32
from lite3r_plugin.runtime.graphs import capture, warm_up
from lite3r_plugin.runtime.maps import MapKernels, map_kernels
from lite3r_plugin.runtime.rewrites import take_out
from lite3r_plugin.wrapper import Changes, RewrittenMethod

ALL = {"upsample": 2, "add_bias_": 3, "add_embedding": 1}
TOLERANCE: Any = dict(rtol=1e-4, atol=1e-4)


class Head(nn.Module):
    """What DPT heads do to their maps."""

    def __init__(self, channels: int = 6) -> None:
        super().__init__()
        self.project = nn.Conv2d(8, channels, 1)
        self.grow = nn.ConvTranspose2d(channels, channels, 2, 2)
        self.mix = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.last = nn.Conv2d(channels, 4, 3, padding=1)

    def embed(self, x: Tensor, width: int, height: int, ratio: float = 0.1) -> Tensor:
        channels, rows, columns = x.shape[1:]
        across = torch.linspace(0, width / height, columns, dtype=torch.float64, device=x.device).expand(channels // 2, rows, -1)
        down = torch.linspace(1, 2, rows, dtype=torch.float64, device=x.device)[:, None].expand(channels // 2, -1, columns)
        return x + ratio * torch.cat((across, down)).to(x.dtype)

    def forward(self, tokens: Tensor, rows: int = 3, columns: int = 4) -> Tensor:
        """From ``[N, P, 8]``, so that channels of maps lie side by side."""
        x = tokens.permute(0, 2, 1).reshape(tokens.shape[0], tokens.shape[2], rows, columns)
        x = self.grow(self.embed(self.project(x), 8, 6))
        x = F.interpolate(self.mix(F.relu(x)), scale_factor=1.5, mode="bilinear", align_corners=True)
        return self.last(nn.functional.interpolate(x, size=(5, 7), mode="bilinear"))


def make(dtype: torch.dtype = torch.float32) -> Any:
    return Head().to(DEVICE, dtype).eval().requires_grad_(False)


def tokens(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 12, 8, device=DEVICE).to(dtype)


def put(*methods: RewrittenMethod) -> None:
    with Changes() as changes:
        for method in methods:
            method.put_in(changes)


def rewritten(head: Any) -> Any:
    """A copy with the kernels, and its position embedding kept."""
    head = copy.deepcopy(head)
    put(KeptEmbedding(head, "embed"), MapKernels(head, "forward"))
    return head


def modes() -> int:
    return len(_get_current_function_mode_stack())


@pytest.fixture(autouse=True)
def _convolutions_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Which kernels ran."""
    return count_map_kernels(monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_a_head_gives_what_it_gave(dtype: torch.dtype, ran: Counter[str]) -> None:
    head, x = make(dtype), tokens(dtype)
    found, expected = rewritten(head)(x), head(x)
    assert ran == ALL
    assert found.dtype == dtype
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert_as_accurate(found, expected, head.double()(x.double()))


@torch.no_grad()
def test_nothing_is_left_behind(ran: Counter[str]) -> None:
    head, x, seen, before = rewritten(make()), tokens(), [], modes()
    head.mix.register_forward_hook(lambda *_: seen.append(modes()))
    head(x)
    assert seen == [before + 1]
    with pytest.raises(RuntimeError, match="shape"):
        head(x, rows=5)
    assert modes() == before
    F.interpolate(x.reshape(2, 8, 3, 4).to(memory_format=torch.channels_last), scale_factor=2, mode="bilinear")
    assert ran == ALL


@torch.no_grad()
def test_other_threads_run_as_ever(ran: Counter[str]) -> None:
    head, seen = rewritten(make()), []

    def look_in_another_thread(*_: Any) -> None:
        thread = threading.Thread(target=lambda: seen.append(modes()))
        thread.start()
        thread.join()

    head.mix.register_forward_hook(look_in_another_thread)
    head(tokens())
    assert seen == [0]


class Outer(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(self.inner(x), size=9, mode="bilinear")


@torch.no_grad()
def test_heads_inside_of_heads(ran: Counter[str]) -> None:
    head, x = make(), tokens()
    outer = Outer(rewritten(head))
    put(MapKernels(outer, "forward"))
    torch.testing.assert_close(outer(x), Outer(head)(x), **TOLERANCE)
    assert ran == {**ALL, "upsample": 3}


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_a_map_grows_and_is_embedded_at_once_inside_of_a_head_alone(dtype: torch.dtype, ran: Counter[str]) -> None:
    class Growing(nn.Module):
        def forward(self, x: Tensor, across: Tensor, down: Tensor) -> Tensor | None:
            return maps.upsample_with_embedding(x, (5, 9), across, down)

    x = torch.randn(2, 6, 3, 4, device=DEVICE).to(dtype, memory_format=torch.channels_last)
    across, down = torch.randn(9, 3, device=DEVICE).to(dtype), torch.randn(5, 3, device=DEVICE).to(dtype)
    head = Growing()
    assert head(x, across, down) is None
    put(MapKernels(head, "forward"))
    found = head(x, across, down)
    assert ran == {"upsample_with_embedding": 1}
    assert found is not None
    same, exact = (
        feature_maps.naive.upsample_with_embedding(x.to(kind), (5, 9), across.to(kind), down.to(kind), align_corners=True)
        for kind in (dtype, torch.float64)
    )
    assert_as_accurate(found, same, exact)
    assert head(x.contiguous(), across, down) is None  # rows side by side
    with torch.enable_grad():
        assert head(x.clone().requires_grad_(), across, down) is None


# What is left to torch


def of_small_maps(head: Any, x: Tensor) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(maps, "LEAST", 10**6)
        return head(x)


def with_channels_apart(head: Any, x: Tensor) -> Any:
    return head(x.transpose(1, 2).contiguous().transpose(1, 2))


def wanting_gradients_of_inputs(head: Any, x: Tensor) -> Any:
    with torch.enable_grad():
        return torch.autograd.grad(head(x.requires_grad_()).sum(), x)[0]


def wanting_gradients_of_weights(head: Any, x: Tensor) -> Any:
    with torch.enable_grad():
        return torch.autograd.grad(head.requires_grad_()(x).sum(), list(head.parameters()))


def by_vmap(head: Any, x: Tensor) -> Any:
    return torch.func.vmap(head)(x[:, None])


def by_jvp(head: Any, x: Tensor) -> Any:
    return torch.func.jvp(head, (x,), (x,))


def of_dual_tensors(head: Any, x: Tensor) -> Any:
    with forward_ad.dual_level():
        return tuple(forward_ad.unpack_dual(head(forward_ad.make_dual(x, x))))


def counting_flops(head: Any, x: Tensor) -> Any:
    with FlopCounterMode(display=False) as counter:
        out = head(x)
    return out, torch.tensor(counter.get_total_flops())


def without_data(head: Any, x: Tensor) -> Any:
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        return tuple(head(mode.from_tensor(x)).shape)


def traced(head: Any, x: Tensor) -> Any:
    return torch.jit.trace(head, (x,), check_trace=False)(x)


def compiled(head: Any, x: Tensor) -> Any:
    return torch.compile(head, backend="eager", fullgraph=True)(x)


class Other(Tensor):
    """A class of tensors of somebody else."""


def of_another_class(head: Any, x: Tensor) -> Any:
    out = head(x.as_subclass(Other))
    assert type(out) is Other
    return out.as_subclass(Tensor)


@torch.no_grad()
def test_tensors_without_data_take_the_way_of_those_with_data(ran: Counter[str]) -> None:
    head, x = rewritten(make()), tokens()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, Seen() as seen:
        head(mode.from_tensor(x))
    assert {"lite3r::upsample", "lite3r::add_bias_", "lite3r::add_embedding"} <= seen.names
    assert not ran


@pytest.mark.filterwarnings("ignore:`torch.jit.trace:DeprecationWarning", "ignore:`torch.jit.trace:FutureWarning")
@pytest.mark.parametrize(
    "run",
    [
        of_small_maps, with_channels_apart, wanting_gradients_of_inputs, wanting_gradients_of_weights, by_vmap, by_jvp, of_dual_tensors,
        counting_flops, without_data, traced, compiled, of_another_class,
    ],
)  # fmt: skip
@torch.no_grad()
def test_torch_runs(run: Callable[[Any, Tensor], Any], ran: Counter[str]) -> None:
    head, x = make(), tokens()
    other = rewritten(head)
    expected = run(head, x.clone())
    found = run(other, x.clone())
    assert not ran
    torch.testing.assert_close(found, expected, **TOLERANCE)


@pytest.mark.skipif(DEVICE != "cpu", reason="of CPUs")
@torch.no_grad()
def test_a_cpu_runs_what_it_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    head, x = make(), tokens()
    monkeypatch.setattr(maps, "LEAST", 1)
    for name in ("upsample", "add_bias_"):
        monkeypatch.setattr(feature_maps.naive, name, lambda *_, **__: pytest.fail("a definition ran"))
    torch.testing.assert_close(rewritten(head)(x), head(x), rtol=1e-6, atol=1e-6)


class Resize(nn.Module):
    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self.arguments = arguments

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, **self.arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        dict(size=9), dict(size=torch.Size((4, 9))), dict(size=[9, 2], align_corners=True), dict(scale_factor=2),
        dict(scale_factor=(1.3, 0.5)), dict(scale_factor=1.7, recompute_scale_factor=True), dict(scale_factor=1.7, align_corners=True),
    ],
)  # fmt: skip
@torch.no_grad()
def test_every_way_to_ask_for_a_size(arguments: dict[str, Any], ran: Counter[str]) -> None:
    module = Resize(mode="bilinear", **arguments)
    x = torch.randn(2, 5, 6, 7, device=DEVICE).to(memory_format=torch.channels_last)
    expected = module(x)
    put(MapKernels(module, "forward"))
    torch.testing.assert_close(module(x), expected, **TOLERANCE)
    assert ran == {"upsample": 1}


@pytest.mark.parametrize(
    "arguments", [dict(mode="nearest"), dict(mode="bicubic"), dict(mode="bilinear", antialias=True), dict(mode="area")]
)
@torch.no_grad()
def test_other_interpolations_are_torchs(arguments: dict[str, Any], ran: Counter[str]) -> None:
    module = Resize(size=4, **arguments)
    x = torch.randn(2, 5, 6, 7, device=DEVICE).to(memory_format=torch.channels_last)
    expected = module(x)
    put(MapKernels(module, "forward"))
    torch.testing.assert_close(module(x), expected, rtol=0, atol=0)
    assert not ran


class Call(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: F.interpolate(x, size=4, scale_factor=2.0, mode="bilinear"),
        lambda x: F.interpolate(x, size=0, mode="bilinear"),
        lambda x: F.interpolate(x, size=(4, 4, 4), mode="bilinear"),
        lambda x: F.interpolate(x, mode="bilinear"),
        lambda x: F.conv2d(x, torch.ones(3, 5, 1, 1, device=DEVICE), torch.ones(1, device=DEVICE)),
        lambda x: F.conv2d(x, torch.ones(3, 5, 1, 1, device=DEVICE), torch.ones(3, device=DEVICE, dtype=torch.float64)),
    ],
)
@torch.no_grad()
def test_errors_are_torchs(wrong: Callable[[Tensor], Tensor], ran: Counter[str]) -> None:
    x = torch.randn(2, 5, 6, 7, device=DEVICE).to(memory_format=torch.channels_last)
    with pytest.raises((ValueError, RuntimeError)) as expected:
        wrong(x)
    put(MapKernels(module := Call(wrong), "forward"))
    with pytest.raises(type(expected.value)) as found:
        module(x)
    assert str(found.value) == str(expected.value)


@torch.no_grad()
def test_convolutions_by_names_of_arguments(ran: Counter[str]) -> None:
    weight, bias = torch.randn(3, 5, 1, 1, device=DEVICE), torch.randn(3, device=DEVICE)
    module = Call(lambda x: F.conv2d(bias=bias, weight=weight, input=x, padding="same"))
    x = torch.randn(2, 5, 6, 7, device=DEVICE).to(memory_format=torch.channels_last)
    expected = module(x)
    put(MapKernels(module, "forward"))
    torch.testing.assert_close(module(x), expected, **TOLERANCE)
    assert ran == {"add_bias_": 1}


@torch.no_grad()
def test_a_block_that_is_compiled_inside_of_a_head(ran: Counter[str]) -> None:
    inner = nn.Sequential(nn.Conv2d(5, 5, 1), nn.GELU(), nn.Conv2d(5, 5, 1)).to(DEVICE)
    outer = Outer(inner)
    x = torch.randn(2, 5, 6, 7, device=DEVICE).to(memory_format=torch.channels_last)
    expected = outer(x)
    outer.inner = torch.compile(inner, backend="aot_eager", fullgraph=True)
    put(MapKernels(outer, "forward"))
    torch.testing.assert_close(outer(x), expected, **TOLERANCE)
    assert ran == {"upsample": 1}


# As a rewrite


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = make()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)


KERNELS = map_kernels("head", lambda head: (torch.rand(2, 12, 8),))


@pytest.fixture
def answer() -> Iterator[list[ExactRewrite]]:
    """What an adapter answers."""
    given: list[ExactRewrite] = []
    get_manager().register(SimpleNamespace(lite3r_exact_rewrites=hookimpl(lambda model: list(given))), name="maps")
    yield given
    get_manager().unregister(name="maps")


@pytest.mark.parametrize("turned", [False, True])
@torch.no_grad()
def test_they_go_with_another_rewrite_of_the_same_forward(turned: bool, answer: list[ExactRewrite], ran: Counter[str]) -> None:
    answer += [KERNELS, *in_fp32("head")][:: -1 if turned else 1]
    model, x = Model(), tokens()
    before, expected = contents(model), model(x)
    done = rewrite_exactly(model)
    assert done is not None
    assert len(done.made) == 2
    assert isinstance(model.head, InFp32)
    ran.clear()  # of the trial
    torch.testing.assert_close(model(x.double()), expected, **TOLERANCE)
    assert ran == {"upsample": 2, "add_bias_": 3}
    again = rewrite_exactly(model)
    assert again is not None
    assert not again.made
    with Changes() as changes:
        take_out(changes, dict(model.named_modules()), list(done.made.values()))
    assert contents(model) == before
    assert "forward" not in vars(model.head)


@torch.no_grad()
def test_they_come_to_what_is_rewritten_already(answer: list[ExactRewrite], ran: Counter[str]) -> None:
    model, x = Model(), tokens()
    answer += in_fp32("head")
    rewrite_exactly(model)
    answer[:] = [KERNELS]
    done = rewrite_exactly(model)
    assert done is not None
    assert len(done.made) == 1
    ran.clear()  # of the trial
    model(x)
    assert ran["upsample"] == 2


@pytest.mark.parametrize("name", ["upsample", "add_bias_"])
def test_the_trial_runs_the_definitions(name: str, answer: list[ExactRewrite], monkeypatch: pytest.MonkeyPatch) -> None:
    answer.append(KERNELS)
    own = getattr(feature_maps.naive, name)
    monkeypatch.setattr(feature_maps.naive, name, lambda *args, **kwargs: own(*args, **kwargs).add_(0.1))
    done = rewrite_exactly(model := Model())
    assert done is not None
    assert not done.made
    assert "it differs from the host's own forward by" in next(iter(done.left.values()))
    assert "forward" not in vars(model.head)


# On a GPU, at sizes that pay


class LargeHead(Head):
    def forward(self, tokens: Tensor, rows: int = 37, columns: int = 37) -> Tensor:
        x = self.embed(self.project(tokens.permute(0, 2, 1).reshape(-1, 8, rows, columns)), 518, 518)
        x = F.interpolate(self.mix(F.relu(self.grow(x))), scale_factor=2, mode="bilinear", align_corners=True)
        return self.last(F.interpolate(x, size=(518, 518), mode="bilinear", align_corners=True))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@torch.no_grad()
def test_a_graph_replays_them(dtype: torch.dtype) -> None:
    head = LargeHead(256).to(DEVICE, dtype).eval()
    x = torch.randn(4, 37 * 37, 8, device=DEVICE).to(dtype)
    other = rewritten(head)
    eager = other(x)
    warm_up(lambda: other(x), torch.device(DEVICE))
    graph, replayed = capture(lambda: other(x), torch.device(DEVICE))
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(replayed, other(x))
    assert not torch.equal(replayed, eager)
    assert_as_accurate(replayed, head(x), head.double()(x.double()))


@pytest.mark.gpu
@torch.no_grad()
def test_large_maps_run_in_the_kernels() -> None:
    head = LargeHead(256).to(DEVICE, torch.bfloat16).eval()
    x = torch.randn(4, 37 * 37, 8, device=DEVICE, dtype=torch.bfloat16)
    other = rewritten(head)
    other(x)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        other(x)
    names = {event.key for event in profile.key_averages()}
    assert {"_upsample_kernel", "_bias_kernel", "_embedding_kernel"} <= names
    assert not any("upsample_bilinear" in name for name in names)
