"""What weights reach on scenes that no training saw: ``python -m lite3r_plugin.testbed.held_out --weights DIR [DIR] --json FILE``.

Three kinds of scene, eight views of 224 pixels each: `rendered` (`lite3r_plugin.scene.procedural` with its defaults), `worlds` (packed
worlds that training leaves out, where a folder of them is given) and `gate` (the second generator). Each has scenes for selection, which
training looks at, and final ones, which are for figures to publish.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from ..files import write_atomically
from ..scene.procedural import ProcScenes, TextureBank
from .evaluate import evaluate
from .gate import FINAL_SEEDS, GATE_SEEDS, gate_scenes
from .losses import Batch
from .model import Testbed

KINDS = ("rendered", "worlds", "gate")
VIEWS, SIZE = 8, 224
HELD_OUT_WORLDS = (
    "nexuiz_aneurysm", "nexuiz_ruiner", "nexuiz_silvercity", "supertuxkart_cave", "supertuxkart_lighthouse", "supertuxkart_zengarden",
)  # fmt: skip


def world_files(folder: Path, held_out: bool) -> list[Path]:
    """The packed worlds in a folder that are held out, or those that are not."""
    return sorted(p for p in folder.glob("*_*.npz") if (p.stem in HELD_OUT_WORLDS) is held_out)


def held_out(kind: str, count: int, device: torch.device, final: bool, worlds: Path | None = None, size: int = SIZE) -> Batch:
    """`count` scenes of one of the `KINDS`.

    Args:
        kind: Which.
        count: Number of scenes; the gate has as many as it has seeds at most.
        device: Where they are rendered and lie.
        final: Take the final ones.
        worlds: Folder of packed worlds, for `worlds`.
        size: Height and width in pixels.
    """
    if kind == "gate":
        return gate_scenes((FINAL_SEEDS if final else GATE_SEEDS)[:count], VIEWS, size, size, device)
    if kind == "worlds":
        from .worlds import WorldSampler

        sampler = WorldSampler(world_files(worlds or Path(), held_out=True), seed=66_666 + final)
        clips = [sampler.clip(VIEWS, size, size) for _ in range(count)]
        sample = {name: torch.stack([torch.from_numpy(clip[name]) for clip in clips]).to(device).float() for name in clips[0]}
        valid = sample["depth"] > 0
        ok = torch.ones(count, VIEWS, dtype=torch.bool, device=device)
        return sample | {"rgb": sample["rgb"] / 255, "depth": sample["depth"].clamp(min=1e-3), "valid": valid, "ok": ok}
    textures = (128, 128) if size == SIZE else (12, 32)
    bank = TextureBank.procedural(*textures, device, seed=77_777 + final)
    return ProcScenes(bank, device, seed=88_888 + final, max_views_per_chunk=32)(count, VIEWS, size, size)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="lite3r_plugin.testbed.held_out", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--weights", type=Path, nargs="+", required=True, help="folders that save_pretrained wrote")
    parser.add_argument("--worlds", type=Path, help="folder of packed worlds")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["rendered", "gate"])
    parser.add_argument("--scenes", type=int, default=64, help="of each kind")
    parser.add_argument("--size", type=int, default=SIZE, help="pixels")
    parser.add_argument("--selection", action="store_true", help="the scenes that training looks at")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, required=True, help="file for the results")
    args = parser.parse_args(arguments)
    device = torch.device(args.device)
    models = {str(path): Testbed.from_pretrained(path, device) for path in args.weights}
    results: dict[str, dict[str, dict[str, float]]] = {name: {} for name in models}
    for kind in args.kinds:
        started = time.monotonic()
        sample = held_out(kind, args.scenes, device, not args.selection, args.worlds, args.size)
        print(f"{kind}: {len(sample['rgb'])} scenes in {time.monotonic() - started:.1f} s", flush=True)
        for name, model in models.items():
            results[name][kind] = evaluate(model, sample, autocast=device.type == "cuda")
            print(f"{name}, {kind}: " + "  ".join(f"{key} {value:.3f}" for key, value in results[name][kind].items()), flush=True)
    conditions = {"scenes": args.scenes, "views": VIEWS, "size": args.size, "final": not args.selection, "torch": torch.__version__}
    conditions["device"] = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    conditions["dtype"] = "bfloat16 autocast" if device.type == "cuda" else "float32"
    write_atomically(args.json, json.dumps({"conditions": conditions, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
