"""Recorded forwards: what is replayed is what was called, of whatever inputs, weights and thread."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import threading
import warnings
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from recording import Tape
from torch import Tensor, nn

from lite3r_plugin.ops.dispatch import SlowPathWarning
from lite3r_plugin.runtime.device import peak, release_memory
from lite3r_plugin.runtime.graphs import LONGEST_S, CudaGraphs, Graphs, capture, warm_up


class Model(nn.Module):
    """Counts how often its Python runs."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        self.ran = 0

    def forward(self, x: Tensor, scale: float = 1.0, **more: Any) -> dict[str, Any]:
        self.ran += 1
        return {"y": self.inner(x) * scale, "x": x, "scale": scale}


def recorded(most: int = 2) -> tuple[Model, Graphs, Tape]:
    graphs = Graphs(most, Tape)
    return Model().eval(), graphs, graphs._recorder  # pyright: ignore[reportReturnType]


def call(model: nn.Module, graphs: Graphs, *args: Any, **kwargs: Any) -> Any:
    with torch.no_grad():
        return graphs.call(model, model, (), args, kwargs)


def expected(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    with torch.no_grad():
        return model(*args, **kwargs)


def test_a_layout_is_recorded_once_and_its_inputs_are_read_anew() -> None:
    model, graphs, tape = recorded()
    for size in (2, 3, 2, 3):
        x = torch.rand(size, 4)
        assert torch.equal(call(model, graphs, x)["y"], expected(model, x)["y"])
    assert (tape.recorded, len(graphs), graphs.replays) == (2, 2, 4)


def test_outputs_belong_to_the_caller() -> None:
    model, graphs, _ = recorded()
    x = torch.rand(2, 4)
    first = call(model, graphs, x)
    kept = first["y"].clone()
    second = call(model, graphs, torch.rand(2, 4))
    assert torch.equal(first["y"], kept)
    assert first["y"].data_ptr() != second["y"].data_ptr()
    assert first["x"] is x  # as the model gives it back
    assert second["scale"] == 1.0


@dataclasses.dataclass
class Outputs:
    depth: Tensor
    more: list[Tensor]


class Odd(nn.Module):
    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x: Tensor) -> Any:
        return self.answer(x)


def test_outputs_keep_their_classes() -> None:
    x = torch.rand(2, 4)
    answers = {
        "dataclass": lambda x: Outputs(x + 1, [x * 2]),
        "ordered": lambda x: OrderedDict(a=x + 1),
        "tuple": lambda x: (x + 1, None),
        "one": torch.nn.functional.relu,
    }
    for kind, answer in answers.items():
        found = call(Odd(answer).eval(), Graphs(4, Tape), x)
        assert type(found) is type(answer(x)), kind
    made = call(Odd(answers["dataclass"]).eval(), Graphs(1, Tape), x)
    assert torch.equal(made.more[0], x * 2)


def test_the_same_output_twice_is_one_tensor() -> None:
    def twice(x: Tensor) -> list[Tensor]:
        y = x + 1
        return [y, y]

    a, b = call(Odd(twice).eval(), Graphs(1, Tape), torch.rand(2, 4))
    assert a is b


@pytest.mark.parametrize(
    "change",
    [
        lambda args, kwargs: ((args[0].double(),), kwargs),
        lambda args, kwargs: ((args[0].mT.contiguous().mT,), kwargs),
        lambda args, kwargs: (args, {"scale": 2.0}),
        lambda args, kwargs: (args, {"scale": 1}),
        lambda args, kwargs: (args, {"mode": "b"}),
        lambda args, kwargs: (args, {"sizes": [3, (4,)]}),
    ],
)
def test_what_chooses_kernels_tells_layouts_apart(change: Any) -> None:
    model, graphs, tape = recorded(9)
    args, kwargs = (torch.rand(4, 4),), {"mode": "a", "sizes": [2, (4,)], "scale": 1.0}
    run = lambda x, scale=1.0, **more: {"y": x * scale}  # noqa: E731
    with torch.no_grad():
        graphs.call(model, run, (), args, kwargs)
        graphs.call(model, run, (), args, dict(kwargs))
        assert tape.recorded == 1
        args, other = change(args, kwargs)
        graphs.call(model, run, (), args, {**kwargs, **other})
    assert tape.recorded == 2


