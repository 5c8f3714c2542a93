"""One variant's model and the ways to run it: eager, compiled, and either replayed from a CUDA graph."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..adapter.plugins import find_sites
from ..apply.lookup import lite3r_modules
from ..attention.module import SparseLinearAttention
from ..fp8.block import Fp8Block
from . import measure
from .models import fidelity, tensors
from .records import Candidate, Cell
from .variants import Variant, repeated_blocks

if TYPE_CHECKING:
    from .runner import Bench

RECOMPILE_LIMIT = 16


@dataclasses.dataclass
class Subject:
    """A variant's model with what is decided once for all numbers of views: compilation and its failure.

    Attributes:
        module: The model, prepared as `variant`; None where that failed.
        variant: The variant.
        bench: The run that it belongs to.
        backend: The dense attention backend of the current cell.
        compiled_for: The backend that is part of the compiled code.
        compile_failure: Why compilation is not tried again.
        compiled_blocks: The blocks with their compiled calls.
    """

    module: nn.Module | None
    variant: Variant
    bench: Bench
    backend: str = "default"
    compiled_for: str | None = None
    compile_failure: str | None = None
    compiled_blocks: list[tuple[nn.Module, Any]] = dataclasses.field(default_factory=list)

    @property
    def network(self) -> nn.Module:
        """`module` of a variant that could be prepared."""
        assert self.module is not None
        return self.module

    @contextlib.contextmanager
    def ready(self, images: Tensor, cell: Cell) -> Iterator[Callable[[], Any]]:
        """The forward on `images` as this variant runs it, without compilation."""
        device = self.bench.device
        if self.variant.strong:
            images = images.to(torch.bfloat16)
            backend, times = measure.fastest_sdpa(self._probe(cell.views))
            measured = ", ".join(f"{name} {t:.3f} ms" if isinstance(t, float) else f"{name}: {t}" for name, t in times.items())
            cell.sdpa = f"{backend} first ({measured})" if measured else backend
            self.backend = backend
            modes: tuple[Any, ...] = (measure.sdpa_backend(backend),)
        else:
            modes = (torch.autocast(device.type, torch.bfloat16),)
        with contextlib.ExitStack() as stack:
            for mode in modes:
                stack.enter_context(mode)
            yield lambda: self.bench.model.run(self.network, images)

    def measure_candidates(self, forward: Callable[[], Any], cell: Cell, expected: dict[str, Tensor]) -> None:
        """Fill the cell's candidates. `expected`: outputs of an eager forward, which the other ways must reproduce."""
        device, runs = self.bench.device, self.bench.min_runs
        if not self.variant.strong:
            cell.candidates["eager"] = measure.measure(forward, device, runs)
            return
        compiled = cell.candidates["compiled"] = self._measure_compiled(forward, expected)
        if compiled.median_ms is not None:
            with self._compiled():
                cell.candidates["compiled graph"] = self._measure_graph(forward, compiled, expected)
        # Where compiled blocks run, eager is only of interest for comparison: one run is enough if it is slow.
        quick = compiled.median_ms is not None
        eager = cell.candidates["eager"] = measure.measure(forward, device, runs, quick=quick)
        cell.candidates["graph"] = self._measure_graph(forward, eager, expected)

    def _measure_compiled(self, forward: Callable[[], Any], expected: dict[str, Tensor]) -> Candidate:
        if not self.bench.compile:
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
            with self._compiled():
                difference = fidelity(tensors(forward()), expected)
                seconds = time.monotonic() - start
                candidate = measure.measure(forward, self.bench.device, self.bench.min_runs)
        except torch.cuda.OutOfMemoryError as error:
            return Candidate(reason=measure.short(error))
        except Exception as error:  # whatever the compiler raises is a result
            self.compile_failure = measure.short(error)
            return Candidate(reason=self.compile_failure)
        candidate.prepare_s = seconds
        candidate.notes = {
            "graphs_compiled": counters["stats"].get("unique_graphs", 0),
            "graph_breaks": sum(counters["graph_break"].values()),
            "difference_to_eager": difference,
        }
        return candidate

    def _measure_graph(self, forward: Callable[[], Any], base: Candidate, expected: dict[str, Tensor]) -> Candidate:
        device = self.bench.device
        if device.type != "cuda":
            return Candidate(reason="there is no CUDA device")
        if not self.bench.graphs:
            return Candidate(reason="CUDA graphs are switched off")
        if base.median_ms is not None and base.median_ms > measure.GRAPH_LIMIT_S * 1e3:
            return Candidate(reason=f"one run takes longer than {measure.GRAPH_LIMIT_S:g} s, so launches do not matter")
        start = time.monotonic()
        try:
            graph, outputs = measure.capture(forward, device)
            seconds = time.monotonic() - start
            peaks = measure.peak(device)
            graph.replay()
            difference = fidelity(tensors(outputs), expected)
            candidate = measure.measure(graph.replay, device, self.bench.min_runs)
        except Exception as error:  # a forward that waits for the GPU cannot be captured: a result
            return Candidate(reason=measure.short(error))
        candidate.prepare_s, (candidate.peak_bytes, candidate.reserved_bytes) = seconds, peaks
        candidate.notes = {"difference_to_eager": difference}
        return candidate

    @contextlib.contextmanager
    def _compiled(self) -> Iterator[None]:
        """Blocks run compiled inside the context. Attention that may be sparse stays eager: it is Triton already.

        So does a fused FP8 block around it, all of whose passes are: rows in FP8 cannot cross a break of the graph.
        """
        if not self.compiled_blocks:
            for block in repeated_blocks(self.network):
                if not (isinstance(block, Fp8Block) and _sparse_sites(block)):
                    block.compile(dynamic=True)
                    self.compiled_blocks.append((block, block._compiled_call_impl))
        sites = _sparse_sites(self.network)
        try:
            for site in sites:
                site.forward = torch.compiler.disable(site.forward)
            for block, call in self.compiled_blocks:
                block._compiled_call_impl = call
            with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT, fail_on_recompile_limit_hit=True):
                yield
        finally:
            for site in sites:
                del site.forward
            for block, _ in self.compiled_blocks:
                block._compiled_call_impl = None

    def _probe(self, views: int) -> Tensor:
        """Queries as at a global attention site at this number of views, to choose the backend of dense attention."""
        _, sites = find_sites(self.network)
        site = min(sites, key=lambda site: site.scope != "global")
        tokens, heads = views * 1024, site.projections.num_heads or 16
        if site.tokens is not None:
            patches = math.prod(self.bench.resolution // size for size in site.tokens.patch_size)
            tokens = views * (patches + site.tokens.special_tokens)
        return torch.randn(1, heads, tokens, site.head_dim, device=self.bench.device, dtype=torch.bfloat16)


def _sparse_sites(module: nn.Module) -> list[SparseLinearAttention]:
    """The attention inside `module` that may run sparse."""
    return [site for site in lite3r_modules(module).values() if site.sparse and site.keep_ratio < 1]
