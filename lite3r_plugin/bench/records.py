"""What the benchmark writes down, and the JSON file that holds it."""

from __future__ import annotations

import dataclasses
import datetime
import platform
import subprocess
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ..errors import InputError
from ..files import read_json, to_json, write_atomically
from ..ops.dispatch import triton_installed
from ..version import __version__

REPORT_VERSION = 1
BASELINES = ("stock", "strong", "strong-exact")


@dataclasses.dataclass
class Candidate:
    """How a variant ran: eager, with compiled blocks, or either replayed from a CUDA graph.

    Attributes:
        median_ms, min_ms, max_ms: Over `runs` runs, each started on an idle device; None when it did not run.
        runs: How many.
        peak_bytes: Most memory that tensors held during one forward, weights included; for a graph, while it was captured.
        reserved_bytes: Most memory that the allocator held from the device.
        prepare_s: Seconds of the first forward, in which blocks are compiled and a graph is captured.
        reason: Why it did not run.
        notes: Other facts, such as how many graphs were compiled.
    """

    median_ms: float | None = None
    min_ms: float | None = None
    max_ms: float | None = None
    runs: int = 0
    peak_bytes: int | None = None
    reserved_bytes: int | None = None
    prepare_s: float | None = None
    reason: str | None = None
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Cell:
    """One variant at one number of views.

    Attributes:
        status: ``"ok"``, ``"oom"`` (out of memory), ``"error"``, or ``"skipped"`` (the time budget was spent, or there is no FP8 here).
        error: What went wrong.
        best: Name of the fastest candidate; its numbers are the cell's.
        line: What a user types to get it; None where that is nothing.
        candidates: All that were measured, by how they ran; of reports of one line, one.
        weight_bytes: Bytes of parameters and buffers by dtype.
        linears: Linears of the transformer blocks by what runs them, as `describe` has it; empty without Lite3R.
        compute_dtypes: Output dtypes of the Linears and convolutions of each part of the model (the heads, say), measured.
        output_dtypes: Dtypes of the outputs.
        sdpa: Order of the dense attention backends, or ``"default"``.
        rewrites: Exact rewrites that were made, in words.
        config: The Lite3R configuration, or None.
        sites: Calls of attention sites in one forward, by what ran.
        density: Share of the score blocks that were computed over the sites that may be sparse; 1 is dense.
        finite: Whether all outputs are finite.
        fidelity: Relative L2 error of the depth, largest absolute error of the poses, against stock on the same images.
    """

    variant: str
    views: int
    resolution: int
    status: Literal["ok", "oom", "error", "skipped"] = "ok"
    error: str | None = None
    best: str | None = None
    line: str | None = None
    candidates: dict[str, Candidate] = dataclasses.field(default_factory=dict)
    weight_bytes: dict[str, int] = dataclasses.field(default_factory=dict)
    linears: dict[str, int] = dataclasses.field(default_factory=dict)
    compute_dtypes: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    output_dtypes: dict[str, str] = dataclasses.field(default_factory=dict)
    sdpa: str = "default"
    rewrites: list[str] = dataclasses.field(default_factory=list)
    config: dict[str, Any] | None = None
    sites: dict[str, int] = dataclasses.field(default_factory=dict)
    density: float | None = None
    finite: bool | None = None
    fidelity: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def winner(self) -> Candidate | None:
        """The fastest candidate."""
        return self.candidates[self.best] if self.best is not None else None


@dataclasses.dataclass
class BenchReport:
    """All cells of a run and the conditions that they share.

    Attributes:
        conditions: Model, options, machine and software, as JSON-serialisable data.
        cells: In the order in which they were measured.
    """

    conditions: dict[str, Any]
    cells: list[Cell] = dataclasses.field(default_factory=list)

    def find(self, variant: str, views: int) -> Cell | None:
        """The cell of `variant` at `views`."""
        return next((c for c in self.cells if (c.variant, c.views) == (variant, views)), None)

    def speedup(self, cell: Cell, over: str) -> float | None:
        """How many times faster `cell` is than the variant `over` at the same number of views."""
        other = self.find(over, cell.views)
        mine, theirs = cell.winner, None if other is None else other.winner
        if mine is None or theirs is None or mine.median_ms is None or theirs.median_ms is None:
            return None
        return theirs.median_ms / mine.median_ms

    def to_dict(self) -> dict[str, Any]:
        """As JSON-serialisable data, with the speed of each cell over stock and over the strong dense baselines."""
        cells = []
        for cell in self.cells:
            ratios = {f"speedup_over_{over.replace('-', '_')}": self.speedup(cell, over) for over in BASELINES}
            cells.append(dataclasses.asdict(cell) | ratios)
        return {"version": REPORT_VERSION, "conditions": self.conditions, "cells": cells}

    def save(self, path: Path) -> None:
        """Write the JSON file in one step: a reader sees the old or the new one, never a part. Raises `InputError` where that fails."""
        write_atomically(path, to_json(self.to_dict()))


def read_report(path: Path) -> dict[str, Any]:
    """What `BenchReport.save` wrote, as data.

    Raises:
        InputError: the file is not there, or no report of this version.
    """
    stored = read_json(path)
    version = stored.get("version") if isinstance(stored, dict) else None
    if version != REPORT_VERSION or not isinstance(stored.get("conditions"), dict) or not isinstance(stored.get("cells"), list):
        raise InputError(f"{path} is no report of lite3r bench of version {REPORT_VERSION}; measure again with --json")
    return stored


def weight_bytes(module: nn.Module) -> dict[str, int]:
    """Bytes of parameters and buffers by dtype."""
    total: dict[str, int] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        dtype = str(tensor.dtype).removeprefix("torch.")
        total[dtype] = total.get(dtype, 0) + tensor.nbytes
    return total


def machine(device: torch.device, commit: str | None) -> dict[str, Any]:
    """The machine and the software, as part of the conditions of a report."""
    triton_version = None
    if triton_installed():
        import triton

        triton_version = triton.__version__
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "triton": triton_version,
        "python": platform.python_version(),
        "lite3r_plugin": __version__,
        "commit": commit or checkout_commit(Path(__file__).parent),
        "tf32_matmul": torch.backends.cuda.matmul.allow_tf32,
        "tf32_cudnn": torch.backends.cudnn.allow_tf32,
    }


def checkout_commit(folder: Path) -> str | None:
    """The commit of a checkout of git, with ``-dirty`` where files differ from it; None where it is none."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
