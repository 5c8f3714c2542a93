"""The scripts in benchmarks/ run, on a CPU at small sizes, and can tell right from wrong."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SMALL = ["--device", "cpu", "--heads", "2", "--head-dim", "32", "--dtype", "float32", "--keep-ratio", "0.2"]


@pytest.fixture(autouse=True)
def _scripts() -> Iterator[None]:
    folders = [str(BENCHMARKS), str(BENCHMARKS / "operators"), str(BENCHMARKS / "training")]
    sys.path[:0] = folders
    yield
    for folder in folders:
        sys.path.remove(folder)


def test_the_bench_of_attention(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import bench_attention

    path = tmp_path / "records.json"
    records = bench_attention.main([*SMALL, "--tokens", "300,500", "--methods", "dense,ours,sla,saf3r", "--json", str(path)])
    assert json.loads(path.read_text())["records"] == records
    found = {(r["tokens"], r["method"]): r for r in records}
    for tokens in (300, 500):
        ours = found[tokens, "ours"]
        assert ours["forward_ms"] > 0
        assert ours["training_forward_ms"] > 0
        assert ours["backward_ms"] > 0
        assert found[tokens, "ours, Proj learns"]["backward_ms"] > 0
        assert "not importable" in found[tokens, "sla"]["reason"]  # the peers are no part of the test environment
        assert "not importable" in found[tokens, "saf3r"]["reason"]
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith(("300 |", "500 |")) for line in lines) == len(records)


def test_forward_and_backward_passes_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the events of a GPU that is not there, where every call takes as long as its number."""
    import roofline

    def intervals(call: Any, count: int, device: torch.device) -> list[float]:
        found = []
        for _ in range(count):
            call()
            found.append(float(len(made)))
        return found

    made: list[int] = []
    used: list[int] = []
    monkeypatch.setattr(roofline, "_intervals", intervals)

    def step() -> int:
        made.append(len(made))
        return made[-1]

    first, second = roofline.in_turn_ms(step, used.append, torch.device("cuda"), budget_ms=1)
    assert first == second  # the one of the same step
    assert made == used == [0, 1, 2, 3]


def test_no_method_is_begun_after_the_time_budget() -> None:
    import bench_attention

    records = bench_attention.main([*SMALL, "--tokens", "300", "--methods", "dense,ours", "--time-budget", "0"])
    assert {r["reason"] for r in records} == {"the time budget is used up"}


def test_flex_attention_gets_our_blocks() -> None:
    """Its mask as pairs of tokens: the kept blocks, nothing else."""
    import contestants
    from torch.nn.attention.flex_attention import BlockMask

    p = contestants.make_problem(1000, 2, 32, 0.2, torch.device("cpu"), torch.float32)
    made: list[BlockMask] = []
    original = BlockMask.from_kv_blocks
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BlockMask, "from_kv_blocks", lambda *args, **kwargs: made.append(original(*args, **kwargs)) or made[0])
        next(contestants.flex(p))
    blocks = made[0].to_dense().bool()
    expected = torch.zeros_like(blocks).scatter(-1, p.indices.long(), True)
    assert torch.equal(blocks, expected)
    assert blocks.shape[-2:] == (8, 16)


def test_a_roofline_in_numbers() -> None:
    from roofline import Peaks, Work

    peaks, work = Peaks(flops=1e15, exps=4e12, bytes=2e12), Work(flops=1e12, exps=8e9, bytes=1e9)
    assert peaks.least_ms(work) == {"matmul": pytest.approx(1.0), "exp": pytest.approx(2.0), "memory": pytest.approx(0.5)}
    assert peaks.bound(work, ms=4.0, eager_ms=4.1) == "exp 50%"
    assert peaks.bound(work, ms=4.0, eager_ms=8.0) == "exp 50%, launches"


def test_sparse_work_is_its_share_of_dense_work() -> None:
    import contestants

    p = contestants.make_problem(64 * 40, 2, 32, 0.25, torch.device("cpu"), torch.float32)
    forward, _ = contestants.sparse_work(p, means=False, linear=False, whole=False)
    assert forward.flops == pytest.approx(0.25 * next(contestants.dense(p)).forward.flops)
    assert forward.exps == pytest.approx(0.25 * next(contestants.dense(p)).forward.exps)


