"""The scripts in benchmarks/ run, on a CPU at small sizes, and can tell right from wrong."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections import Counter
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
    folders = [str(BENCHMARKS / folder) for folder in ("", "operators", "training", "models")]
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


def test_the_bench_of_heads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import bench_heads

    path, small = tmp_path / "heads.json", ["--device", "cpu", "--dtype", "float32", "--patches", "2"]
    records = bench_heads.main([*small, "--views", "1,2", "--out", str(path)])
    assert json.loads(path.read_text())["records"] == records
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()][1:] == records
    for views in (1, 2):
        *single, head = [record for record in records if record["views"] == views]
        assert {record["kind"] for record in single} == {"upsample", "bias", "embedding", "upsample+embedding"}
        for name in ("torch", "ours"):
            assert head[f"{name}_ms"] == pytest.approx(sum(r["times"] * r[f"{name}_us"] for r in single) / 1e3)
        assert head["left_out"] == 0
    (late,) = bench_heads.main([*small, "--views", "1", "--time-budget", "0"])
    assert late["left_out"] == len(bench_heads.passes())


def test_the_bench_of_heads_times_what_a_head_does(monkeypatch: pytest.MonkeyPatch) -> None:
    import bench_heads
    import torch.nn.functional as F
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.overrides import TorchFunctionMode

    module = pytest.importorskip("vggt.heads.dpt_head")
    seen, embed = Counter[tuple[str, int, int, int]](), module.DPTHead._apply_pos_embed

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if func in (F.conv2d, F.conv_transpose2d) and args[2] is not None:
                seen["bias", out.shape[1], out.shape[2], 0] += 1
            if func is F.interpolate:
                seen["upsample", out.shape[1], args[0].shape[2], out.shape[2]] += 1
            return out

    def watched(self: Any, x: torch.Tensor, *args: Any) -> torch.Tensor:
        seen["embedding", x.shape[1], x.shape[2], 0] += 1
        return embed(self, x, *args)

    monkeypatch.setattr(module.DPTHead, "_apply_pos_embed", watched)
    with FakeTensorMode(), torch.no_grad(), Watch():
        module.DPTHead(2048, output_dim=2)([torch.zeros(1, 1, 1370, 2048)] * 24, torch.zeros(1, 1, 3, 518, 518), 1)
    timed = Counter[tuple[str, int, int, int]]()
    for work in bench_heads.passes():
        for kind in work.kind.split("+"):
            size, to = (work.to, 0) if kind == "embedding" and work.to else (work.size, work.to)
            timed[kind, work.channels, size, to] += work.times
    assert timed == seen


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
    small = dataclasses.replace(entry, name="small", create=lambda: Testbed(TestbedConfig(dim=128, head_dim=32, depth=4, stem=8)))
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
    linears = 2 * 4 * 8 * 128**2  # its MLPs are twice as wide; so small that scales and norms count
    assert fp8["linear_weights_in_bf16"] == 2 * linears
    assert fp8["weights"]["float8_e4m3fn"] == linears
    branches = 4 * 4 * 32**2  # in FP32, whatever the host is in
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


@pytest.mark.slow
def test_what_training_wins_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import distillation
    import readme_table

    few = ["--small", "--scenes", "3", "--selection", "2", "--pool", "2", "--calibration", "2", "--views", "4", "--size", "32"]
    command = ["--folder", str(tmp_path), *few, "--keep-ratio", "0.125", "--tried", "rank 32"]
    assert distillation.main([*command, "--fp8-rows", "applied", "--minutes", "0"]) == 0
    assert "left: ['render training 0'" in capsys.readouterr().err  # nothing would have been over in time
    with pytest.raises(SystemExit, match="pass --resume"):
        distillation.main(command)
    with pytest.raises(SystemExit, match=r"other conditions: \['scenes'\]"):
        distillation.main([*command, "--scenes", "4", "--resume"])
    assert distillation.main([*command, "--fp8-rows", "applied", "lora-no-qat", "--resume"]) == 0
    capsys.readouterr()
    best = [*command, "--fp8-rows", "best", "--resume"]
    with monkeypatch.context() as patch:
        patch.setattr(distillation, "MARGIN_SECONDS", 1e9)  # there is no time for more than a step
        assert distillation.main(best) == 1
    assert "row best 0.125 goes on in the next command: distilled proj+lora, 51,200" in capsys.readouterr().err
    assert distillation.main(best) == 0
    assert "going on from step 1" in capsys.readouterr().err
    assert distillation.main(best) == 0
    assert "left: nothing; best: rank 32" in capsys.readouterr().err

    report = json.loads((tmp_path / "keep0.125.json").read_text())
    rows = {key: row["row"] for key, row in report["rows"].items()}
    assert list(rows) == ["applied 0.125", "lora-no-qat 0.125", "best 0.125"]
    assert "2 steps" in report["rows"]["best 0.125"]["distillation"]
    assert (rows["best 0.125"]["precision"], rows["best 0.125"]["rounds"], rows["best 0.125"]["recipe"]) == ("fp8", True, "rank 32")
    assert json.loads((tmp_path / "search.json").read_text())["rows"]["rank 32"]["score"] < 100
    lines = readme_table.distillation(report).splitlines()
    assert lines[3].startswith("| applied | 4 |")
    assert lines[4].startswith("| calibrated, distilled: `proj+lora`, FP8 only afterwards | 4 |")
    assert lines[5].startswith("| ratios by site, calibrated, distilled: `proj+lora`, rank 32, FP8 | 4 |")
    assert distillation.main([*command, "--fp8-rows", "applied", "--resume"]) == 0  # nothing is done twice
    assert "row applied" not in capsys.readouterr().err


@pytest.mark.slow
def test_processes_share_the_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import distillation

    few = ["--small", "--scenes", "3", "--selection", "2", "--pool", "2", "--calibration", "2", "--views", "4", "--size", "32"]
    command = ["--folder", str(tmp_path), *few, "--keep-ratio", "0.25", "--tried", "rank 32", "--processes", "2"]
    assert distillation.main([*command, "--rows", "applied", "calibrated"]) == 0
    assert "broken off: nothing; left: nothing" in capsys.readouterr().err
    assert list(json.loads((tmp_path / "keep0.25.json").read_text())["rows"]) == ["applied 0.25", "calibrated 0.25"]


def test_jobs_wait_for_what_they_need(tmp_path: Path) -> None:
    import distillation
    from rendered import part_file

    args = distillation.parse(["--folder", str(tmp_path), "--search", "1", "--long", "8", "--tried", "rank 32", "blocks"])
    plan = distillation.Plan(args)

    def done(*kinds: str) -> None:
        for job in [job for stage in plan.stages() for job in stage if job.kind in kinds]:
            if job.kind == "render":
                part_file(tmp_path, job.what["kind"], job.what["part"]).touch()
            elif job.kind == "calibrate":
                distillation.calibrated(args, **job.what).mkdir()
            plan.store(job.key, {"score": 1.0 + (job.key == "search rank 32")} if job.kind == "search" else {})

    first = distillation.next_job(plan, [], 3600)
    assert first is not None
    assert first.kind == "render"
    rendering = [job.key for job in plan.stages()[0]]
    assert distillation.next_job(plan, rendering, 3600) is None  # others are at it
    done("render", "calibrate", "dense")
    jobs: list[str] = []
    while (job := distillation.next_job(plan, jobs, 200)) is not None:
        jobs.append(job.key)
    assert jobs[:2] == ["search rank 32", "search blocks"]
    assert "row applied 0.25" in jobs
    assert not any("best" in key for key in jobs)  # nobody knows it yet
    assert plan.best() is None
    done("search")
    assert plan.best() == "blocks"
    assert distillation.next_job(plan, [], 200).key == "row best 0.25"  # of which a part may be done
    assert distillation.next_job(plan, [], 100).key == "row applied 0.25"
    assert distillation.next_job(plan, [], 1) is None


def test_scenes_are_measured_as_one_by_one(tmp_path: Path) -> None:
    from rendered import MEASURES, Renderer, Scenes, judge, measure

    from lite3r_plugin.testbed import Testbed, TestbedConfig

    cpu = torch.device("cpu")
    renderer = Renderer(tmp_path, 4, 32, cpu)
    renderer.render("held_out", 0, 3)
    before = (tmp_path / "held_out-000.safetensors").read_bytes()
    renderer.render("selection", 0, 3)
    renderer.render("held_out", 0, 3)
    assert (tmp_path / "held_out-000.safetensors").read_bytes() == before
    assert (tmp_path / "selection-000.safetensors").read_bytes() != before
    scenes = Scenes(tmp_path, "held_out", 3)
    model = Testbed(TestbedConfig(dim=32, depth=1, head_dim=16, stem=8)).eval()
    found = measure(model, scenes, 2, 2, 4, cpu, 2)
    for number in range(3):
        values = []
        for offset in (0, 1):
            rgb, depth, pose, ok = (scenes.parts[name][number, offset::2] for name in ("rgb", "depth", "w2c", "ok"))
            with torch.no_grad():
                out = model(rgb[None].float() / 255)
            values.append(judge(out["depth"][0], out["world_to_camera"][0], depth, pose, ok))
        expected = torch.tensor(values, dtype=torch.float64).nanmean(0)
        torch.testing.assert_close(torch.tensor([found[name][number] for name in MEASURES], dtype=torch.float64), expected, equal_nan=True)
    sample = next(scenes.samples(0, 8, [2], True, cpu))
    assert sample.inputs["images"].shape == (3, 2, 3, 32, 32)
    assert sample.labels is not None
    assert sample.labels.depth is not None
    assert sample.labels.depth.isnan().sum() == (sample.labels.depth.nan_to_num() == 0).sum()


@pytest.mark.slow
def test_what_a_step_and_calibration_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import step

    path = tmp_path / "step.json"
    small = [
        "--model",
        "testbed",
        "--views",
        "2",
        "--size",
        "16",
        "--device",
        "cpu",
        "--repeats",
        "1",
        "--warm-up",
        "1",
        "--calibrate",
        "2x2",
    ]
    monkeypatch.setattr(sys, "argv", ["step.py", *small, "--json", str(path)])
    step.main()
    rows = json.loads(path.read_text())["rows"]
    assert [row["way"] for row in rows] == ["plain", "distill", "calibrate"]
    assert all(row["seconds"] > 0 for row in rows)


@pytest.mark.slow
def test_the_predicted_peak_is_compared_with_what_is_held(tmp_path: Path) -> None:
    import memory_plan

    path = tmp_path / "r.json"
    options = [
        "--model",
        "testbed",
        "--views",
        "2",
        "--resolution",
        "32",
        "--max-memory",
        "1MB,1GB",
        "--variants",
        "default",
        "--device",
        "cpu",
    ]
    refused, ran = memory_plan.main([*options, "--json", str(path)])
    assert refused["refused"]
    assert ran["error_percent"] == 0
    assert json.loads(path.read_text())["rows"] == [refused, ran]


@pytest.mark.slow
def test_pairs_run_in_turns_and_are_judged(tmp_path: Path) -> None:
    import never_slower

    path = tmp_path / "r.json"
    options = ["--model", "testbed", "--views", "1,2", "--keep", "0.3", "--resolution", "16", "--runs", "3", "--device", "cpu"]
    report = never_slower.main([*options, "--config", "compile_blocks=false", "--json", str(path)])
    assert json.loads(path.read_text()) == json.loads(json.dumps(report))
    assert [(row["pair"], row["views"], row["against"]) for row in report["rows"]] == [
        (pair, views, against) for pair, against in (("default", "stock"), ("preset", "strong")) for views in (1, 2)
    ]
    for row in report["rows"]:
        assert row["ratio_min"] <= row["ratio"] <= row["ratio_max"]
        assert row["ok"] == (row["ratio"] <= 1.03)
        assert (row["ran"], row["ran_against"]) == ("eager", "eager")
        assert row["linear_branch"].startswith("zero")
    emulated = ["--config", 'fp8_backend="emulated"', "--config", "compile_blocks=false"]
    filled = never_slower.main([*options, *emulated, "--pairs", "branch", "--views", "1"])["rows"]
    assert [(row["linear_branch"].partition(" ")[0], row["allowed"], row["ok"]) for row in filled] == [("filled", None, True)]
    assert report["rows"][0]["line"] == "apply_lite3r(model, compile_blocks=False, keep_ratio=0.3)"
    assert report["rows"][0]["line_against"] is None


@pytest.mark.slow
def test_a_pair_of_which_one_did_not_run_compiled_that_was_to_is_not_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    import never_slower

    from lite3r_plugin.adapter.plugins import find_model
    from lite3r_plugin.apply.lookup import lite3r_modules
    from lite3r_plugin.apply.swap import fast_of
    from lite3r_plugin.bench.models import BenchModel, make_images

    monkeypatch.setattr(never_slower, "ALLOWED", {"gpu": 1e9})
    model, device, options = BenchModel.of(find_model("testbed")), torch.device("cpu"), {"keep_ratio": 0.3, "compile_blocks": False}
    ours, theirs = (never_slower.made(name, model, options, device) for name in never_slower.PAIRS["preset"])
    images = make_images(1, 16, device, seed=0)
    assert never_slower.row("preset", ours, theirs, model, images, 1)["ok"]
    fast = fast_of(next(iter(lite3r_modules(theirs.module).values())).state)
    assert fast is not None
    fast.not_compiled = "blocks of one class are more than 32 cases to the compiler"
    assert not never_slower.row("preset", ours, theirs, model, images, 1)["ok"]


def test_the_two_of_a_pair_run_alternately() -> None:
    import never_slower

    order: list[str] = []
    ours, theirs = never_slower.in_turns(lambda: order.append("ours"), lambda: order.append("theirs"), torch.device("cpu"), 3)
    assert order == ["theirs", "ours", "ours", "theirs", "theirs", "ours"]
    assert len(ours) == len(theirs) == 3


def test_the_benchmark_of_many_views(tmp_path: Path) -> None:
    import many_views

    path = tmp_path / "r.json"
    options = ["--model", "testbed", "--views", "1,2", "--height", "16", "--width", "24", "--keep-ratio", "0.3", "--device", "cpu"]
    fields = ["--config", "compile_blocks=false", "--config", 'fp8_backend="emulated"']
    report = many_views.main([*options, *fields, "--json", str(path)])
    assert json.loads(path.read_text()) == json.loads(json.dumps(report))
    assert [(row["views"], len(row["times"])) for row in report["rows"]] == [(1, 2), (2, 2)]
    assert report["fit"] is None  # of a CPU no memory is told
    assert "precision='fp8'" in report["line"]
    once = many_views.main([*options, *fields, "--views", "1", "--repeats", "0"])
    assert [row.keys() & {"first_s", "seconds"} for row in once["rows"]] == [{"first_s"}]
    peaks = [{"views": views, "peak_bytes": 100 + 10 * views} for views in (4, 2)]
    assert many_views.fit([*peaks, {"views": 11, "error": "out of memory"}], 200) == 10
    assert many_views.fit([*peaks, {"views": 9, "error": "out of memory"}], 200) is None


def test_the_benchmark_of_streams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """On the double of StreamVGGT."""
    import streaming
    import streaming_hosts

    monkeypatch.setattr(streaming, "build", lambda device: streaming_hosts.make())
    monkeypatch.setattr(streaming, "begin", lambda model: [None] * len(model.global_blocks))
    monkeypatch.setattr(streaming, "step", lambda model, frame, past, index: model(frame, past))
    path = tmp_path / "records.json"
    small = ["--frames", "6", "--repeats", "2", "--height", "112", "--width", "168", "--device", "cpu", "--dense-below", "0"]
    records = streaming.main([*small, "--json", str(path)])
    assert json.loads(path.read_text())["records"] == records
    host, dense, sparse = records
    assert [record["arm"] for record in records] == ["host", "dense", "sparse"]
    assert host["difference"] == 0
    assert host["ms"] > 0
    assert 0 <= dense["difference"] < 0.02  # BF16
    assert sparse["difference"] != dense["difference"]
    assert (dense["sparse"], dense["dense"], dense["host"]) == (0, 16, 0)
    assert (sparse["sparse"], sparse["dense"], sparse["host"]) == (16, 0, 0)
    assert capsys.readouterr().out.count("ms a frame") == 3


def test_kernels_are_told_by_their_names() -> None:
    """Those of a stored run, and what a compiler has fused, whatever is in its name."""
    import kernels

    stored = json.loads((BENCHMARKS / "results" / "h200_kernels_vggt.json").read_text())
    for row in stored["rows"]:
        assert {kernel["name"]: kernel["kind"] for kernel in row["kernels"]} == {
            k["name"]: kernels.kind_of(k["name"]) for k in row["kernels"]
        }
        assert row["kernels_ms"] == pytest.approx(sum(row["kinds"].values()))
    assert kernels.kind_of("triton_poi_fused_convolution_relu_3") == "fused by the compiler"
    assert kernels.by_kind({"_rows_kernel": (2, 1.0), "_scale_kernel": (1, 0.5), "memcpy": (1, 2.0)}) == {
        "copies": 2.0,
        "passes around FP8": 1.5,
    }
