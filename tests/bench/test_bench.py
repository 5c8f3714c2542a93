"""The benchmark runner on tiny models on the CPU."""

from __future__ import annotations

import contextlib
import functools
import gc
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from real_models import small_vggt
from rich.console import Console
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from lite3r_plugin.apply.lookup import lite3r_modules
from lite3r_plugin.bench import VARIANTS, Bench, BenchModel
from lite3r_plugin.bench.table import table
from lite3r_plugin.bench.variants import Observed, observe, prepare
from lite3r_plugin.errors import ConfigError, InputError, NoSitesError
from lite3r_plugin.fp8.linear import Fp8Linear
from lite3r_plugin.runtime.compile import CompiledBlocks
from lite3r_plugin.runtime.memory import MemoryPlan, MemoryPlanner
from lite3r_plugin.testbed import Testbed, TestbedConfig

OPTIONS = {"keep_ratio": 0.2, "dense_below": 0, "pin": "special", "block_q": 16, "block_k": 16}
EMULATED = {**OPTIONS, "fp8_backend": "emulated"}


def test_a_model_without_exact_rewrites_has_no_strong_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lite3r_plugin.runtime.rewrites.find_rewrites", lambda model: None)
    report = Bench(BenchModel("small", small_testbed), [1], ["strong"], resolution=56, device="cpu").run()
    assert report.cells[0].status == "error"
    assert f"{NoSitesError.__name__}: asked for, and left out: weights in BF16" in report.cells[0].error


def test_a_row_is_a_line_that_a_user_types() -> None:
    lines = {name: variant.line({"keep_ratio": 0.1}) for name, variant in VARIANTS.items()}
    assert lines["stock"] is None
    assert lines["lite3r"] == "apply_lite3r(model, keep_ratio=0.1)"
    assert lines["lite3r-fp8"] == "apply_lite3r(model, keep_ratio=0.1, preset='fast', precision='fp8')"
    assert lines["strong-exact"] == "apply_lite3r(model, keep_ratio=1.0, linear_branch='none', preset='fast')"


def test_stock_runs_first_whatever_the_order() -> None:
    report = Bench(
        BenchModel("small", small_testbed), [1], ["lite3r", "stock"], resolution=56, options=OPTIONS, device="cpu", repeats=1
    ).run()
    assert [cell.variant for cell in report.cells] == ["stock", "lite3r"]
    assert report.find("lite3r", 1).fidelity["depth_rel_l2"] >= 0


@pytest.mark.parametrize("filled", [False, True])
def test_linear_branches_are_as_the_line_leaves_them_unless_they_are_to_be_filled(filled: bool) -> None:
    """Zero takes no time of a GPU: a report says which was measured."""
    found: list[bool] = []

    def run(module: nn.Module, images: torch.Tensor) -> Any:
        found.append(any(bool(site.proj_lin.weight.any()) for site in lite3r_modules(module).values() if site.sparse))
        return module(images)

    model = BenchModel("small", small_testbed, run=run)
    report = Bench(model, [1], ["lite3r"], resolution=56, options=OPTIONS, device="cpu", repeats=1, fill_branch=filled).run()
    assert report.cells[0].status == "ok", report.cells[0].error
    assert set(found) == {filled}
    assert report.conditions["linear_branch"].startswith("filled" if filled else "zero")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.mktemp("bench") / "report.json"
    lines: list[str] = []
    bench = Bench(
        BenchModel("small-vggt", small_vggt), [2, 1], resolution=112, options=EMULATED, device="cpu", compile=False, repeats=2, path=path,
        commit="abc", log=lines.append,
    )  # fmt: skip
    return bench.run(), json.loads(path.read_text()), lines


def test_report_covers_all_cells(run) -> None:
    report, stored, lines = run
    assert [(c["variant"], c["views"]) for c in stored["cells"]] == [(name, views) for name in VARIANTS for views in (1, 2)]
    assert {cell["status"] for cell in stored["cells"]} == {"ok"}, [cell["error"] for cell in stored["cells"]]
    assert len(lines) == len(stored["cells"])
    assert stored["version"] == 1
    assert stored == json.loads(json.dumps(report.to_dict()))
    for key in ("date", "device", "torch", "triton", "commit", "resolution", "lite3r_options", "seed"):
        assert key in stored["conditions"]
    assert stored["conditions"]["commit"] == "abc"