@pytest.mark.parametrize("fault", [None, "wrong order", "wrong branch"])
def test_the_check_at_scale_finds_faults(monkeypatch: pytest.MonkeyPatch, fault: str | None) -> None:
    import check_scale

    run = check_scale.sparse_linear_attention

    def faulty(*args: Any, **options: Any) -> torch.Tensor:
        if fault == "wrong order":
            return run(*args, **options).roll(1, -2)
        return run(*args, **options | dict(linear="all"))

    if fault is not None:
        monkeypatch.setattr(check_scale, "sparse_linear_attention", faulty)
    assert check_scale.main([*SMALL, "--views", "2"]) == (0 if fault is None else 1)


def test_the_check_at_scale_finds_bad_choices() -> None:
    import check_scale

    q_mean, k_mean = torch.randn(8), torch.randn(30, 8)
    scores = k_mean @ q_mean
    best = scores[2:].topk(5).indices + 2
    pinned = torch.arange(2)
    assert check_scale.wrong_choices(q_mean, k_mean, torch.cat((pinned, best)), 2) == 0
    worst = torch.cat((pinned, best[:-1], scores[2:].argmin()[None] + 2))
    assert check_scale.wrong_choices(q_mean, k_mean, worst, 2) == 1


@pytest.fixture
def _small_testbed() -> Iterator[None]:
    """A plugin with one small model, as if there were exact rewrites for it."""
    from lite3r_plugin import hookimpl
    from lite3r_plugin.adapter.plugins import find_model, get_manager
    from lite3r_plugin.testbed import Testbed, TestbedConfig

    entry = find_model("testbed")
    small = dataclasses.replace(entry, name="small", create=lambda: Testbed(TestbedConfig(dim=128, head_dim=32, depth=2, stem=8)))
    plugin = SimpleNamespace(lite3r_models=hookimpl(lambda: {"small": small}), lite3r_exact_rewrites=hookimpl(lambda model: []))
    get_manager().register(plugin, name="small")
    yield
    get_manager().unregister(name="small")


@pytest.mark.usefixtures("_small_testbed")
def test_memory_in_fp8(tmp_path: Path) -> None:
    import memory_fp8

    path = tmp_path / "memory.json"
    assert memory_fp8.main(["--model", "small", "--views", "2,3", "--resolution", "64", "--json", str(path)]) == 1
    stored = json.loads(path.read_text())
    fp8, full = stored["lite3r-fp8"], stored["lite3r-strong"]
    linears = 2 * 2 * 8 * 128**2  # its MLPs are twice as wide; so small that scales and norms count
    assert fp8["linear_weights_in_bf16"] == 2 * linears
    assert fp8["weights"]["float8_e4m3fn"] == linears
    branches = 2 * 4 * 32**2  # in FP32, whatever the host is in
    assert fp8["linear_weights"] == linears + fp8["weights"]["float32"] - branches
    assert sum(full["weights"].values()) - fp8["held"] == full["blocks"] - fp8["blocks"]
    assert fp8["loaded_differs_by"] == 0
    assert stored["wrong"] == [f"the blocks take {fp8['blocks'] / full['blocks']:.4f} of BF16, more than 0.52"]


def test_faults_of_memory_are_named() -> None:
    import memory_fp8

    fine: dict[str, Any] = dict(
        blocks_ratio=0.51, loading_peak=101, held=100, forward_peak={2: 7}, forward_peak_by_describe={2: 7}, loaded_differs_by=0.0
    )
    assert memory_fp8.wrong({"lite3r-fp8": fine}) == []
    for change in (
        dict(blocks_ratio=0.53),
        dict(loading_peak=106),
        dict(forward_peak_by_describe={2: 8}),
        dict(loaded_differs_by=float("nan")),
    ):
        assert len(memory_fp8.wrong({"lite3r-fp8": fine | change})) == 1


def test_what_training_wins_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import distillation
    import readme_table

    path = tmp_path / "rows.json"
    command = ["distillation.py", "--small", "--scenes", "3", "--pool", "2", "--calibration", "2", "--views", "4", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", [*command, "--rows", "applied"])
    distillation.main()
    monkeypatch.setattr(sys, "argv", [*command, "--rows", "applied", "best-fp8"])
    distillation.main()  # goes on after the first row

    done = json.loads(path.read_text())["rows"]
    assert [row["row"]["name"] for row in done.values()] == ["applied", "best-fp8"]
    assert "2 steps" in done["best-fp8 0.25 {}"]["distillation"]
    assert capsys.readouterr().err.count("applied 0.25 {}, 4 views") == 1
    lines = readme_table.distillation(json.loads(path.read_text())).splitlines()
    assert lines[4].startswith("| calibrated, distilled: `proj+lora`, rank 32, FP8 | 4 |")
