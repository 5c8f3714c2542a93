"""Runs variants side by side: each is built fresh from one seed, measured at all numbers of views, and freed."""

from __future__ import annotations

import contextlib
import dataclasses
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..apply.lookup import lite3r_modules
from ..apply.report import describe
from ..apply.swap import fast_of
from ..attention.state import ModelState
from ..config import Lite3RConfig
from ..errors import InputError, short
from ..ops.dispatch import SlowPathWarning
from ..runtime.device import peak, release_memory
from ..runtime.fast import FastForward
from .measure import measure
from .models import BenchModel, build, make_images, output_differences, reference, tensors
from .peer_process import run as run_peer
from .peers import PEERS, Task
from .records import BenchReport, Candidate, Cell, checkout_commit, machine, weight_bytes
from .variants import BRANCH, VARIANTS, Variant, fill_projections, observe, prepare, why_not


@dataclasses.dataclass
class Bench:
    """A benchmark run. `run` measures everything; the report is complete up to the last cell at any time.

    Attributes:
        model: The model under test.
        views: Numbers of views, smallest first.
        variants: Names of `VARIANTS`, in the order in which they run, but for ``"stock"``: the fidelity of others needs it first.
        resolution: Height and width of the images.
        options: Fields of `Lite3RConfig` for the variants with Lite3R.
        device: Where to run.
        compile: False: ``compile_blocks=False`` where the preset is.
        graphs: False: ``cuda_graphs=False`` where the preset is.
        fill_branch: Measure the linear branch as it is once it is calibrated or trained: until then it takes no time.
        repeats: Timed runs of a cell; 3 where one takes longer than `measure.SLOW_S` seconds.
        time_budget: Seconds after which no further cell is started; what is left is recorded as skipped.
        peers: What is measured beside them, in processes of their own, with their checkouts (`peers.chosen`).
        path: Where the report is written after every cell.
        commit: The commit under test, where the package is not in its repository.
        seed: Seed of weights and images.
        log: Takes progress lines.

    Raises:
        InputError: a variant is unknown, or there are no views.
        ConfigError: `options` are not fields of `Lite3RConfig`, or have values that these do not take.
    """

    model: BenchModel
    views: Sequence[int]
    variants: Sequence[str] = tuple(VARIANTS)
    resolution: int = 518
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    compile: bool = True
    graphs: bool = True
    fill_branch: bool = False
    repeats: int = 5
    time_budget: float | None = None
    peers: Mapping[str, Path | None] = dataclasses.field(default_factory=dict)
    path: Path | None = None
    commit: str | None = None
    seed: int = 0
    log: Callable[[str], None] = lambda line: None

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.variants) - set(VARIANTS)):
            raise InputError(f"unknown variant(s) {unknown}; known are {list(VARIANTS)}")
        if not self.views or min(self.views) < 1:
            raise InputError(f"views are numbers >= 1, got {list(self.views)}")
        for variant in (VARIANTS[name] for name in self.variants):
            if variant.lite3r:
                Lite3RConfig().replace(**variant.fields(self.options))
        self.device = torch.device(self.device)
        self.views = sorted(set(self.views))
        self.variants = sorted(self.variants, key=lambda name: name != "stock")
        self._start = time.monotonic()
        self._stock: dict[int, dict[str, Tensor]] = {}

    def run(self) -> BenchReport:
        """Measure all cells. A cell that fails, also for want of memory, is recorded, and the run goes on."""
        conditions = {
            "model": self.model.name,
            "summary": self.model.summary,
            "weights": "random, so fidelity to stock is numerical only and says nothing about quality",
            "seed": self.seed,
            "resolution": self.resolution,
            "views": list(self.views),
            "variants": {name: VARIANTS[name].summary for name in self.variants} | {name: PEERS[name].summary for name in self.peers},
            "checkouts": {name: checkout_commit(path) for name, path in self.peers.items() if path is not None},
            "lite3r_options": dict(self.options),
            "linear_branch": BRANCH[self.fill_branch],
            "compile": self.compile,
            "cuda_graphs": self.graphs and self.device.type == "cuda",
            **machine(self.device, self.commit),
        }
        self.report = BenchReport(conditions)
        for name in self.variants:
            with torch.no_grad():
                self._run_variant(VARIANTS[name])
        for name, checkout in self.peers.items():
            self._run_peer(name, checkout)
        return self.report

    def _run_peer(self, name: str, checkout: Path | None) -> None:
        """In a process of its own, while this one holds nothing of the device."""
        left = None if self.time_budget is None else self.time_budget - (time.monotonic() - self._start)
        if left is not None and left <= 0:
            skipped = f"the time budget of {self.time_budget:g} s was spent"
            for views in self.views:
                self._record(Cell(name, views, self.resolution, status="skipped", error=skipped))
            return
        task = Task(
            name, None if checkout is None else str(checkout), self.model.name, list(self.views), self.resolution, str(self.device),
            self.seed, self.repeats,
        )  # fmt: skip
        for cell in run_peer(task, left):
            self._record(cell)

    def _record(self, cell: Cell) -> None:
        self.report.cells.append(cell)
        if self.path is not None:
            self.report.save(self.path)
        self._log_cell(cell)

    def _run_variant(self, variant: Variant) -> None:
        cells = [Cell(variant.name, views, self.resolution) for views in self.views]
        module, error = None, None
        missing = why_not(variant, self.options, self.device)
        if missing is None and self._has_time():
            try:
                module = build(self.model, self.device, self.seed)
                prepare(module, variant, self._options_of(variant))
                if self.fill_branch:
                    fill_projections(module)
            except Exception as caught:
                error = caught
        for cell in cells:
            cell.line = variant.line(self._options_of(variant))
            try:
                if error is not None:
                    raise error
                if missing is not None:
                    cell.status, cell.error = "skipped", missing
                elif module is None or not self._has_time():
                    cell.status, cell.error = "skipped", f"the time budget of {self.time_budget:g} s was spent"
                else:
                    self._measure(module, variant, cell)
            except torch.cuda.OutOfMemoryError as caught:
                cell.status, cell.error = "oom", short(caught)
            except Exception as caught:  # whatever a host raises is a result too
                cell.status, cell.error = "error", short(caught)
            self._record(cell)
            release_memory(self.device)
        if variant.strong and self.compile:
            torch._dynamo.reset()
        module = None
        release_memory(self.device)

    def _measure(self, module: nn.Module, variant: Variant, cell: Cell) -> None:
        sites = lite3r_modules(module)
        state = next(iter(sites.values())).state if sites else None
        fast = None if state is None else fast_of(state)
        cell.config = None if state is None else state.config.to_dict()
        cell.linears = describe(module).linears if sites else {}
        if state is not None:
            cell.rewrites = [*state.rewritten, *(f"not {what}, because {why}" for what, why in state.not_rewritten.items())]
        cell.weight_bytes = weight_bytes(module)
        images = make_images(cell.views, self.resolution, self.device, self.seed)

        def forward() -> Any:
            with nullcontext() if variant.strong else torch.autocast(self.device.type, torch.bfloat16):
                return self.model.run(module, images)

        torch.manual_seed(self.seed)  # for models that draw numbers
        # Eagerly: with hooks a compiler would take each block for another case, in each number of views anew.
        with observe(module) as observed, _unplanned(state), torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
            warnings.simplefilter("ignore", SlowPathWarning)  # hooks keep it from being recorded: once
            outputs = tensors(forward())
        cell.compute_dtypes, cell.sites, cell.density = observed.compute_dtypes, observed.sites, observed.density
        cell.output_dtypes = {name: str(x.dtype).removeprefix("torch.") for name, x in outputs.items() if "." not in name}
        cell.finite = all(bool(x.isfinite().all()) for x in outputs.values())
        if cell.variant == "stock":
            self._stock[cell.views] = reference(outputs)
        elif cell.views in self._stock:
            cell.fidelity = output_differences(outputs, self._stock[cell.views])
        expected = reference(outputs)
        del outputs
        if fast is None:
            cell.best, cell.candidates = "eager", {"eager": measure(forward, self.device, self.repeats)}
            return
        cell.best, candidate = self._measure_fast(fast, forward, expected)
        cell.candidates = {cell.best: candidate}
        cell.sdpa = " first by ".join(filter(None, fast.choice or ())) or "default"

    def _measure_fast(self, fast: FastForward, forward: Callable[[], Any], expected: dict[str, Tensor]) -> tuple[str, Candidate]:
        """How a model with the preset ran, and its times. Each number of views is by itself: what was recorded before is dropped."""
        fast.forget()
        release_memory(self.device)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SlowPathWarning)  # it is in the notes
            start = time.monotonic()
            difference = output_differences(tensors(forward()), expected)
            seconds = time.monotonic() - start
            peaks = (None, None)
            if recorded := bool(fast.graphs):
                # Once more, compiled already: what a replay needs, is counted while it is recorded.
                fast.forget()
                release_memory(self.device)
                forward()
                peaks = peak(self.device)
            candidate = measure(forward, self.device, self.repeats)
        if recorded:
            candidate.peak_bytes, candidate.reserved_bytes = peaks
        candidate.prepare_s = seconds
        candidate.notes = {"difference_to_eager": difference, "whole_model": fast.report()}
        return fast.ran, candidate

    def _options_of(self, variant: Variant) -> dict[str, Any]:
        """The options, and where the preset is what is to be left out of it."""
        off = {name: False for name, wanted in (("compile_blocks", self.compile), ("cuda_graphs", self.graphs)) if not wanted}
        return {**self.options, **(off if variant.strong else {})}

    def _has_time(self) -> bool:
        return self.time_budget is None or time.monotonic() - self._start < self.time_budget

    def _log_cell(self, cell: Cell) -> None:
        what = f"{cell.status} {cell.error}"
        if cell.winner is not None:
            others = ", ".join(
                f"{name} {'failed: ' + (c.reason or '')[:90] if c.median_ms is None else f'{c.median_ms:.1f}'}"
                for name, c in cell.candidates.items()
            )
            gib = f", {cell.winner.peak_bytes / 2**30:.2f} GiB" if cell.winner.peak_bytes is not None else ""
            what = f"{cell.winner.median_ms:.1f} ms ({cell.best}){gib}, sites {cell.sites}, density {cell.density} | {others}"
        self.log(f"[{time.monotonic() - self._start:6.1f} s] {cell.variant:>13} {cell.views:4d} views: {what}")


@contextlib.contextmanager
def _unplanned(state: ModelState | None) -> Iterator[None]:
    """`max_memory` is not kept inside: with hooks a model holds what it else would not, which may be more than is allowed."""
    planner = None if state is None else state.planner
    if planner is None:
        yield
        return
    planner.enabled = False
    try:
        yield
    finally:
        planner.enabled = True