def test_cells_say_how_they_were_measured(run) -> None:
    report, _, _ = run
    for cell in report.cells:
        assert cell.finite
        assert cell.winner.min_ms <= cell.winner.median_ms <= cell.winner.max_ms
        assert cell.candidates["eager"].runs >= 2
        variant = VARIANTS[cell.variant]
        assert set(cell.weight_bytes) >= {"bfloat16" if variant.strong else "float32"}
        assert cell.compute_dtypes["depth_head"] == ["bfloat16"]  # on the CPU under autocast, which VGGT ends on GPUs only
        assert bool(cell.rewrites) == variant.lite3r
        if variant.strong:
            assert cell.output_dtypes["depth"] == "float32"
            everywhere = cell.variant == "strong"
            assert (cell.compute_dtypes["camera_head"] == ["bfloat16"]) == everywhere
            assert cell.line.startswith("apply_lite3r(model, ")
            assert "compile_blocks=False" in cell.line
            notes = cell.candidates["eager"].notes
            # Hooks keep FP8 from being fused, and convolutions where the host has them.
            assert notes["difference_to_eager"]["depth_rel_l2"] < (1e-2 if variant.fp8 else 1e-3)
            assert any("CUDA graphs are for CUDA devices" in line for line in notes["whole_model"])


def test_lite3r_cells_count_sites_and_density(run) -> None:
    report, _, _ = run
    for variant in ("lite3r", "lite3r-strong", "lite3r-fp8"):
        cell = report.find(variant, 2)
        assert cell.sites["sparse"] == 5
        # 138 tokens: 9 blocks; 10 special tokens pin 1; of the other 8, a fifth is 2.
        assert cell.density == pytest.approx((9 + 8 * 3) / 81)
        assert cell.config["keep_ratio"] == 0.2
        assert 0 < cell.fidelity["depth_rel_l2"] < 1
        assert "pose_enc_max_abs" in cell.fidelity
    assert report.find("stock", 2).fidelity == {}
    assert report.find("strong", 2).density == 1


def test_fp8_cells_say_what_runs_the_linears_and_hold_no_second_copy(run) -> None:
    report, _, _ = run
    for variant, full in (("strong-fp8", "strong-exact"), ("lite3r-fp8", "lite3r-strong")):
        cell, other = report.find(variant, 2), report.find(full, 2)
        assert cell.linears == {"in FP8 (emulated)": 18, "in full precision": 22}  # two lists of five blocks
        weights = 6 * 11 * 64**2  # of qkv and the MLP of the inner blocks
        assert cell.weight_bytes["float8_e4m3fn"] == weights
        assert cell.weight_bytes["bfloat16"] == other.weight_bytes["bfloat16"] - 2 * weights
        assert "bfloat16" in cell.compute_dtypes["aggregator"]
        assert 0 < cell.fidelity["depth_rel_l2"] < 1
        assert cell.config["precision"] == "fp8"
    assert report.find("strong-fp8", 2).sites == {"sparse": 0, "dense": 10, "disabled": 0}
    assert report.find("strong-fp8", 2).density == 1
    assert report.find("strong-fp8", 2).config["linear_branch"] == "none"
    assert report.find("strong", 2).linears == {"in full precision": 40}
    assert report.find("lite3r", 2).linears == {"in full precision": 40}


def small_testbed() -> nn.Module:
    return Testbed(TestbedConfig(dim=64, head_dim=32, depth=2, stem=8))


@pytest.mark.parametrize("name", ["strong-fp8", "lite3r-fp8"])
@torch.no_grad()
def test_fp8_variants_free_the_weights_that_they_replace(name: str) -> None:
    module = small_testbed().eval()
    before = {name: StorageWeakRef(p.untyped_storage()) for name, p in module.named_parameters()}
    with pytest.warns(UserWarning, match="keep_originals=False"):
        prepare(module, VARIANTS[name], EMULATED | {"keep_originals": False})
    gc.collect()
    replaced = {f"{fqn}.weight" for fqn, m in module.named_modules() if isinstance(m, Fp8Linear)}
    assert len(replaced) == 16
    assert {name for name, storage in before.items() if storage.expired()} >= replaced


def test_without_fp8_products_its_rows_say_why() -> None:
    report = Bench(BenchModel("small", small_testbed), [2], ["stock", "lite3r-fp8"], resolution=56, options=OPTIONS, device="cpu").run()
    assert [cell.status for cell in report.cells] == ["ok", "skipped"]
    assert "no FP8 matrix products: the model is on cpu" in report.cells[1].error
    table(report)


