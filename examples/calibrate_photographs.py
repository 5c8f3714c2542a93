"""Fit the linear branch of Lite3R to a folder of photographs, in closed form: no labels, no training loop.

    python examples/calibrate_photographs.py photos/ --out calibrated

Writes a checkpoint of what was added, `calibrated/`, for `load_and_run.py`.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from lite3r_plugin import apply_lite3r, calibrate, save_lite3r
from lite3r_plugin.adapter.plugins import find_model
from lite3r_plugin.evaluation import choose_device
from lite3r_plugin.scene.images import find_images, load_images


def main(argv: Sequence[str] | None = None) -> nn.Module:
    """Apply, calibrate, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photographs", type=Path, help="folder with photographs of a scene")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--model", default="testbed", help="a name of `lite3r adapters`, such as vggt")
    parser.add_argument("--weights", help="a file or a Hub id; by default the published ones")
    parser.add_argument("--keep-ratio", type=float, default=0.25)
    parser.add_argument("--dense-below", type=int, help="0: sparse wherever it is possible, also on a CPU, where it does not pay")
    parser.add_argument("--subsets", type=int, default=8, help="inputs to fit to")
    parser.add_argument("--views", type=int, default=4, help="photographs in each of them")
    args = parser.parse_args(argv)

    entry, device = find_model(args.model), choose_device("auto")
    photographs = load_images(find_images(args.photographs))
    model = entry.build(args.weights, device)
    apply_lite3r(model, keep_ratio=args.keep_ratio, dense_below=args.dense_below)

    # Every input has other photographs in another order, since the first one is the reference of the others.
    draw = random.Random(0)
    views = min(args.views, len(photographs))
    subsets = (draw.sample(photographs, views) for _ in range(args.subsets))
    print(calibrate(model, (entry.inputs(subset)[None].to(device) for subset in subsets)))  # [1, S, 3, H, W] each

    save_lite3r(model, args.out)
    print(f"wrote {args.out}")
    return model


if __name__ == "__main__":
    main()
