"""`compile_blocks` of `distill`: the same training, in blocks that a compiler has fused."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from distilling import logged, metrics
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from lite3r_plugin import DistillConfig, apply_lite3r, distill
from lite3r_plugin.errors import ConfigError
from lite3r_plugin.runtime.compile import CompiledBlocks
from lite3r_plugin.testbed import Testbed, TestbedConfig

FIELDS: dict[str, Any] = {"steps": 4, "learning_rate": 1e-3, "warmup_steps": 0, "lora_rank": 4}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """No graphs of other tests, which would count towards the limit."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def student(precision: Any = "full") -> nn.Module:
    torch.manual_seed(0)
    model = Testbed(TestbedConfig(dim=32, depth=2, head_dim=16, stem=8, registers=1)).eval()
    return apply_lite3r(model, keep_ratio=0.15, block_q=16, block_k=16, pin="special", dense_below=0, precision=precision)


def batches() -> list[Tensor]:
    """Of several numbers of scenes and views."""
    generator = torch.Generator().manual_seed(7)
    return [torch.rand(*shape, 3, 32, 48, generator=generator) for shape in ((2, 2), (3, 4), (4, 2), (2, 3))]


def compile_by(monkeypatch: pytest.MonkeyPatch, backend: Any) -> None:
    monkeypatch.setattr("lite3r_plugin.training.objective.CompiledBlocks", partial(CompiledBlocks, backend=backend))


@pytest.mark.parametrize(
    ("precision", "fields"),
    [
        ("full", {}),
        pytest.param("full", {"checkpointing": True}, marks=pytest.mark.slow),
        pytest.param("fp8_qat", {"trainable": "blocks"}, marks=pytest.mark.slow),
    ],
)
def test_learns_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, fields: dict[str, Any]) -> None:
    """Also with batches of other sizes, for which nothing is compiled once more after the second."""
    counter = CompileCounterWithBackend("eager")
    compile_by(monkeypatch, counter)
    compiled: list[int] = []

    def counted() -> Iterator[Tensor]:
        for batch in batches():
            yield batch
            compiled.append(counter.frame_count)

    for name, data in (("eager", iter(batches())), ("compiled", counted())):
        distill(student(precision), data, **logged(tmp_path / name, **FIELDS, **fields, compile_blocks=name == "compiled"))
    assert metrics(tmp_path / "compiled") == pytest.approx(metrics(tmp_path / "eager"), rel=1e-3 if precision == "full" else 2e-2)
    assert 0 < compiled[-1] == counter.frame_count


def test_teacher_and_student_are_both_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The teacher's attention is dense, so its blocks are whole graphs."""
    graphs: list[torch.fx.GraphModule] = []
    with_gradients: set[bool] = set()

    def seen(graph: torch.fx.GraphModule, _: Any) -> torch.fx.GraphModule:
        graphs.append(graph)
        with_gradients.add(torch.is_grad_enabled())
        return graph

    compile_by(monkeypatch, seen)
    distill(student(), batches(), **{**FIELDS, "steps": 1}, compile_blocks=True)
    assert with_gradients == {True, False}  # of the student, and of the teacher
    attend = [graph for graph in graphs if "scaled_dot_product_attention" in graph.code]
    assert {graph.code.count("scaled_dot_product_attention") for graph in attend} == {1}
    assert len(attend) >= 3  # frames of both, views of the teacher


def test_what_cannot_be_compiled_is_said_and_runs_as_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(graph: torch.fx.GraphModule, examples: Any) -> Any:
        raise NotImplementedError("not this one")

    distill(student(), batches(), **logged(tmp_path / "eager", **FIELDS))
    compile_by(monkeypatch, broken)
    said: list[str] = []
    monkeypatch.setattr("lite3r_plugin.training.progress.Progress.warn", lambda self, text: said.append(text))
    distill(student(), batches(), **logged(tmp_path / "broken", **FIELDS, compile_blocks=True))
    assert metrics(tmp_path / "broken") == metrics(tmp_path / "eager")
    assert len(said) == 1
    assert "blocks run as without compile_blocks" in said[0]
    assert "not this one" in said[0]


def test_a_model_without_blocks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("lite3r_plugin.training.progress.Progress.warn", lambda self, text: said.append(text))
    monkeypatch.setattr("lite3r_plugin.runtime.compile.repeated_blocks", lambda module: [])
    distill(student(), batches(), **FIELDS, compile_blocks=True)
    assert said == ["transformer blocks run as without compile_blocks: the model has no list of blocks that are all of one class"]


def test_errors_of_the_model_are_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_by(monkeypatch, "eager")
    model = student()
    model.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(ValueError("of the model")))
    with pytest.raises(ValueError, match="of the model"):
        distill(model, batches(), **FIELDS, compile_blocks=True)


def test_not_block_by_block() -> None:
    with pytest.raises(ConfigError, match="leave compile_blocks out"):
        DistillConfig(mode="local", compile_blocks=True)