@pytest.mark.parametrize("name", ["strong-fp8", "lite3r-fp8"])
def test_fp8_variants_compile(name: str) -> None:
    """Blocks whose attention is sparse stay eager: rows in FP8 cannot cross the break of the graph there."""
    bench = Bench(BenchModel("small-vggt", small_vggt), [2], ["stock", name], resolution=112, options=EMULATED, device="cpu", repeats=1)
    cell = bench.run().cells[1]
    assert cell.best == "compiled", cell.candidates
    assert cell.winner.notes["difference_to_eager"]["depth_rel_l2"] < 1e-2
    assert cell.winner.prepare_s > cell.winner.median_ms / 1e3


@pytest.mark.slow
def test_nothing_is_compiled_for_the_forward_that_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its hooks would be another case of every block, of which a compiler takes so many."""
    watching, compiled = [False], []

    @contextlib.contextmanager
    def watched(module: nn.Module) -> Iterator[Observed]:
        with observe(module) as observed:
            watching[0] = True
            yield observed
        watching[0] = False

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        compiled.append(watching[0])
        return graph.forward

    monkeypatch.setattr("lite3r_plugin.bench.runner.observe", watched)
    monkeypatch.setattr("lite3r_plugin.runtime.fast.CompiledBlocks", functools.partial(CompiledBlocks, backend=backend))
    report = Bench(BenchModel("small", small_testbed), [2, 3], ["strong-exact"], resolution=56, device="cpu", repeats=1).run()
    assert [cell.best for cell in report.cells] == ["compiled"] * 2
    assert all(cell.compute_dtypes for cell in report.cells)
    assert compiled
    assert not any(compiled)


def test_the_forward_that_is_watched_is_not_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    """With hooks a model may hold what it else would not, more than is allowed."""
    hooked: list[bool] = []
    plan = MemoryPlanner.plan

    def seen(self: MemoryPlanner, *given: Any) -> MemoryPlan:
        hooked.append(any(isinstance(module, nn.Linear) and module._forward_hooks for module in self.module.modules()))
        return plan(self, *given)

    monkeypatch.setattr(MemoryPlanner, "plan", seen)
    options = {"max_memory": "1GB", "preset": "small"}
    report = Bench(BenchModel("small", small_testbed), [2], ["lite3r"], resolution=56, options=options, device="cpu", repeats=1).run()
    assert report.cells[0].status == "ok", report.cells[0].error
    assert report.cells[0].compute_dtypes
    assert hooked
    assert not any(hooked)


def test_table_has_both_ratios(run) -> None:
    report, _, _ = run
    assert report.speedup(report.find("stock", 2), "stock") == 1
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table(report))
    text = console.export_text()
    assert "x strong" in text
    assert "lite3r-strong" in text


class Fragile(nn.Module):
    """Runs out of memory from 3 views on."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if images.shape[1] >= 3:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate everything")
        return images.mean((-1, -2))


def test_out_of_memory_is_a_result(tmp_path: Path) -> None:
    bench = Bench(BenchModel("fragile", Fragile), [1, 3, 4], ["stock", "lite3r"], resolution=16, device="cpu", path=tmp_path / "r.json")
    report = bench.run()
    assert [cell.status for cell in report.cells] == ["ok", "oom", "oom", "error", "error", "error"]
    assert "everything" in report.cells[1].error
    assert "UnknownModelError" in report.cells[3].error
    assert json.loads((tmp_path / "r.json").read_text())["cells"][1]["status"] == "oom"
    table(report)


def test_time_budget_skips_cells() -> None:
    report = Bench(BenchModel("fragile", Fragile), [1, 2], ["stock"], resolution=16, device="cpu", time_budget=0).run()
    assert [cell.status for cell in report.cells] == ["skipped", "skipped"]


@pytest.mark.parametrize(
    "wrong", [{"views": []}, {"views": [0]}, {"variants": ["fast"]}, {"options": {"keep_rate": 0.2}}, {"options": {"keep_ratio": 2}}]
)
def test_wrong_arguments_raise(wrong) -> None:
    with pytest.raises((InputError, ConfigError)):
        Bench(**({"model": BenchModel("fragile", Fragile), "views": [1]} | wrong))


@pytest.mark.gpu
def test_strong_variants_are_captured_on_the_gpu() -> None:
    """The forward with the exact rewrites does not wait for the GPU, with Lite3R and without."""
    variants = ["stock", "strong", "strong-exact", "strong-fp8", "lite3r-strong", "lite3r-fp8"]
    model = BenchModel("small-vggt", small_vggt)
    bench = Bench(model, [2], variants, resolution=112, options=OPTIONS, compile=False, device="cuda")
    for cell in bench.run().cells[1:]:
        assert cell.best == "graph", cell.candidates
        assert cell.winner.peak_bytes > 0
