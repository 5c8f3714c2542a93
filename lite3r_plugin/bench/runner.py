"""Runs variants side by side: each is built fresh from one seed, measured at all numbers of views, and freed."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..apply.lookup import lite3r_modules
from ..apply.report import describe
from ..config import Lite3RConfig
from ..errors import InputError, short
from ..runtime.device import release_memory
from .models import BenchModel, build, make_images, output_differences, reference, tensors
from .records import BenchReport, Cell, machine
from .subject import Setup, Subject
from .variants import VARIANTS, Variant, observe, prepare, why_not


@dataclasses.dataclass
class Bench:
    """A benchmark run. `run` measures everything; the report is complete up to the last cell at any time.

    Attributes:
        model: The model under test.
        views: Numbers of views, smallest first.
        variants: Names of `VARIANTS`, in the order in which they run. Fidelity needs stock first.
        resolution: Height and width of the images.
        options: Fields of `Lite3RConfig` for the variants with Lite3R.
        device: Where to run.
        compile: Whether strong variants may be compiled.
        graphs: Whether strong variants may be captured into CUDA graphs.
        repeats: Timed runs of a cell; 3 where one takes longer than `measure.SLOW_S` seconds.
        time_budget: Seconds after which no further cell is started; what is left is recorded as skipped.
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
    repeats: int = 5
    time_budget: float | None = None
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
        self._start = time.monotonic()
        self._setup = Setup(self.model.run, self.device, self.resolution, self.compile, self.graphs, self.repeats)
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
            "variants": {name: VARIANTS[name].summary for name in self.variants},
            "lite3r_options": dict(self.options),
            "compile": self.compile,
            "cuda_graphs": self.graphs and self.device.type == "cuda",
            **machine(self.device, self.commit),
        }
        self.report = BenchReport(conditions)
        for name in self.variants:
            with torch.no_grad():
                self._run_variant(VARIANTS[name])
        return self.report

    def _run_variant(self, variant: Variant) -> None:
        cells = [Cell(variant.name, views, self.resolution) for views in self.views]
        module, rewrites, error = None, [], None
        missing = why_not(variant, self.options, self.device)
        if missing is None and self._has_time():
            try:
                module, rewrites = prepare(lambda: build(self.model, self.device, self.seed), variant, self.options)
            except Exception as caught:
                error = caught
        subject = None if module is None else Subject(module, variant, self._setup)
        for cell in cells:
            cell.rewrites = rewrites
            try:
                if error is not None:
                    raise error
                if missing is not None:
                    cell.status, cell.error = "skipped", missing
                elif subject is None or not self._has_time():
                    cell.status, cell.error = "skipped", f"the time budget of {self.time_budget:g} s was spent"
                else:
                    self._measure(subject, cell)
            except torch.cuda.OutOfMemoryError as caught:
                cell.status, cell.error = "oom", short(caught)
            except Exception as caught:  # whatever a host raises is a result too
                cell.status, cell.error = "error", short(caught)
            self.report.cells.append(cell)
            if self.path is not None:
                self.report.save(self.path)
            self._log_cell(cell)
            release_memory(self.device)
        if subject is not None and subject.blocks:
            torch._dynamo.reset()
        subject = module = None
        release_memory(self.device)

    def _measure(self, subject: Subject, cell: Cell) -> None:
        module = subject.module
        sites = lite3r_modules(module)
        cell.config = next(iter(sites.values())).state.config.to_dict() if sites else None
        cell.linears = describe(module).linears if sites else {}
        cell.weight_bytes = weight_bytes(module)
        images = make_images(cell.views, self.resolution, self.device, self.seed)
        with subject.ready(images, cell) as forward:
            with observe(module) as observed:
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
            subject.measure_candidates(forward, cell, expected)
        ran = {name: candidate.median_ms for name, candidate in cell.candidates.items() if candidate.median_ms is not None}
        if ran:
            cell.best = min(ran, key=ran.__getitem__)
        else:
            cell.status = "error"
            cell.error = "; ".join(f"{name}: {candidate.reason}" for name, candidate in cell.candidates.items())

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


def weight_bytes(module: nn.Module) -> dict[str, int]:
    """Bytes of parameters and buffers by dtype."""
    total: dict[str, int] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        dtype = str(tensor.dtype).removeprefix("torch.")
        total[dtype] = total.get(dtype, 0) + tensor.nbytes
    return total
