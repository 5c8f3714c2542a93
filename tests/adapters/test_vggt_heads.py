"""DPT heads of VGGT with their large maps for few views at a time: the same numbers, less memory, and where the head's own code runs."""

from __future__ import annotations

import copy
import inspect
import textwrap
import weakref
from collections.abc import Callable
from types import FunctionType
from typing import Any

import accelerate
import pytest
import torch
from map_kernels import count_map_kernels
from real_models import small_vggt
from sla_cases import DEVICE
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lite3r_adapters.vggt import heads
from lite3r_adapters.vggt.heads import FewViews, few_views, head_call
from lite3r_plugin import Lite3RConfig, apply_lite3r, describe, lite3r_disabled, remove_lite3r
from lite3r_plugin.adapter.trials import require_equal
from lite3r_plugin.errors import AdapterError
from lite3r_plugin.runtime.chunks import Chunks, in_chunks
from lite3r_plugin.runtime.exact import KeptEmbedding
from lite3r_plugin.runtime.maps import MapKernels
from lite3r_plugin.runtime.trace import traced
from lite3r_plugin.runtime.values import exchanged
from lite3r_plugin.wrapper import Changes, RewrittenMethod

DENSE = Lite3RConfig(keep_ratio=1.0, linear_branch="none")
WORDS = "large maps of the head for few views at a time"
KINDS: dict[str, dict[str, Any]] = {
    "depth": dict(output_dim=2, activation="exp"),
    "points": dict(output_dim=4, activation="inv_log", pos_embed=False),
    "features": dict(feature_only=True),
}


def make(kind: str = "depth") -> Any:
    module = pytest.importorskip("vggt.heads.dpt_head")
    torch.manual_seed(0)
    sizes: dict[str, Any] = dict(features=16, out_channels=[8] * 4, intermediate_layer_idx=[0, 1, 2, 3])
    return module.DPTHead(32, **sizes, **KINDS[kind]).eval()


def call(views: int, batch: int = 1, rows: int = 6, columns: int = 4) -> tuple[Any, ...]:
    torch.manual_seed(1)
    layers = [torch.randn(batch, views, 5 + rows * columns, 32) for _ in range(4)]
    return layers, torch.rand(batch, views, 3, 14 * rows, 14 * columns), 5


def rewritten(head: Any) -> Any:
    with Changes() as changes:
        FewViews(head).put_in(changes)
    return head


