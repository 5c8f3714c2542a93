"""What training wins back, on the testbed: ways to train, each measured against dense on the same scenes, on all GPUs at once.

    python benchmarks/training/distillation.py --folder DIR --minutes 9 --resume       # again and again, until nothing is left
    python benchmarks/training/distillation.py --folder DIR --small                     # on a CPU, to see that it works

Scenes are rendered first, into DIR, once for all processes. Then short runs try the recipes of `recipes.candidates`, judged on scenes for
selection; the best one is trained for longer at each keep ratio; and the rows of `recipes.table` show what each part does. One process a
GPU takes one of them after another. What is done is stored at once, and ``--resume`` goes on after it. With ``--minutes`` nothing is begun
that would not be over in time, but the long runs, which go on where they were. DIR gets ``keep0.25.json`` and so on, and ``search.json``.

Teacher and student are one model; only rows that say so have labels. Scenes for training, selection and measuring are of other seeds and
textures. All rows run the same dense kernel wherever they are dense. Kernels are compiled before a run's time begins.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from queue import Empty
from typing import Any, get_args

import recipes
import torch
from recipes import Row
from rendered import MEASURES, PART, Renderer, Scenes, measure, part_file
from torch import nn

import lite3r_plugin
from lite3r_plugin import (
    DistillConfig,
    Lite3RConfig,
    apply_lite3r,
    calibrate,
    choose_keep_ratios,
    convert,
    distill,
    load_lite3r,
    save_lite3r,
)
from lite3r_plugin.adapter.plugins import find_model
from lite3r_plugin.config import Pin
from lite3r_plugin.files import write_atomically
from lite3r_plugin.peft import merge_lora
from lite3r_plugin.runtime.sdpa import sdpa_backend
from lite3r_plugin.scene.metrics import paired_bootstrap
from lite3r_plugin.testbed import Testbed, TestbedConfig, weights_hash
from lite3r_plugin.training.data import Sample

FP8_BELOW = 0.25  # keep ratios whose best row is in FP8
WARM_UP_STEPS = 6  # each number of views twice
POLL_SECONDS = 0.5
WORST = 1e9
LEAST_SECONDS, MARGIN_SECONDS = 60.0, 10.0  # of a part of a long run; and for what comes after it, but for measuring
DEVICES = "CUDA_VISIBLE_DEVICES"


@dataclasses.dataclass(frozen=True)
class Job:
    """Something that one process does.

    Attributes:
        key: Its name, and that of the file that says that it is done.
        kind: ``"render"``, ``"calibrate"``, ``"dense"``, ``"search"`` or ``"row"``.
        seconds: How long it may take.
        what: Its arguments.
    """

    key: str
    kind: str
    seconds: float
    what: dict[str, Any]


class Plan:
    """Which jobs there are, and what is done, in files of a folder.

    Args:
        args: The options.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.done_folder = args, args.folder / "done"
        self.done_folder.mkdir(parents=True, exist_ok=True)

    def result(self, key: str) -> dict[str, Any] | None:
        """What came of a job, or None where it is not done."""
        path = self._file(key)
        return json.loads(path.read_text()) if path.exists() else None

    def store(self, key: str, result: dict[str, Any]) -> None:
        """Write down that a job is done."""
        write_atomically(self._file(key), json.dumps(result, separators=(",", ":")))

    def stages(self) -> list[list[Job]]:
        """The jobs; each stage needs those before it. Of the last one there is nothing before the best recipe is known."""
        args = self.args
        counts = {"training": args.pool, "selection": args.selection, "held_out": args.scenes}
        render = [
            Job(f"render {kind} {part}", "render", 45, {"kind": kind, "part": part, "count": min(PART, count - PART * part)})
            for kind, count in counts.items() for part in range(-(-count // PART))
        ]  # fmt: skip
        dense = [
            Job(f"dense {kind}", "dense", args.measuring, {"kind": kind}) for kind in ("held_out", *(() if args.recipe else ("selection",)))
        ]
        search, rows = [], self._rows()
        if not args.recipe:
            every = recipes.candidates(args.search, _precision(args.search_keep))
            tried = {name: every[name] for name in args.tried}
            training = 60 * args.search + args.overhead
            search = [self._row(f"search {name}", row, args.search_keep, "selection", training) for name, row in tried.items()]
        starts = {(job.what["keep"], job.what["row"].start): job.what["row"] for job in search + rows if job.what["row"].calibrated}
        fits = [
            Job(f"calibrate {keep} {start}", "calibrate", 40, {"keep": keep, "row": row})
            for (keep, start), row in sorted(starts.items(), key=lambda item: item[0], reverse=True)
        ]  # fmt: skip
        stages = [render, fits + dense, search, rows]
        return [[job for job in stage if not self._is_done(job)] for stage in stages]

    def best(self) -> str | None:
        """The recipe that is trained for longer, or None where it is not known yet."""
        if self.args.recipe:
            return self.args.recipe
        found = {name: self.result(f"search {name}") for name in self.args.tried}
        scores = {name: result["score"] for name, result in found.items() if result is not None}
        return min(scores, key=scores.__getitem__) if len(scores) == len(found) else None

    def _rows(self) -> list[Job]:
        """Those of the tables: the best ones first, since they take longest."""
        args, wanted = self.args, []
        if (best := self.best()) is not None:
            recipe = recipes.candidates(1, "full")[best]
            for keep in args.keep_ratio:
                row = recipes.longer(recipe, "best", args.long, _precision(keep))
                if "best" in (args.fp8_rows if keep < FP8_BELOW else args.rows):
                    wanted.append(self._row(f"row best {keep}", row, keep, "held_out", LEAST_SECONDS + args.measuring + args.overhead))
        for keep, row in itertools.product(args.keep_ratio, recipes.table(args.short).values()):
            if row.name in (args.fp8_rows if keep < FP8_BELOW else args.rows) and (row.precision == "full" or keep < FP8_BELOW):
                training = 60 * args.short + args.overhead if row.training else 0
                wanted.append(self._row(f"row {row.name} {keep}", row, keep, "held_out", training + args.measuring))
        return wanted

    def _is_done(self, job: Job) -> bool:
        """What it wrote for others counts too: results may have come to another machine without it."""
        if job.kind == "render":
            return part_file(self.args.folder, job.what["kind"], job.what["part"]).exists()
        return self._file(job.key).exists() and (job.kind != "calibrate" or calibrated(self.args, **job.what).exists())

    def _row(self, key: str, row: Row, keep: float, scenes: str, seconds: float) -> Job:
        return Job(key, "search" if scenes == "selection" else "row", seconds, {"row": row, "keep": keep, "scenes": scenes})

    def _file(self, key: str) -> Path:
        return self.done_folder / (key.replace(" ", "_") + ".json")


class Worker:
    """Does jobs on one device.

    Args:
        args: The options.
        device: The device.
    """

    def __init__(self, args: argparse.Namespace, device: torch.device) -> None:
        self.args, self.device = args, device
        self.renderer = Renderer(args.folder, max(args.views), args.size, device)
        self.warm: set[tuple[Any, ...]] = set()

    def do(self, job: Job) -> dict[str, Any]:
        """What comes of a job."""
        began = time.perf_counter()
        with sdpa_backend(self.args.dense_kernel):
            result = getattr(self, f"_{job.kind}")(**job.what)
        return result | {"seconds": time.perf_counter() - began}

    @functools.cached_property
    def training(self) -> Scenes:
        """On the device."""
        return Scenes(self.args.folder, "training", self.args.pool, self.device)

    @functools.lru_cache(maxsize=2)  # noqa: B019
    def scenes(self, kind: str) -> Scenes:
        """To measure on; in memory of the CPU."""
        return Scenes(self.args.folder, kind, self.args.selection if kind == "selection" else self.args.scenes)

    def _render(self, kind: str, part: int, count: int) -> dict[str, Any]:
        self.renderer.render(kind, part, count)
        return {}

    def _dense(self, kind: str) -> dict[str, Any]:
        return {"views": self._measured(build(self.args, self.device), kind)}

    def _calibrate(self, keep: float, row: Row) -> dict[str, Any]:
        model = self._applied(keep, row)
        samples = self.training.samples(7, 16, [16], False, self.device)
        inputs = [sample.inputs for sample in itertools.islice(samples, self.args.calibration)]
        began = time.perf_counter()
        ratios = None
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            if row.chosen:
                ratios = dict(choose_keep_ratios(model, inputs, mean_keep_ratio=keep))
            calibrate(model, inputs)
        seconds = time.perf_counter() - began
        save_lite3r(model, calibrated(self.args, keep, row))
        return {"calibration_seconds": seconds, "ratios": ratios}

    def _search(self, row: Row, keep: float, scenes: str) -> dict[str, Any]:
        result = self._row(row, keep, scenes)
        worst = [
            max(-measures["auc30"]["difference"], -measures["auc15"]["difference"], measures["abs_rel"]["difference"])
            for measures in result["against_dense"].values()
        ]
        return result | {"score": sum(worst) / len(worst)}

    def _row(self, row: Row, keep: float, scenes: str) -> dict[str, Any]:
        args = self.args
        row = dataclasses.replace(row, views_a_step=args.views_a_step or row.views_a_step)
        model = self._started(row, keep)
        result: dict[str, Any] = {"keep_ratio": keep, "row": dataclasses.asdict(row)}
        if row.training is not None:
            fields = row.training | ({"mixed_precision": "bf16"} if self.device.type == "cuda" else {"compile_blocks": False})
            if args.steps:
                fields = fields | {"steps": args.steps, "minutes": None}
            data = self.training.samples(args.seed, row.views_a_step, args.views, row.labels, self.device)
            if row.name == "best":  # goes on in the next command
                fields = fields | {"output_dir": str(args.folder / f"training-{keep}-{row.recipe}"), "resume": True}
                data = limited(data, args.until)
            self._warm_up(row, keep)
            report = distill(model, data, DistillConfig(**fields))
            if report.stopped == "the data ended":
                return {"unfinished": str(report)}
            told = str(dataclasses.replace(report, output_dir=None))  # which says nothing to others
            result |= {"distillation": told, "peak_bytes": report.peak_bytes}
            if fields["trainable"] == "proj+lora":
                merge_lora(model)
        if row.precision == "fp8":
            convert(model)
        dense = Plan(args).result(f"dense {scenes}")
        assert dense is not None
        result["views"] = self._measured(model.eval(), scenes)
        return result | {"against_dense": against_dense(result, dense)}

    def _warm_up(self, row: Row, keep: float) -> None:
        """Compile what a run needs, lest the first one has less time."""
        assert row.training is not None
        fields = {name: row.training[name] for name in ("trainable", "lora_rank", "compile_blocks") if name in row.training}
        compiled = tuple(fields.items()) if fields.get("compile_blocks") else ()
        if self.device.type == "cuda" and (case := (row.start, *compiled)) not in self.warm:
            data = self.training.samples(1, 96, self.args.views, False, self.device)
            distill(self._started(row, keep), data, DistillConfig(**fields, steps=WARM_UP_STEPS, mixed_precision="bf16"))
            self.warm.add(case)

    def _started(self, row: Row, keep: float) -> nn.Module:
        """What a row trains, or measures as it is."""
        if row.calibrated:
            return load_lite3r(build(self.args, self.device), calibrated(self.args, keep, row))
        return self._applied(keep, row)

    def _applied(self, keep: float, row: Row) -> nn.Module:
        blocks = {"block_q": 32, "block_k": 16} if self.args.small else {}  # of so few tokens blocks of the usual size leave none out
        ways: dict[str, Any] = dict(precision=row.trains_in, fp8_filter=row.fp8_filter, pin=self.args.pin) | blocks
        return apply_lite3r(build(self.args, self.device), keep_ratio="auto" if row.chosen else keep, dense_below=0, **ways)

    def _measured(self, model: nn.Module, kind: str) -> dict[str, dict[str, list[float]]]:
        args = self.args
        options = (args.views_at_once, self.device, args.threads)
        return {str(v): measure(model, self.scenes(kind), v, n, *options) for v, n in zip(args.views, args.subsets, strict=True)}


def calibrated(args: argparse.Namespace, keep: float, row: Row) -> Path:
    """Where the calibrated model lies, from which rows start."""
    return args.folder / f"calibrated-{keep}-{row.start.replace(' ', '-')}"


def build(args: argparse.Namespace, device: torch.device) -> Testbed:
    """The testbed as it comes with the package, or a tiny one with random weights."""
    if args.small:
        torch.manual_seed(0)
        return Testbed(TestbedConfig(dim=64, depth=2, head_dim=32, stem=16)).eval().to(device)
    return find_model("testbed").build(None, device)  # pyright: ignore[reportReturnType]


def limited(data: Iterator[Sample], until: float) -> Iterator[Sample]:
    """`data`, which ends at the time `until`, but not before there was one."""
    for sample in data:
        yield sample
        if time.monotonic() > until:
            return


def against_dense(result: dict[str, Any], dense: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Mean differences with intervals, points for AUC and percent of the dense mean for AbsRel, by number of views."""
    found: dict[str, dict[str, Any]] = {}
    for views, measures in result["views"].items():
        found[views] = {}
        for name in MEASURES:
            base = dense["views"][views][name]
            interval = paired_bootstrap(base, measures[name])
            mean = sum(x for x in base if x == x) / max(1, sum(x == x for x in base))
            unit = 100 / mean if name == "abs_rel" else 1.0
            bounds = {"difference": interval.difference * unit, "low": interval.low * unit, "high": interval.high * unit}
            found[views][name] = bounds | {"dense": mean}
    return found


def attempt(worker: Worker, job: Job) -> tuple[dict[str, Any] | None, str | None]:
    """What comes of a job, or the error."""
    try:
        return worker.do(job), None
    except Exception:
        return None, traceback.format_exc()


def work(args: argparse.Namespace, index: int, jobs: Any, results: Any) -> None:
    """A process of its own: jobs in, results out, until there is None or one failed, after which a GPU may be of no use."""
    worker = Worker(args, torch.device(args.device))
    while (job := jobs.get()) is not None:
        result, error = attempt(worker, job)
        results.put((index, job, result, error))
        if error is not None:
            return


class Processes:
    """Processes that `work`, each on one GPU: the i-th always on the i-th. A context manager.

    Attributes:
        jobs: A queue for each.
        results: Of all.
    """

    def __init__(self, args: argparse.Namespace, count: int) -> None:
        self._args, self._context = args, multiprocessing.get_context("spawn")
        self.results = self._context.Queue()
        self.jobs: list[Any] = [self._context.Queue() for _ in range(count)]
        given = os.environ.get(DEVICES)
        self._devices = given.split(",") if given else [str(i) for i in range(count)]
        self._running: list[Any] = [None] * count

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        for jobs in self.jobs:
            jobs.put(None)
        for process in filter(None, self._running):
            process.join(timeout=5)
            process.terminate()

    def alive(self, index: int) -> bool:
        """Whether a process runs."""
        return self._running[index] is not None and self._running[index].is_alive()

    def wait(self, index: int) -> None:
        """Wait for the end of one that failed."""
        self._running[index].join(timeout=30)
        self._running[index].terminate()

    def start(self, index: int) -> None:
        """Start one, in place of one that is gone."""
        before = os.environ.get(DEVICES)
        os.environ[DEVICES] = self._devices[index % len(self._devices)]
        try:
            self._running[index] = self._context.Process(target=work, args=(self._args, index, self.jobs[index], self.results))
            self._running[index].start()
        finally:
            if before is None:
                del os.environ[DEVICES]
            else:
                os.environ[DEVICES] = before


def carry_out(plan: Plan, processes: int, until: float) -> list[str]:
    """Do what is left, and begin nothing that would not be over at the time `until`. Returns what failed, or is to go on.

    In so many processes; with 0 of them in this one.
    """
    failed: list[str] = []
    if not processes:
        worker = Worker(plan.args, torch.device(plan.args.device))
        while (job := next_job(plan, failed, until - time.monotonic())) is not None:
            finish(plan, job, *attempt(worker, job), failed)
        return failed
    busy: dict[int, Job] = {}
    with Processes(plan.args, processes) as running:
        while True:
            for index in set(range(processes)) - set(busy):
                if (job := next_job(plan, [*failed, *(job.key for job in busy.values())], until - time.monotonic())) is not None:
                    if not running.alive(index):
                        running.start(index)
                    busy[index] = job
                    running.jobs[index].put(job)
            if not busy:
                return failed
            try:
                index, job, result, error = running.results.get(timeout=POLL_SECONDS)
            except Empty:
                for lost in [index for index in busy if not running.alive(index)]:
                    finish(plan, busy.pop(lost), None, f"process {lost} died", failed)
                continue
            del busy[index]
            finish(plan, job, result, error, failed)
            if error is not None:
                running.wait(index)


def finish(plan: Plan, job: Job, result: dict[str, Any] | None, error: str | None, failed: list[str]) -> None:
    """Store what came of a job, and say it."""
    if result is not None and "unfinished" in result:
        failed.append(job.key)
        say(f"{job.key} goes on in the next command: {result['unfinished']}")
        return
    if result is not None:
        plan.store(job.key, result)
        say(f"[{time.monotonic() - plan.args.started:.0f} s] {job.key}: {result['seconds']:.0f} s {summary(result)}")
        write_reports(plan)
        return
    failed.append(job.key)
    say(f"{job.key} failed:\n{error}")
    if job.kind == "search":  # it is not the best, and the others need not wait for it
        plan.store(job.key, {"score": WORST, "failed": error})


def next_job(plan: Plan, taken: Sequence[str], left: float) -> Job | None:
    """The first job that can be begun: nothing before it is missing, and it will be over in the seconds that are left."""
    for stage in plan.stages():
        waiting = [job for job in stage if job.key not in taken]
        if fitting := next((job for job in waiting if job.seconds <= left), None):
            return fitting
        if stage and stage[0].kind not in ("search", "row"):
            return None  # later stages need what others still do, or what does not fit
    return None


def summary(result: dict[str, Any]) -> str:
    """A row in one line for each number of views, with what training said; nothing for other jobs."""
    lines = [result.get("distillation", ""), f"score {result['score']:.2f}" if "score" in result else ""]
    for views, measures in result.get("against_dense", {}).items():
        parts = [f"{m} {d['difference']:+.2f} [{d['low']:+.2f}, {d['high']:+.2f}]" for m, d in measures.items()]
        lines.append(f"  {views} views: " + "  ".join(parts))
    return "\n".join(line for line in lines if line)


def write_reports(plan: Plan) -> None:
    """A file for each keep ratio, and one of the search, of what is done."""
    args = plan.args
    reports: dict[str, dict[str, Any]] = {}
    for keep in args.keep_ratio:
        done = {f"{name} {keep}": plan.result(f"row {name} {keep}") for name in [*recipes.table(args.short), "best"]}
        for result in filter(None, done.values()):
            row = Row(**result["row"])
            fit = plan.result(f"calibrate {keep} {row.start}") if row.calibrated else None
            result |= {name: fit[name] for name in ("calibration_seconds", "ratios")} if fit else {}
        reports[f"keep{keep}"] = done
    reports["search"] = {name: plan.result(f"search {name}") for name in args.tried}
    for name, done in reports.items():
        rows = {key: {k: v for k, v in result.items() if k != "views"} for key, result in done.items() if result is not None}
        if rows:
            content = {"conditions": plan.result("conditions"), "rows": rows}
            write_atomically(args.folder / f"{name}.json", json.dumps(content, separators=(",", ":")) + "\n")


def conditions(args: argparse.Namespace) -> dict[str, Any]:
    """What all results of a folder were measured under."""
    cuda = args.device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else "cpu", "torch": torch.__version__, "lite3r_plugin": lite3r_plugin.__version__,
        "dtype": "bfloat16" if cuda else "float32", "size": args.size, "scenes": args.scenes, "pool": args.pool, "views": args.views,
        "subsets": args.subsets, "views_a_step": args.views_a_step or 96, "calibration": args.calibration,
        "dense_kernel": args.dense_kernel, "selection": args.selection, "pin": args.pin, "block_choice": Lite3RConfig().chosen_by,
        "weights_sha256": weights_hash(build(args, torch.device("cpu"))),
    }  # fmt: skip


def _precision(keep: float) -> str:
    return "fp8" if keep < FP8_BELOW else "full"


def say(text: str) -> None:
    """To standard error, so that progress and results do not mix."""
    print(text, file=sys.stderr, flush=True)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Options; `--small` changes the defaults."""
    small = "--small" in (sys.argv if arguments is None else arguments)
    names = [*recipes.table(1), "best"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for scenes, what is done, and results")
    parser.add_argument("--resume", action="store_true", help="go on with what is in the folder")
    parser.add_argument("--minutes", type=float, default=60.0, help="begin nothing that would not be over then")
    parser.add_argument("--small", action="store_true", help="a tiny model, few tiny scenes, few steps")
    parser.add_argument("--processes", type=int, help="one a GPU, unless a number is given; 0: all in this one")
    few = ["applied", "calibrated", "chosen", "lora-qat", "lora-no-qat", "lora-qat-chosen", "best"]
    parser.add_argument("--rows", nargs="+", choices=names, default=names)
    parser.add_argument("--fp8-rows", nargs="+", choices=names, default=few, help="at keep ratios whose best row is in FP8")
    parser.add_argument("--keep-ratio", type=float, nargs="+", default=[0.25, 0.125])
    parser.add_argument("--pin", choices=get_args(Pin), default=Lite3RConfig.pin)
    parser.add_argument("--recipe", choices=list(recipes.candidates(1, "full")), help="train this one for longer instead of searching")
    parser.add_argument("--tried", nargs="+", choices=list(recipes.candidates(1, "full")), default=list(recipes.candidates(1, "full")))
    parser.add_argument("--search", type=float, default=1.0, help="minutes of training of a recipe that is tried")
    parser.add_argument("--search-keep", type=float, default=0.125)
    parser.add_argument("--short", type=float, default=0.75, help="minutes of training of the rows that are compared")
    parser.add_argument("--long", type=float, default=8.0, help="minutes of training of the best row")
    parser.add_argument("--overhead", type=float, default=45.0, help="seconds that a run takes besides training and measuring")
    parser.add_argument("--measuring", type=float, default=30.0, help="seconds that measuring takes")
    parser.add_argument("--steps", type=int, default=2 if small else None, help="end after so many steps instead")
    parser.add_argument("--views", type=int, nargs="+", default=[2, 4] if small else [8, 16, 32])
    parser.add_argument("--subsets", type=int, nargs="+", help="choices of views of a scene, for each number of views")
    parser.add_argument("--scenes", type=int, default=6 if small else 768, help="held-out scenes")
    parser.add_argument("--selection", type=int, default=5 if small else 128, help="scenes that recipes are chosen by")
    parser.add_argument("--pool", type=int, default=4 if small else 1024, help="training scenes")
    parser.add_argument("--calibration", type=int, default=4 if small else 32, help="inputs that the linear branch is fitted to")
    parser.add_argument("--views-a-step", type=int, default=4 if small else None)
    parser.add_argument("--views-at-once", type=int, default=8 if small else 512, help="in measuring")
    parser.add_argument("--threads", type=int, default=2 if small else 14, help="that judge predictions, a process")
    parser.add_argument("--size", type=int, default=48 if small else 224, help="pixels")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dense-kernel", choices=("default", "cudnn", "flash"), default="default")
    parser.add_argument("--device", default="cpu" if small else "cuda")
    args = parser.parse_args(arguments)
    args.subsets = args.subsets or [2, *[1] * (len(args.views) - 1)]
    if len(args.subsets) != len(args.views):
        parser.error("--subsets takes a number for each of --views")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is not there yet. Returns 0, or 1 where something failed or is to go on."""
    args = parse(arguments)
    args.started = time.monotonic()
    args.until = args.started + 60 * args.minutes - args.measuring - MARGIN_SECONDS
    plan = Plan(args)
    known = plan.result("conditions")
    if known is not None and not args.resume:
        sys.exit(f"{args.folder} holds results: pass --resume to go on, or name another folder")
    now = json.loads(json.dumps(conditions(args)))
    if known is not None and known != now:
        sys.exit(f"{args.folder} was measured under other conditions: {sorted(k for k in now if now[k] != known.get(k))}")
    plan.store("conditions", now)
    usual = torch.cuda.device_count() if args.device == "cuda" else 0
    processes = usual if args.processes is None else args.processes
    failed = carry_out(plan, processes, args.started + 60 * args.minutes)
    left = [job.key for stage in plan.stages() for job in stage]
    say(f"[{time.monotonic() - args.started:.0f} s] broken off: {failed or 'nothing'}; left: {left or 'nothing'}; best: {plan.best()}")
    return 1 if failed else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))  # so that processes end with this one
    sys.exit(main())