def test_settings_of_torch_tell_layouts_apart() -> None:
    model, graphs, tape = recorded(9)
    x = torch.rand(2, 4)
    call(model, graphs, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert call(model, graphs, x)["y"].dtype == expected(model, x)["y"].dtype
    with torch.inference_mode():
        graphs.call(model, model, (), (x,), {})
    assert tape.recorded == 3


def test_those_used_last_are_kept_and_new_ones_wait() -> None:
    model, graphs, tape = recorded(2)
    for size in (1, 2, 1):
        call(model, graphs, torch.rand(size, 4))
    before = model.ran
    call(model, graphs, torch.rand(3, 4))
    assert (len(graphs), tape.recorded, model.ran) == (2, 2, before + 1)  # it may never come again
    call(model, graphs, torch.rand(3, 4))
    assert (len(graphs), tape.recorded) == (2, 3)
    before = model.ran
    call(model, graphs, torch.rand(1, 4))  # which was used after 2
    assert model.ran == before
    for _ in range(2):
        call(model, graphs, torch.rand(2, 4))
    assert tape.recorded == 4


def test_values_written_into_weights_are_seen() -> None:
    model, graphs, tape = recorded()
    x = torch.rand(2, 4)
    call(model, graphs, x)
    model.load_state_dict({name: torch.rand_like(value) for name, value in model.state_dict().items()})
    assert torch.equal(call(model, graphs, x)["y"], expected(model, x)["y"])
    assert (tape.recorded, graphs.forgotten) == (1, 0)


def other_memory(model: Model) -> None:
    model.inner[0].weight.data = torch.rand(4, 4)


def other_parameter(model: Model) -> None:
    model.inner[0].weight = nn.Parameter(torch.rand(4, 4))


def other_module(model: Model) -> None:
    model.inner[0] = nn.Linear(4, 4)


def more_modules(model: Model) -> None:
    model.inner.append(nn.Linear(4, 4))


def no_bias(model: Model) -> None:
    model.inner[0].bias = None


def assigned(model: Model) -> None:
    model.load_state_dict({name: torch.rand_like(value) for name, value in model.state_dict().items()}, assign=True)


@pytest.mark.parametrize("change", [other_memory, other_parameter, other_module, more_modules, no_bias, assigned])
def test_a_model_that_changed_is_recorded_anew(change: Any) -> None:
    model, graphs, tape = recorded()
    x = torch.rand(2, 4)
    call(model, graphs, x)
    change(model)
    assert torch.equal(call(model, graphs, x)["y"], expected(model, x)["y"])
    assert (tape.recorded, graphs.forgotten, tape.released) == (2, 1, 1)


def test_hooks_run_and_their_calls_are_said_once() -> None:
    model, graphs, tape = recorded()
    x, seen = torch.rand(2, 4), []
    call(model, graphs, x)
    handle = model.inner[0].register_forward_hook(lambda *args: seen.append(1))
    with pytest.warns(SlowPathWarning, match=r"inner\.0 has forward hooks"):
        call(model, graphs, x)
    call(model, graphs, x)  # does not warn again
    assert len(seen) == 2
    assert graphs.passed == {"inner.0 has forward hooks, which would not run": 2}
    handle.remove()
    call(model, graphs, x)
    assert tape.recorded == 2


def test_an_exchanged_forward_runs() -> None:
    model, graphs, _ = recorded()
    model.inner[0].forward = lambda x: x
    with pytest.warns(SlowPathWarning, match=r"the forward of inner\.0 was exchanged by somebody else"):
        call(model, graphs, torch.rand(2, 4))


def test_what_waits_for_values_runs_as_before() -> None:
    model, graphs = Odd(lambda x: x * x.sum().item()).eval(), Graphs(2, Tape)
    x = torch.rand(2, 4)
    with pytest.warns(SlowPathWarning, match=r"no CUDA graph, so every kernel is launched by itself: .*\(at test_graphs.py:\d+\)"):
        assert torch.equal(call(model, graphs, x), expected(model, x))
    assert torch.equal(call(model, graphs, x + 1), expected(model, x + 1))
    assert len(graphs) == 0


def test_arguments_and_outputs_without_a_layout_are_refused() -> None:
    model, graphs, _ = recorded()
    with pytest.warns(SlowPathWarning, match="an argument is a object, <object object at .*>, by which recordings cannot be told apart"):
        call(model, graphs, torch.rand(2, 4), thing=object())
    odd = Odd(lambda x: type("Box", (), {"x": x})()).eval()
    with pytest.warns(SlowPathWarning, match="the model returns a Box, in which tensors cannot be told from the rest"):
        call(odd, Graphs(1, Tape), torch.rand(2, 4))
    with pytest.warns(SlowPathWarning, match="the arguments are on no device"):
        graphs.call(model, lambda: 1, (), (), {})


def test_long_forwards_are_not_recorded() -> None:
    model, graphs, tape = recorded()
    tape.waits = 2 * LONGEST_S
    for runs in (1, 2):
        x = torch.rand(2, 4)
        found = call(model, graphs, x)
        assert torch.equal(found["y"], model.inner(x))
        assert found["x"] is x
        assert model.ran == runs  # what was run to see how long it takes, serves
    assert (len(graphs), tape.warmed) == (0, 1)
    assert graphs.passed == {"one forward takes 1 s, so launches do not matter": 1}


def test_an_error_of_the_model_is_its_own() -> None:
    model, graphs, _ = recorded()
    with pytest.raises(RuntimeError, match="shapes"):
        call(model, graphs, torch.rand(2, 5))
    assert torch.equal(call(model, graphs, torch.ones(2, 4))["y"], expected(model, torch.ones(2, 4))["y"])


def test_threads_take_turns() -> None:
    model, graphs, tape = recorded(4)
    inputs = [torch.full((1 + i % 2, 4), float(i)) for i in range(16)]
    wanted = [expected(model, x)["y"] for x in inputs]
    start = threading.Barrier(4)

    def work(index: int) -> list[Tensor]:
        start.wait()
        return [call(model, graphs, x)["y"] for x in inputs[index::4]]

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(work, range(4)))
    for index, outputs in enumerate(found):
        assert all(torch.equal(a, b) for a, b in zip(outputs, wanted[index::4], strict=True))
    assert (tape.recorded, tape.most_inside) == (2, 1)


