"""One scene on several devices of a host against one: time, peak memory, bytes that travelled, bandwidth of the links, and the plan.

    torchrun --nproc-per-node=2 benchmarks/parallel/views.py --model vggt --views 100,400 --config keep_ratio=0.1 \
        --config precision=fp8 --json views.json

Each process has a device of its own. In turn, the first one runs the whole scene alone while the others wait, and all run it together;
medians of `--repeats`. What global attention takes of the time of one is the difference to a forward in which it gives each token its
own value. `plan` is what `lite3r_plugin.costs.views` expects, from the time of one device, that share and the bandwidth, all of the same
run. Weights are random. The file is written anew after every number of views, and a table is printed at the end.

`differences` are those between several devices and one; `floor`, those between two runs of one device that are equally valid: with
compiled blocks and recorded kernels as configured, and with every operator by itself. Where nothing is compiled, the floor is 0. Exits
with 1 where an output of several devices differs by more than the larger of `--tolerance` and twice its floor.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from lite3r_plugin import apply_lite3r
from lite3r_plugin.adapter.plugins import find_model
from lite3r_plugin.apply.lookup import lite3r_modules
from lite3r_plugin.attention.inputs import AttentionInputs
from lite3r_plugin.attention.module import SparseLinearAttention
from lite3r_plugin.bench.models import BenchModel, build, make_images, output_differences, reference, tensors
from lite3r_plugin.cli.options import config_fields, numbers
from lite3r_plugin.costs.views import Scene, plan, traffic
from lite3r_plugin.files import to_json, write_atomically
from lite3r_plugin.parallel import Place, launched, parallelize_views
from lite3r_plugin.runtime.device import peak, release_memory, synchronize
from lite3r_plugin.tokens.layout import pinned_tokens


def link_bandwidth(place: Place, megabytes: int, repeats: int) -> float:
    """Bytes a second that a device is sent while all gather from all, the median."""
    every = torch.zeros(place.size, megabytes << 20, dtype=torch.uint8, device=place.device)
    # torch 2.14 gave it a shorter name and warns of the longer one.
    into: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

    def gather() -> None:
        into(every.flatten(), every[place.rank])

    gather()
    return (place.size - 1) * every[0].numel() / median(gather, place, repeats)


def median(run: Callable[[], Any], place: Place, repeats: int) -> float:
    """Seconds of a call in which all take part."""
    times = []
    for _ in range(repeats):
        synchronize(place.device)
        dist.barrier()
        start = time.perf_counter()
        run()
        synchronize(place.device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measured(run: Callable[[], Any], place: Place, repeats: int, alone: bool = False) -> tuple[float, int | None]:
    """Median seconds and peak bytes of `run`, of the first process; `alone`: the others wait meanwhile."""

    def turn() -> None:
        if not alone or place.rank == 0:
            run()

    turn()
    release_memory(place.device)
    return median(turn, place, repeats), peak(place.device)[0]


def without_attention(module: nn.Module, run: Callable[[], Any]) -> Callable[[], Any]:
    """`run`, with global attention that gives each token its own value."""

    def quick() -> None:
        with contextlib.ExitStack() as stack:
            for site in lite3r_modules(module).values():
                if site.sparse:
                    stack.enter_context(site.substitute(lambda _, inputs: inputs.v, watches=False))
            run()

    return quick


def compare(model: BenchModel, fields: dict[str, Any], views: int, place: Place, args: argparse.Namespace, link: float) -> dict[str, Any]:
    """One number of views on one device and on all."""
    module = apply_lite3r(build(model, place.device, seed=0), **fields)
    half = torch.autocast(place.device.type, torch.bfloat16) if place.device.type == "cuda" else contextlib.nullcontext()
    given = make_images(views, args.resolution, place.device, seed=0).to(next(module.parameters()).dtype)

    def run() -> Any:
        with torch.no_grad(), half:
            return model.run(module, given)

    one, one_peak = measured(run, place, args.repeats, alone=True)
    quick, _ = measured(without_attention(module, run), place, args.repeats, alone=True)
    sites = [site for site in lite3r_modules(module).values() if site.sparse]
    expected, floor = {}, {}
    if place.rank == 0:
        expected = reference(tensors(run()))
        with sites[0].observe(lambda *_: None):  # which keeps blocks from running compiled, and recordings from being replayed
            floor = output_differences(tensors(run()), expected)
    scene = scene_of(sites, views, run)
    with parallelize_views(module, outputs="gathered") as parallel:
        run()
        parallel.group.traffic = 0
        found = run()
        travelled = parallel.group.traffic
        several, several_peak = measured(run, place, args.repeats)
        outputs = sum(x.nbytes for x in tensors(found).values() if x is not given) // views  # images need not travel
    record: dict[str, Any] = {"views": views, "seconds": {"one": one, "several": several}, "gain": one / several}
    record |= {"peak_bytes": {"one": one_peak, "several": several_peak}, "travelled_bytes": travelled}
    if place.rank == 0:
        record |= {"differences": output_differences(tensors(found), expected), "floor": floor}
        record["density"] = sites[0].calls.density
        share = max(0.0, 1 - quick / one)
        record["attention_share"] = share
        record["planned"] = {
            str(devices): dataclasses.asdict(
                plan(scene, devices, seconds=one, attention_share=share, link=link, output_bytes_per_view=outputs)
            )
            for devices in sorted({place.size, 2, 4, 8})
            if devices <= views
        }
        record["planned_bytes"] = traffic(scene, place.size, outputs).bytes
    return record


def scene_of(sites: list[SparseLinearAttention], views: int, run: Callable[[], Any]) -> Scene:
    """The scene of `run` on one device, in numbers."""
    seen: list[AttentionInputs] = []
    with sites[0].observe(lambda _, inputs, out: seen.append(inputs)):
        run()
    config, v, layout = sites[0].state.config, seen[0].v, seen[0].layout
    return Scene(
        views, v.shape[2] // views, width=v.shape[1] * v.shape[3], sites=len(sites),
        pinned=0 if layout is None else pinned_tokens(layout, config.pin).queries, element_bytes=v.element_size(), block_q=config.block_q,
        heads=v.shape[1],
    )  # fmt: skip


def too_far(record: dict[str, Any], tolerance: float) -> list[str]:
    """Which outputs of several devices differ by more than the larger of `tolerance` and twice the floor, as relative L2 errors."""
    found, floor = record["differences"], record["floor"]
    return [name for name in found if name.endswith("rel_l2") and not found[name] <= max(tolerance, 2 * floor[name])]  # also if NaN


def table(records: list[dict[str, Any]], devices: int, tolerance: float) -> str:
    """A row for each number of views."""
    columns = (
        "views", "one s", f"{devices} s", "gain", "planned", "to each GB", "planned GB", "peak one GB", f"peak {devices} GB", "differs",
        "floor",
    )  # fmt: skip
    rows: list[tuple[str, ...]] = [columns]
    for record in records:
        seconds, peaks, planned = record["seconds"], record["peak_bytes"], record["planned"][str(devices)]
        worst, floor = (
            max((x for name, x in record[kind].items() if name.endswith("rel_l2")), default=0.0) for kind in ("differences", "floor")
        )
        rows.append((
            str(record["views"]), f"{seconds['one']:.4f}", f"{seconds['several']:.4f}", f"{record['gain']:.3f}", f"{planned['gain']:.3f}",
            *(f"{record[f'{kind}_bytes'] / 1e9:.3f}" for kind in ("travelled", "planned")),
            *("-" if peaks[which] is None else f"{peaks[which] / 1e9:.2f}" for which in ("one", "several")),
            f"{worst:.1e}{' (too far)' if too_far(record, tolerance) else ''}", f"{floor:.1e}",
        ))  # fmt: skip
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def resolution(text: str) -> int | tuple[int, int]:
    """``518``, or height and width as ``392x518``."""
    sizes = [int(word) for word in text.split("x")]
    if len(sizes) > 2 or min(sizes) <= 0:
        raise ValueError(text)  # argparse says what is wrong
    return sizes[0] if len(sizes) == 1 else (sizes[0], sizes[1])


def main(arguments: list[str] | None = None) -> int:
    """See the module. In processes that have a process group already, that is used."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vggt")
    parser.add_argument("--views", default="100")
    parser.add_argument("--resolution", type=resolution, default=518, metavar="SIZE or HEIGHTxWIDTH")
    parser.add_argument("--config", action="append", help="name=value of Lite3RConfig, as for lite3r bench")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--link-megabytes", type=int, default=256)
    parser.add_argument("--tolerance", type=float, default=0.02)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args(arguments)
    fields, model = config_fields(args.config), BenchModel.of(find_model(args.model))
    with contextlib.ExitStack() as stack:
        if dist.is_initialized():
            place = Place(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
        else:
            place = stack.enter_context(launched(args.device))
        link = link_bandwidth(place, args.link_megabytes, args.repeats)
        device = torch.cuda.get_device_name(place.device) if place.device.type == "cuda" else platform.processor() or "CPU"
        written: dict[str, Any] = {
            "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(), "device": device, "devices": place.size,
            "torch": torch.__version__, "model": model.name, "resolution": args.resolution, "config": fields,
            "link_bytes_per_second": link, "records": [],
        }  # fmt: skip
        for views in numbers(args.views, "--views"):
            written["records"].append(compare(model, fields, views, place, args, link))
            if place.rank == 0:
                write_atomically(args.json, to_json(written))
    if place.rank != 0:
        return 0
    print(table(written["records"], place.size, args.tolerance))
    return int(any(too_far(record, args.tolerance) for record in written["records"]))


if __name__ == "__main__":
    sys.exit(main())
