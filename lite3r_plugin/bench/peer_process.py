"""The process of one peer: ``python -m lite3r_plugin.bench.peer_process`` takes a `Task` on standard input and prints a cell a line.

Lines that are not its own, such as what the code of a peer prints, go to standard error.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from ..apply.lookup import lite3r_modules
from ..apply.swap import fast_of
from ..errors import InputError, short
from ..runtime.device import peak, release_memory
from .measure import measure
from .models import make_images, output_differences, reference, tensors
from .peers import PEERS, Running, Task
from .records import Candidate, Cell, weight_bytes


def main() -> None:
    """Do the task of standard input."""
    task = Task(**json.loads(sys.stdin.read()))
    out = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        for cell in cells(task):
            print(json.dumps(dataclasses.asdict(cell)), file=out, flush=True)


def cells(task: Task) -> Iterator[Cell]:
    """A cell for each number of views, of the peer after its own dense model."""
    device = torch.device(task.device)
    made = [Cell(task.peer, views, task.resolution) for views in task.views]
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of others' code; what fails is an error
            running = PEERS[task.peer].prepare(task.model, None if task.checkout is None else Path(task.checkout), device, task.seed)
            expected = [_reference(running, cell, task, device) for cell in made]
            module = running.change(running.dense)
            running.dense = torch.nn.Module()
            release_memory(device)
    except Exception as error:  # whatever code of others raises
        status = "skipped" if isinstance(error, InputError) else _status(error)
        for cell in made:
            cell.status, cell.error = status, short(error)
        yield from made
        return
    for cell, there in zip(made, expected, strict=True):
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                _measure(running, module, cell, there, task, device)
        except Exception as error:
            cell.status, cell.error = _status(error), short(error)
        yield cell
        release_memory(device)


def _status(error: Exception) -> Any:
    return "oom" if isinstance(error, torch.cuda.OutOfMemoryError) else "error"


def _context(running: Running, device: torch.device) -> Any:
    return torch.autocast(device.type, torch.bfloat16) if running.autocast else nullcontext()


def _reference(running: Running, cell: Cell, task: Task, device: torch.device) -> dict[str, torch.Tensor] | None:
    """What the dense model gives; None where it does not fit into memory."""
    try:
        images = make_images(cell.views, task.resolution, device, task.seed)
        torch.manual_seed(task.seed)  # for models that draw numbers
        with torch.autocast(device.type, torch.bfloat16):
            return reference(tensors(running.run(running.dense, images)))
    except torch.cuda.OutOfMemoryError:
        return None
    finally:
        release_memory(device)


def _measure(
    running: Running, module: torch.nn.Module, cell: Cell, expected: dict[str, torch.Tensor] | None, task: Task, device: torch.device
) -> None:
    images = make_images(cell.views, task.resolution, device, task.seed)

    def forward() -> Any:
        with _context(running, device):
            return running.run(module, images)

    torch.manual_seed(task.seed)
    outputs = tensors(forward())
    cell.output_dtypes = {name: str(x.dtype).removeprefix("torch.") for name, x in outputs.items() if "." not in name}
    cell.finite = all(bool(x.isfinite().all()) for x in outputs.values())
    if expected is not None:
        cell.fidelity = output_differences(outputs, expected)
    cell.weight_bytes = weight_bytes(module)
    cell.density = running.density(cell.views)
    del outputs
    peaks = _of_recording(module, forward, device)
    candidate = measure(forward, device, task.repeats)
    if peaks is not None:
        candidate.peak_bytes, candidate.reserved_bytes = peaks
    cell.best, cell.candidates = "as it comes", {"as it comes": candidate}


def _of_recording(module: torch.nn.Module, forward: Callable[[], Any], device: torch.device) -> tuple[int | None, int | None] | None:
    """Peaks while a CUDA graph is recorded, whose replay shows none; None where there is no graph."""
    state = next((site.state for site in lite3r_modules(module).values()), None)
    fast = None if state is None else fast_of(state)
    if fast is None or not fast.graphs:
        return None
    fast.forget()
    release_memory(device)
    forward()
    return peak(device)


def run(task: Task, timeout: float | None = None) -> Iterator[Cell]:
    """The cells of `task`, measured in a process of its own, as they come. What it did not come to is recorded with the reason.

    Args:
        task: What to do.
        timeout: Seconds after which the process is ended; None: never.
    """
    done: set[int] = set()
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen([sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True)
        late = threading.Timer(timeout or 0.0, process.kill)
        try:
            if timeout is not None:
                late.start()
            assert process.stdin is not None
            assert process.stdout is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(json.dumps(dataclasses.asdict(task)))
                process.stdin.close()
            for line in process.stdout:
                cell = _cell(line)
                done.add(cell.views)
                yield cell
            ended = process.wait()
        finally:
            late.cancel()
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
        said.seek(0)
        words = " ".join(said.read().split())[-300:] or "no word"
    reason = f"its process ended with {ended}: {words}"
    if timeout is not None and ended < 0:
        reason = f"the time budget left it {timeout:.0f} s, which were not enough"
    for views in task.views:
        if views not in done:
            yield Cell(task.peer, views, task.resolution, status="error", error=reason)


def _cell(line: str) -> Cell:
    fields = json.loads(line)
    fields["candidates"] = {name: Candidate(**candidate) for name, candidate in fields["candidates"].items()}
    return Cell(**fields)


if __name__ == "__main__":
    main()