def test_copies_start_empty() -> None:
    model, graphs, _ = recorded()
    call(model, graphs, torch.rand(2, 4))
    for copied in (copy.deepcopy(graphs), pickle.loads(pickle.dumps(graphs))):
        assert len(copied) == 0
        assert copied.most == 2


def test_the_cpu_is_no_reason_to_warn() -> None:
    model, graphs = Model().eval(), Graphs(2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(model, graphs, torch.rand(2, 4))
    assert list(graphs.passed) == ["the inputs are on cpu, and CUDA graphs are for CUDA devices"]


# On a GPU


@pytest.mark.gpu
@torch.no_grad()
def test_a_replay_reads_the_inputs_anew() -> None:
    device = torch.device("cuda")
    linear, x = torch.nn.Linear(64, 64, device=device), torch.randn(8, 64, device=device)
    warm_up(lambda: linear(x).relu(), device)
    graph, out = capture(lambda: linear(x).relu(), device)
    assert peak(device)[0] > 0
    x.copy_(torch.randn(8, 64, device=device))
    graph.replay()
    assert torch.equal(out, linear(x).relu())


@pytest.mark.gpu
@torch.no_grad()
def test_what_waits_for_the_gpu_cannot_be_captured() -> None:
    device = torch.device("cuda", 0)
    x = torch.ones(8, device=device)
    with pytest.raises(RuntimeError):
        capture(lambda: x * x.sum().item(), device)
    assert torch.randn(8, device=device).isfinite().all()  # what draws random numbers works as before
    release_memory(device)
    before = torch.cuda.memory_reserved(device)
    large = torch.empty(2**28, device=device)  # and memory that is freed goes back
    del large
    release_memory(device)
    assert torch.cuda.memory_reserved(device) <= before


@pytest.mark.gpu
def test_recordings_on_a_gpu_are_exact_from_threads_and_streams() -> None:
    device = torch.device("cuda", 0)
    model, graphs = Model().eval().to(device), Graphs(4, CudaGraphs)
    inputs = [torch.randn(64 * (1 + i % 2), 4, device=device) for i in range(24)]
    wanted = [expected(model, x)["y"] for x in inputs]

    def work(index: int) -> list[Tensor]:
        with torch.cuda.stream(torch.cuda.Stream(device)):
            found = [call(model, graphs, x)["y"] for x in inputs[index::3]]
            torch.cuda.current_stream(device).synchronize()
        return found

    torch.cuda.synchronize()
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(work, range(3)))
    for index, outputs in enumerate(found):
        assert all(torch.equal(a, b) for a, b in zip(outputs, wanted[index::3], strict=True))
    assert len(graphs) == 2
    assert graphs.held_bytes > 0
    graphs.forget()
    assert graphs.held_bytes == 0
    assert torch.equal(call(model, graphs, inputs[0])["y"], wanted[0])


@pytest.mark.gpu
def test_a_forward_that_waits_is_said_with_its_line() -> None:
    graphs, x = Graphs(2), torch.rand(2, 4, device="cuda")
    model = Odd(lambda x: x * x.sum().item()).eval()
    with pytest.warns(SlowPathWarning, match=r"the forward waits for the GPU.*\(at test_graphs.py:\d+\)"):
        assert torch.equal(call(model, graphs, x), expected(model, x))
    other = torch.rand(3, 4, device="cuda")  # of this layout nothing was refused
    assert torch.equal(call(Model().eval().cuda(), graphs, other)["x"], other)  # others are recorded as before
    assert len(graphs) == 1


@pytest.mark.gpu
def test_weights_that_autocast_casts_are_cast_in_each_replay() -> None:
    model, graphs, x = Model().eval().cuda(), Graphs(2), torch.rand(64, 4, device="cuda")
    for _ in range(3):
        with torch.autocast("cuda", torch.bfloat16):
            found = call(model, graphs, x)["y"]
        with torch.no_grad():
            model.inner[0].weight.mul_(1.5)
        torch.cuda.empty_cache()
        with torch.no_grad():
            model.inner[0].weight.div_(1.5)
        with torch.autocast("cuda", torch.bfloat16):
            assert torch.equal(found, expected(model, x)["y"])
    assert len(graphs) == 1
