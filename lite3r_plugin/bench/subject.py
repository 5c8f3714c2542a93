"""One variant's model and the ways to run it: eager, compiled, and either replayed from a CUDA graph."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter.layouts import TokenSource
from ..adapter.plugins import find_sites
from ..errors import short
from ..runtime.compile import CompiledBlocks
from ..runtime.device import peak
from ..runtime.graphs import capture
from ..runtime.sdpa import fastest_sdpa, sdpa_backend
from .measure import GRAPH_LIMIT_S, measure
from .models import output_differences, tensors
from .records import Candidate, Cell
from .variants import Variant


@dataclasses.dataclass(frozen=True)
class Setup:
    """How a run measures, the same for all its variants.

    Attributes:
        call: ``call(module, images [1, S, 3, R, R])``, the outputs of a forward.
        device: Where to run.
        resolution: R, height and width of the images in pixels.
        compile: Whether strong variants may be compiled.
        graphs: Whether strong variants may be captured into CUDA graphs.
        repeats: Timed runs of a cell.
    """

    call: Callable[[nn.Module, Tensor], Any]
    device: torch.device
    resolution: int
    compile: bool
    graphs: bool
    repeats: int


@dataclasses.dataclass
class Subject:
    """A variant's model with what is decided once for all numbers of views: compilation and its failure.

    Attributes:
        module: The model, prepared as `variant`.
        variant: The variant.
        setup: How it is measured.
        backend: The dense attention backend of the current cell.
        compiled_for: The backend that is part of the compiled code.
        compile_failure: Why compilation is not tried again.
        blocks: Its repeated blocks, which run compiled when that is wanted.
    """

    module: nn.Module
    variant: Variant
    setup: Setup
    backend: str = "default"
    compiled_for: str | None = None
    compile_failure: str | None = None
    blocks: CompiledBlocks = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.blocks = CompiledBlocks(self.module)

    @contextlib.contextmanager
    def ready(self, images: Tensor, cell: Cell) -> Iterator[Callable[[], Any]]:
        """The forward on `images` as this variant runs it, without compilation."""
        device = self.setup.device
        if self.variant.strong:
            images = images.to(torch.bfloat16)
            backend, times = fastest_sdpa(self._probe(cell.views))
            measured = ", ".join(f"{name} {t:.3f} ms" if isinstance(t, float) else f"{name}: {t}" for name, t in times.items())
            cell.sdpa = f"{backend} first ({measured})" if measured else backend
            self.backend = backend
            mode = sdpa_backend(backend)
        else:
            mode = torch.autocast(device.type, torch.bfloat16)
        with mode:
            yield lambda: self.setup.call(self.module, images)

    def measure_candidates(self, forward: Callable[[], Any], cell: Cell, expected: dict[str, Tensor]) -> None:
        """Fill the cell's candidates. `expected`: outputs of an eager forward, which the other ways must reproduce."""
        device, runs = self.setup.device, self.setup.repeats
        if not self.variant.strong:
            cell.candidates["eager"] = measure(forward, device, runs)
            return
        compiled = cell.candidates["compiled"] = self._measure_compiled(forward, expected)
        if compiled.median_ms is not None:
            with self.blocks.running():
                cell.candidates["compiled graph"] = self._measure_graph(forward, compiled, expected)
        # Where compiled blocks run, eager is only of interest for comparison: one run is enough if it is slow.
        quick = compiled.median_ms is not None
        eager = cell.candidates["eager"] = measure(forward, device, runs, quick=quick)
        cell.candidates["graph"] = self._measure_graph(forward, eager, expected)

    def _measure_compiled(self, forward: Callable[[], Any], expected: dict[str, Tensor]) -> Candidate:
        if not self.setup.compile:
            return Candidate(reason="compilation is switched off")
        if self.compile_failure is not None:
            return Candidate(reason=f"failed before: {self.compile_failure}")
        if self.compiled_for not in (None, self.backend):
            torch._dynamo.reset()  # the backend of dense attention is part of the compiled code
        self.compiled_for = self.backend
        counters = torch._dynamo.utils.counters
        counters.clear()
        start = time.monotonic()
        try:
            with self.blocks.running():
                difference = output_differences(tensors(forward()), expected)
                seconds = time.monotonic() - start
                candidate = measure(forward, self.setup.device, self.setup.repeats)
        except torch.cuda.OutOfMemoryError as error:
            return Candidate(reason=short(error))
        except Exception as error:  # whatever the compiler raises is a result
            self.compile_failure = short(error)
            return Candidate(reason=self.compile_failure)
        candidate.prepare_s = seconds
        candidate.notes = {
            "graphs_compiled": counters["stats"].get("unique_graphs", 0),
            "graph_breaks": sum(counters["graph_break"].values()),
            "difference_to_eager": difference,
        }
        return candidate

    def _measure_graph(self, forward: Callable[[], Any], base: Candidate, expected: dict[str, Tensor]) -> Candidate:
        device = self.setup.device
        if device.type != "cuda":
            return Candidate(reason="there is no CUDA device")
        if not self.setup.graphs:
            return Candidate(reason="CUDA graphs are switched off")
        if base.median_ms is not None and base.median_ms > GRAPH_LIMIT_S * 1e3:
            return Candidate(reason=f"one run takes longer than {GRAPH_LIMIT_S:g} s, so launches do not matter")
        start = time.monotonic()
        try:
            graph, outputs = capture(forward, device)
            seconds = time.monotonic() - start
            peaks = peak(device)
            graph.replay()
            difference = output_differences(tensors(outputs), expected)
            candidate = measure(graph.replay, device, self.setup.repeats)
        except Exception as error:  # a forward that waits for the GPU cannot be captured: a result
            return Candidate(reason=short(error))
        candidate.prepare_s, (candidate.peak_bytes, candidate.reserved_bytes) = seconds, peaks
        candidate.notes = {"difference_to_eager": difference}
        return candidate

    def _probe(self, views: int) -> Tensor:
        """Queries as at a global attention site at this number of views, to choose the backend of dense attention."""
        _, sites = find_sites(self.module)
        site = min(sites, key=lambda site: site.scope != "global")
        tokens, heads = views * 1024, site.projections.num_heads or 16
        if isinstance(site.tokens, TokenSource):
            patches = math.prod(self.setup.resolution // size for size in site.tokens.patch_size)
            tokens = views * (patches + site.tokens.special_tokens)
        return torch.randn(1, heads, tokens, site.head_dim, device=self.setup.device, dtype=torch.bfloat16)
