"""Load what `calibrate_photographs.py` or `distil.py` saved, reconstruct photographs, and export a point cloud.

python examples/load_and_run.py calibrated photos/ --out scene.ply
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from lite3r_plugin import describe, load_lite3r
from lite3r_plugin.adapter.plugins import find_model
from lite3r_plugin.evaluation import choose_device
from lite3r_plugin.scene.export import point_cloud, save_ply
from lite3r_plugin.scene.images import find_images, load_images
from lite3r_plugin.scene.prediction import Prediction


def main(argv: Sequence[str] | None = None) -> Prediction:
    """Load, predict, export."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="a folder that save_lite3r wrote, or a Hub id")
    parser.add_argument("photographs", type=Path, help="folder with photographs of one static scene")
    parser.add_argument("--out", type=Path, required=True, help="the point cloud, *.ply")
    parser.add_argument("--model", default="testbed", help="the model that was saved, a name of `lite3r adapters`")
    parser.add_argument("--weights", help="a file or a Hub id; by default the published ones")
    args = parser.parse_args(argv)

    entry, device = find_model(args.model), choose_device("auto")
    model = load_lite3r(entry.build(args.weights, device), args.checkpoint)
    images = entry.inputs(load_images(find_images(args.photographs))).to(device)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        prediction = entry.predict(model, images)  # depth, points, cameras

    print(describe(model))
    cloud = point_cloud(prediction)
    save_ply(cloud, args.out)
    print(f"wrote {args.out}: {len(cloud.points):,} points from {len(images)} views")
    return prediction


if __name__ == "__main__":
    main()