def calls_of(head: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many views the finest maps are made for, in each call of the module that makes them."""
    seen: list[int] = []
    own = type(head.scratch.output_conv1).forward
    monkeypatch.setattr(head.scratch.output_conv1, "forward", lambda x: seen.append(x.shape[0]) or own(head.scratch.output_conv1, x))
    return seen


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("views", "batch"), [(1, 1), (2, 1), (5, 1), (11, 1), (3, 2), (1, 4)])
@torch.no_grad()
def test_the_numbers_stay(kind: str, views: int, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """For one view, a last one alone, several chunks of the host's, several scenes; and the layout in memory stays, too."""
    head, given = make(kind), call(views, batch)
    expected = head(*given)
    rewritten(head)
    seen = calls_of(head, monkeypatch)
    found = head(*given)
    require_equal(expected, found, "the head's own code")
    assert max(seen) == min(views * batch, heads.VIEWS)
    assert sum(seen) == views * batch
    own, new = ([x] if isinstance(x, Tensor) else list(x) for x in (expected, found))
    assert [x.stride() for x in new] == [x.stride() for x in own]


@torch.no_grad()
def test_large_maps_of_two_views_are_held_and_not_of_eight() -> None:
    head, given = make(), call(8, rows=10, columns=10)
    peaks: list[int] = []
    for _ in range(2):
        head(*given)
        with traced(head) as trace:
            head(*given)
        peaks.append(trace.peak)
        rewritten(head)
    largest = 8 * (140 * 140 * 8 * 4)  # up-sampled maps of eight views
    assert peaks[0] > 2 * largest
    assert peaks[1] < peaks[0] / 2


@torch.no_grad()
def test_results_are_held_once() -> None:
    """Each part is written into the whole, so that the parts are not all there beside it."""
    head, given = rewritten(make("features")), call(8)
    with traced(head) as trace:
        out = head(*given)
    made = [item for item in trace.held if item.freed is None]
    assert [item.size for item in made] == [out.nbytes]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_last_map_grows_and_is_embedded_in_one_pass(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    head, (layers, *given) = make(kind).to(DEVICE), call(3, rows=2, columns=3)
    layers, given = [x.to(DEVICE) for x in layers], [given[0].to(DEVICE), given[1]]
    expected = head(layers, *given)
    with Changes() as changes:
        for method in (KeptEmbedding(head, "_apply_pos_embed"), MapKernels(head, "forward"), FewViews(head)):
            method.put_in(changes)
    ran = count_map_kernels(monkeypatch)
    found = head(layers, *given)
    assert ran["upsample_with_embedding"] == (2 if head.pos_embed else 0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def hooked(head: Any, given: Any) -> Any:
    head.scratch.output_conv2.register_forward_hook(lambda module, args, output: output)
    return head(*given)


def compiled(head: Any, given: Any) -> Any:
    return torch.compile(head, backend="eager")(*given)


def with_gradients(head: Any, given: Any) -> Any:
    with torch.enable_grad():
        return head(*given)


def of_another_class(head: Any, given: Any) -> Any:
    class Tagged(Tensor):
        pass

    layers, *rest = given
    return head([layer.as_subclass(Tagged) for layer in layers], *rest)


@pytest.mark.parametrize("run", [hooked, compiled, with_gradients, of_another_class])
@torch.no_grad()
def test_the_heads_own_code_runs(run: Callable[[Any, Any], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where somebody would see that views are told apart, or needs what it computes."""
    head, given = make(), call(5)
    expected, method = head(*given), FewViews(head)
    monkeypatch.setattr(method, "_finest", lambda *_: pytest.fail("views are told apart"))
    with Changes() as changes:
        method.put_in(changes)
    found = run(head, given)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.detach().as_subclass(Tensor), b)


@torch.no_grad()
def test_who_looks_at_operators_sees_what_runs() -> None:
    head, given = make(), call(4)
    counts: list[int] = []
    for _ in range(2):
        with FlopCounterMode(display=False) as counter:
            head(*given)
        counts.append(counter.get_total_flops())
        rewritten(head)
    assert counts[0] == counts[1]


@torch.no_grad()
def test_a_layer_that_is_not_there_is_told_by_the_head_itself() -> None:
    """As one that an aggregator was told not to keep."""
    head, (layers, *rest) = make(), call(3)
    layers[2] = None
    reasons: list[str] = []
    for _ in range(2):
        with pytest.raises((ValueError, TypeError)) as caught:
            head(layers, *rest)
        reasons.append(str(caught.value))
        rewritten(head)
    assert reasons[0] == reasons[1]


@torch.no_grad()
def test_a_forks_head_may_be_given_the_layers_alone_that_it_reads() -> None:
    """In whose places others would be read."""
    head, (layers, *rest) = make(), call(3)
    layers, head.intermediate_layer_idx = [*layers, *layers], [1, 3, 4, 6]
    host = type(head)._forward_impl

    def forward_impl(self: Any, given: Any, *rest: Any) -> Any:
        read = self.intermediate_layer_idx
        full = given if len(given) > max(read) else [given[read.index(i)] if i in read else None for i in range(max(read) + 1)]
        return self.whole(full, *rest)

    own = FunctionType(forward_impl.__code__, host.__globals__)
    head.__class__ = type("Fork", (type(head),), {"_forward_impl": own, "whole": host})
    read = [layers[i] for i in head.intermediate_layer_idx]
    expected = head(layers, *rest)
    rewritten(head)
    for given in (layers, read):
        for a, b in zip(head(given, *rest), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def mixing_views(head: Any) -> str:
    host = type(head).scratch_forward
    fork = {"scratch_forward": lambda self, maps: host(self, [x - x.mean(0, keepdim=True) for x in maps])}
    head.__class__ = type("Fork", (type(head),), fork)
    return "it differs from the host's own _forward_impl by"


def with_a_method_of_its_own(head: Any) -> str:
    host = type(head)._forward_impl
    fork = {"_forward_impl": lambda self, *args: tuple(x + 1 for x in host(self, *args))}
    head.__class__ = type("Fork", (type(head),), fork)
    return "there is no custom_interpolate where its class is"


@pytest.mark.parametrize("change", [mixing_views, with_a_method_of_its_own])
def test_a_fork_that_differs_keeps_its_own_code(change: Callable[[Any], str]) -> None:
    model: Any = small_vggt()
    reason = change(model.depth_head)
    apply_lite3r(model, DENSE)
    why = describe(model).not_rewritten[f"depth_head: {WORDS}"]
    assert reason in why
    assert "_forward_impl" not in vars(model.depth_head)


@torch.no_grad()
def test_it_comes_and_goes_with_lite3r() -> None:
    model: Any = small_vggt()
    images = torch.rand(1, 3, 3, 56, 70)
    expected = model(images)["depth"]
    apply_lite3r(model, DENSE, fuse=False)
    assert f"depth_head: {WORDS}" in describe(model).rewritten
    assert isinstance(model.depth_head._forward_impl, FewViews)
    torch.testing.assert_close(model(images)["depth"], expected, rtol=1e-5, atol=1e-5)
    with lite3r_disabled(model):
        assert torch.equal(model(images)["depth"], expected)
    remove_lite3r(model)
    assert "_forward_impl" not in vars(model.depth_head)
    assert torch.equal(model(images)["depth"], expected)


def with_points(model: Any) -> None:
    model.point_head = make("points")
    model.point_head.projects = copy.deepcopy(model.depth_head.projects)
    model.point_head.norm = copy.deepcopy(model.depth_head.norm)
    model.point_head.intermediate_layer_idx = [1, 2, 3, 4]


def started(model: Any, run: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[int], list[int]]:
    """What `run` gives, the layers that heads started from, and those that were alive when the first head ran."""
    layers: list[int] = []
    alive: dict[int, Any] = {}
    own, head = FewViews.start, FewViews.rewritten
    left: list[list[int]] = []

    def start(method: FewViews, layer: int, tokens: Tensor, *about: int) -> Tensor | None:
        alive[layer] = weakref.ref(tokens)
        found = own(method, layer, tokens, *about)
        layers.extend([layer] if found is not None else [])
        return found

    def rewritten(method: FewViews, *args: Any) -> Any:
        left.append([layer for layer, reference in alive.items() if reference() is not None])
        return head(method, *args)

    with monkeypatch.context() as patch:
        patch.setattr(FewViews, "start", start)
        patch.setattr(FewViews, "rewritten", rewritten)
        found = run()
    return found, sorted(layers), left[0] if left else []


@pytest.mark.parametrize(
    ("batch", "views", "prepare", "expected_layers"),
    [  # the last layer is read by the camera head, too
        (2, 1, None, [0, 1, 3]), (2, 3, None, [0, 1, 3]), (2, heads.STARTING + 1, None, [0, 1, 3]),
        (1, 3, with_points, [0, 1, 1, 2, 3, 3]),
    ],
    ids=["one view", "some views", "more than start at once", "two heads"],
)  # fmt: skip
@torch.no_grad()
def test_heads_start_from_layers_that_are_not_kept(
    batch: int, views: int, prepare: Callable[[Any], None] | None, expected_layers: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = small_vggt()
    if prepare is not None:
        prepare(model)
    images = torch.rand(batch, views, 3, 56, 70)
    expected = model(images)
    apply_lite3r(model, DENSE)
    found, layers, alive = started(model, lambda: model(images), monkeypatch)
    assert layers == expected_layers
    assert alive == []
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_heads_that_were_taken_out_or_exchanged_since(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = small_vggt()
    with_points(model)
    images = torch.rand(1, 3, 3, 56, 70)
    expected = model(images)
    apply_lite3r(model, DENSE)
    taken, model.point_head = model.point_head, None
    found, layers, _ = started(model, lambda: model(images), monkeypatch)
    assert layers == [0, 1, 3]
    torch.testing.assert_close(found["depth"], expected["depth"], rtol=1e-5, atol=1e-5)
    model.point_head = make("points")
    model.point_head.projects, model.point_head.norm = taken.projects, taken.norm
    model.point_head.intermediate_layer_idx = [1, 2, 3, 4]
    _, layers, _ = started(model, lambda: model(images), monkeypatch)
    assert layers == [0]


@torch.no_grad()
def test_heads_start_without_data() -> None:
    model: Any = small_vggt()
    apply_lite3r(model.to("meta"), DENSE)
    assert model(torch.rand(1, 3, 3, 56, 70, device="meta"))["depth"].shape == (1, 3, 56, 70, 1)


def watched(model: Any, images: Tensor) -> Any:
    model.camera_head.register_forward_pre_hook(lambda module, args: None)
    return model(images)


def watched_inside(model: Any, images: Tensor) -> Any:
    model.depth_head.norm.register_forward_hook(lambda module, args, output: None)
    return model(images)


def under_autocast(model: Any, images: Tensor) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        return model(images)


def training(model: Any, images: Tensor) -> Any:
    with torch.enable_grad():
        return model(images)


def test_heads_start_where_gradients_are_recorded_of_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = small_vggt().requires_grad_(False)
    apply_lite3r(model, DENSE)
    _, layers, _ = started(model, lambda: model(torch.rand(1, 2, 3, 56, 70)), monkeypatch)
    assert layers == [0, 1, 3]


class NoHead(nn.Module):
    """Has a method of the name of theirs, as ResNets of torchvision do."""

    def _forward_impl(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
@pytest.mark.parametrize("make_other", [NoHead, lambda: torch.jit.script(nn.ReLU())], ids=["no head", "scripted"])
@torch.no_grad()
def test_heads_start_beside_other_modules(make_other: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = small_vggt()
    model.other = make_other()
    apply_lite3r(model, DENSE)
    _, layers, _ = started(model, lambda: model(torch.rand(1, 2, 3, 56, 70)), monkeypatch)
    assert layers == [0, 1, 3]


def training_the_last_blocks(model: Any, images: Tensor) -> Any:
    """The first layers have no gradients, and the last ones do."""
    model.requires_grad_(False)
    model.aggregator.frame_blocks[2:].requires_grad_(True)
    return training(model, images)


def training_the_heads(model: Any, images: Tensor) -> Any:
    """No layer has gradients, and the heads do."""
    model.aggregator.forward = torch.no_grad()(model.aggregator.forward)
    found = training(model, images)
    assert found["depth"].requires_grad
    return found


def with_a_compiled_head(model: Any, images: Tensor) -> Any:
    model.depth_head.compile(backend="eager")
    return model(images)


class Around(RewrittenMethod):
    """Lies on the forward of a head, and may give it other layers than it is given, such as those of all processes."""

    def rewritten(self, layers: Any, *args: Any, **kwargs: Any) -> Any:
        return self.run_host([exchanged(layer, Tensor.clone) for layer in layers], *args, **kwargs)


def given_other_layers(model: Any, images: Tensor) -> Any:
    model.depth_head.forward = Around(model.depth_head, "forward")
    return model(images)


def elsewhere(model: Any, images: Tensor) -> Any:
    """Weights that come when the head is called."""
    head, own = model.depth_head, model.depth_head.forward
    weights = {name: parameter.data for name, parameter in head.named_parameters()}
    head.to("meta")

    def forward(*args: Any, **kwargs: Any) -> Any:
        for name, weight in weights.items():
            owner, _, last = name.rpartition(".")
            setattr(head.get_submodule(owner), last, nn.Parameter(weight))
        return own(*args, **kwargs)

    head.forward = forward
    return model(images)


def with_points_to_track(model: Any, images: Tensor) -> Any:
    return model(images, torch.zeros(1, 1, 2))


CANNOT = [
    watched, watched_inside, under_autocast, training, training_the_last_blocks, training_the_heads, with_a_compiled_head,
    given_other_layers, elsewhere, with_points_to_track,
]  # fmt: skip


@pytest.mark.parametrize("run", CANNOT)
@torch.no_grad()
def test_layers_are_kept_where_heads_cannot_start(run: Callable[[Any, Tensor], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, other, images = small_vggt(), small_vggt(), torch.rand(1, 3, 3, 56, 70)
    other.load_state_dict(model.state_dict())
    expected = run(other, images)
    apply_lite3r(model, DENSE)
    found, layers, _ = started(model, lambda: run(model, images), monkeypatch)
    assert layers == []
    tolerance = 5e-2 if run is under_autocast else 1e-5
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def forked(model: Any, forward: Callable[..., Any]) -> None:
    members: dict[str, Any] = {"forward": forward}
    model.__class__ = type("Fork", (type(model),), members)


class Moved:
    """Layers that are counted from another one on."""

    def __init__(self, layers: Any) -> None:
        self.layers = layers

    def __getitem__(self, i: int) -> Any:
        return self.layers[i + 1]


def moves_layers(model: Any, images: Tensor) -> Any:
    layers, special = model.aggregator(images)
    return model.depth_head(Moved(layers), images, special)


def gives_layers(model: Any, images: Tensor) -> Any:
    layers, special = model.aggregator(images)
    return model.depth_head(layers, images, special), {"layers": layers}


def holds_layers(model: Any, images: Tensor) -> Any:
    model.layers, special = model.aggregator(images)
    return model.depth_head(model.layers, images, special)


def calls_a_head_twice(model: Any, images: Tensor) -> Any:
    layers, special = model.aggregator(images)
    return model.depth_head(layers, images, special), model.depth_head(layers, images, special, frames_chunk_size=1)


FORKS: list[tuple[Any, list[int], list[int]]] = [
    (moves_layers, [0, 1, 2, 3], []),
    (gives_layers, [0, 1, 3, 4], []),
    (holds_layers, [0, 1, 3, 4], []),
    (calls_a_head_twice, [0, 1, 3, 4], [0, 1, 3]),
    (calls_a_head_twice, [3, 1, 0, 4], [0, 1, 3]),
    (calls_a_head_twice, [0, -5, 3, 4], []),
]


@pytest.mark.parametrize(("forward", "indices", "starting"), FORKS)
@torch.no_grad()
def test_forks_that_do_something_else_with_layers(
    forward: Callable[..., Any], indices: list[int], starting: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = small_vggt()
    forked(model, forward)
    model.depth_head.intermediate_layer_idx = indices
    images = torch.rand(1, 3, 3, 56, 70)
    expected = model(images), list(getattr(model, "layers", ()))
    apply_lite3r(model, DENSE)
    found, layers, _ = started(model, lambda: model(images), monkeypatch)
    assert layers == starting
    torch.testing.assert_close((found, list(getattr(model, "layers", ()))), expected, rtol=1e-5, atol=1e-5)


def moves_layers_of_many_views(model: Any, images: Tensor) -> Any:
    layers, special = model.aggregator(images)
    return model.depth_head(Moved(layers) if images.shape[1] > 2 else layers, images, special)


@torch.no_grad()
def test_a_head_takes_no_start_from_another_layer() -> None:
    model: Any = small_vggt()
    forked(model, moves_layers_of_many_views)
    model.depth_head.intermediate_layer_idx = [0, 1, 2, 3]
    apply_lite3r(model, DENSE)
    model(torch.rand(1, 2, 3, 56, 70))
    with pytest.raises(AdapterError, match="layer 1 was not kept"):
        model(torch.rand(1, 3, 3, 56, 70))


class Heads(nn.Module):
    """The heads in a module of their own."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.camera_head, self.depth_head = model.camera_head, model.depth_head

    def forward(self, layers: Any, images: Tensor, special: int) -> tuple[Any, ...]:
        """Poses and depths."""
        return self.camera_head(layers), *self.depth_head(layers, images, special)


class Inside(nn.Module):
    """A VGGT with its heads in a module of their own."""

    def __init__(self) -> None:
        super().__init__()
        model: Any = small_vggt()
        self.aggregator, self.heads = model.aggregator, Heads(model)

    def forward(self, images: Tensor) -> tuple[Any, ...]:
        """Poses and depths."""
        layers, special = self.aggregator(images)
        return self.heads(layers, images, special)


def as_it_is(model: Inside) -> None:
    pass


def with_a_reader(model: Inside) -> None:
    model.heads.camera_head.register_forward_hook(lambda module, args, poses: [*poses, args[0][1]])


def compiled_around(model: Inside) -> None:
    model.heads.compile(backend="eager")


@pytest.mark.parametrize(("change", "starting"), [(as_it_is, [0, 1, 3]), (with_a_reader, []), (compiled_around, [0, 1, 3])])
@torch.no_grad()
def test_heads_further_inside(change: Callable[[Inside], None], starting: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model = Inside().eval()
    other, images = copy.deepcopy(model), torch.rand(1, 3, 3, 56, 70)
    change(other)
    expected = other(images)
    apply_lite3r(model, DENSE)
    change(model)
    found, layers, _ = started(model, lambda: model(images), monkeypatch)
    assert layers == starting
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_accelerate_moves_what_modules_are_given() -> None:
    model: Any = small_vggt()
    images = torch.rand(1, 3, 3, 56, 70)
    expected = model(images)
    apply_lite3r(model, DENSE)
    accelerate.cpu_offload(model.camera_head, execution_device=torch.device("cpu"))
    torch.testing.assert_close(model(images), expected, rtol=1e-5, atol=1e-5)


class Plain(nn.Module):
    """Runs a head without the autocast of its device."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", enabled=False):
            return self.head(*args, **kwargs)


@pytest.mark.parametrize("told", [True, False])
@torch.no_grad()
def test_heads_whose_autocast_is_off_start_without_it(told: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = small_vggt()
    model.depth_head = Plain(model.depth_head)
    images = torch.rand(1, 3, 3, 56, 70)
    apply_lite3r(model, DENSE)
    assert model.forward.plain_on == {"cuda"}  # as the published code has it
    model.forward.plain_on = frozenset({"cpu"} if told else ())
    with torch.autocast("cpu", torch.bfloat16):
        found, layers, _ = started(model, lambda: model(images), monkeypatch)
        with monkeypatch.context() as patch:
            patch.setattr(FewViews, "start", lambda *_: None)
            expected = model(images)
    assert layers == ([0, 1, 3] if told else [])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("off", [True, False])
def test_whether_a_model_switches_autocast_off_is_seen(off: bool) -> None:
    model: Any = small_vggt()
    if not off:
        own = type(model).forward
        body = inspect.getsource(own).replace("torch.cuda.amp.autocast(enabled=False)", "torch.no_grad()")
        scope: dict[str, Any] = {}
        exec(textwrap.dedent(body), own.__globals__, scope)
        model.__class__ = type("Fork", (type(model),), {"forward": scope["forward"]})
    apply_lite3r(model, DENSE)
    assert model.forward.plain_on == ({"cuda"} if off else set())
    assert not torch.is_autocast_enabled("cuda")


@torch.no_grad()
def test_who_reads_a_layer_that_heads_started_from_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = small_vggt()
    apply_lite3r(model, DENSE)
    own = model.camera_head.forward
    monkeypatch.setattr(model.camera_head, "forward", lambda layers: own([layers[1][:, :, :]]))
    with pytest.raises(AdapterError, match=r"layer 1 was not kept, since only heads that start.*exact_rewrites=False"):
        model(torch.rand(1, 2, 3, 56, 70))


@pytest.mark.parametrize(("views", "size"), [(2, 1), (9, 1), (17, 8), (43, 8)])
@torch.no_grad()
def test_planning_leaves_out_chunks_that_are_like_others(views: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = small_vggt().requires_grad_(False)
    with_points(model)
    apply_lite3r(model, max_memory="1GB", fuse=False)
    planner, images = model.forward, torch.rand(1, views, 3, 28, 28)
    planner.plan((images,), {})
    chunks: list[int] = []
    own = FewViews._coarse
    monkeypatch.setattr(FewViews, "_coarse", lambda self, levels, *size: chunks.append(len(levels[0])) or own(self, levels, *size))
    found = planner._imagined(((images,), {}), Chunks(heads=size)).peak
    assert len(chunks) <= 2 * 5
    chunks.clear()
    with in_chunks(model, planner.places, Chunks(heads=size)), traced(model) as trace:
        model(images)
    assert sum(chunks) == 2 * views
    assert found == trace.peak


def test_the_trial_sees_several_views_at_once_and_a_chunk() -> None:
    trial = few_views("head").trial
    assert trial is not None
    calls = trial(make()).inputs
    assert calls[0][1].shape[1] > heads.VIEWS
    assert calls[1][1].shape[0] > 1
    assert calls[1][3:] == (1, heads.VIEWS + 1)
    assert len(head_call(make())) == 3


def test_a_head_without_what_its_method_calls_is_refused() -> None:
    class Head(nn.Module):
        def _forward_impl(self) -> None: ...

    with pytest.raises(AdapterError, match="there is no custom_interpolate where its class is"):
        FewViews(Head())
