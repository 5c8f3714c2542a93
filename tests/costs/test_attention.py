"""When sparse attention pays: whole-number arithmetic, agreement with stored measurements, unknown GPUs."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch

from lite3r_plugin import Lite3RConfig
from lite3r_plugin.costs import attention as runtime
from lite3r_plugin.costs.attention import CPU, H100, AttentionCosts, break_even, costs_of, fit

GPU = torch.device("cuda", 0)
SHARES = runtime.shares_of(Lite3RConfig(keep_ratio=0.1, block_means=False), "site")
SLOW = AttentionCosts(dense=3e-8, slowdown=2.0, per_token=1e-5, per_call=0.2)
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def modelled(costs: AttentionCosts, tokens: int, share: float | None) -> float:
    """Milliseconds of attention by the docstring's formula; dense without a share."""
    if share is None:
        return costs.dense * tokens**2
    return costs.slowdown * share * costs.dense * tokens**2 + costs.per_token * tokens + costs.per_call


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An unknown GPU, whose measurement is `SLOW`; returns the cache folder."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA X100/PCIe")
    monkeypatch.setattr(runtime, "_found", {})
    monkeypatch.setattr(runtime, "_file", lambda name: tmp_path / "costs.json")
    monkeypatch.setattr(runtime, "measure", lambda device: SLOW)
    return tmp_path


@pytest.mark.parametrize("costs", [H100, CPU, SLOW])
@pytest.mark.parametrize(("keep_ratio", "mean_share"), [(0.1, 1 / 64), (0.3, 0.0)])
@pytest.mark.parametrize("width", [1024, 384])
def test_the_whole_numbers_say_what_the_formula_says(costs: AttentionCosts, keep_ratio: float, mean_share: float, width: int) -> None:
    rule, compared = runtime._break_even(costs, keep_ratio, mean_share), set()
    for batch in (1, 7):
        for tokens in (500, 1374, 2748, 5496, 10992, 43968, 1_374_000):
            for pinned in (0, tokens // 20, tokens // 2, tokens):
                critical = 1 - (1 - keep_ratio) * (1 - pinned / tokens) ** 2
                share = critical + (1 - critical) * mean_share
                work = batch * width / 1024
                dense, sparse = work * modelled(costs, tokens, None), work * modelled(costs, tokens, share)
                sparse += costs.per_call * (1 - work)  # launches do not follow the size
                if abs(dense - sparse) > 0.01 * dense:
                    assert rule.pays(batch * width, tokens, pinned) == (sparse < dense)
                    compared.add(sparse < dense)
    assert compared == {True, False}


def test_an_h100_is_judged_as_it_was_measured() -> None:
    decided = set()
    report = json.loads((RESULTS / "h100_operator_keep0.1.json").read_text())
    width = report["conditions"]["heads"] * report["conditions"]["head_dim"]
    eager = {(r["tokens"], r["method"]): r["forward_ms"] for r in report["records"] if "forward_ms" in r}
    for tokens in {tokens for tokens, _ in eager}:
        pays = eager[tokens, "ours"] < eager[tokens, "SDPA cuDNN"]
        assert runtime._break_even(H100, 0.1, 1 / 64).pays(width, tokens, 0) == pays, tokens
        decided.add(pays)
    assert decided == {True, False}


@pytest.mark.parametrize("costs", [H100, SLOW])
def test_the_fit_finds_the_costs(costs: AttentionCosts) -> None:
    times = [modelled(costs, *at) for at in ((runtime.LONG, None), (runtime.LONG, 0.1), (runtime.LONG, 0.5), (runtime.SHORT, 0.1))]
    found = fit(*times)
    assert vars(found) == pytest.approx(vars(costs))


@pytest.mark.parametrize("name", ["NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "NVIDIA GH200 480GB", "NVIDIA H200"])
def test_known_gpus_are_not_measured(gpu: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert costs_of(GPU) is H100
    assert list(gpu.iterdir()) == []


def test_an_unknown_gpu_is_measured_once_and_says_so(gpu: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    assert costs_of(GPU) == SLOW
    assert "measures once when sparse attention pays on NVIDIA X100/PCIe" in caplog.text
    assert [path.name for path in gpu.iterdir()] == ["costs.json"]
    caplog.clear()
    monkeypatch.setattr(runtime, "measure", lambda device: pytest.fail("measured twice"))
    assert costs_of(GPU) == SLOW
    monkeypatch.setattr(runtime, "_found", {})  # another process
    assert costs_of(GPU) == SLOW
    assert caplog.text == ""


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"versions": 0, "costs": {}}'])
def test_damaged_or_old_measurements_are_repeated(gpu: Path, text: str) -> None:
    (gpu / "costs.json").write_text(text)
    assert costs_of(GPU) == SLOW
    assert json.loads((gpu / "costs.json").read_text())["costs"] == vars(SLOW)


def test_nothing_is_measured_while_a_graph_is_made(gpu: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(runtime, "measure", lambda device: pytest.fail("measured inside a graph"))
    assert break_even(GPU, SHARES, may_measure=False) == runtime._break_even(H100, 0.1, 0.0)
    assert "NVIDIA X100/PCIe was never measured" in caplog.text
    assert "Run the model once before that, or set Lite3RConfig.dense_below" in caplog.text
    monkeypatch.setattr(runtime, "measure", lambda device: SLOW)
    assert break_even(GPU, SHARES, may_measure=True) == runtime._break_even(SLOW, 0.1, 0.0)
    assert break_even(GPU, SHARES, may_measure=False) == runtime._break_even(SLOW, 0.1, 0.0)


def test_a_cache_that_cannot_be_written_is_no_error(gpu: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(runtime, "_file", lambda name: gpu / "no folder" / "costs.json")
    assert costs_of(GPU) == SLOW
    assert "cannot be kept" in caplog.text


def test_the_cache_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "cached_assets_path", lambda library_name, namespace: tmp_path / library_name / namespace)
    assert runtime._file("NVIDIA A/B") == tmp_path / "lite3r-plugin" / "attention_costs" / "NVIDIA A-B.json"


def test_messages_go_to_the_packages_logger() -> None:
    assert runtime.logger is logging.getLogger("lite3r_plugin.costs.attention")


@pytest.mark.gpu
def test_a_measurement_is_plausible() -> None:
    found = runtime.measure(GPU)
    assert 1e-9 < found.dense < 1e-6
    assert 0.5 < found.slowdown < 5
    assert found.per_call < 5
