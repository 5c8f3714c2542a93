"""Fine-tune a head of the model for a task, with Lite3R in place and everything else frozen.

    python examples/finetune_head.py --out head.safetensors

The task is depth of rendered scenes in their own units; the model alone knows depth only up to a scale.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_model
from torch import nn

from lite3r_plugin import apply_lite3r
from lite3r_plugin.adapter.plugins import find_model, find_outputs
from lite3r_plugin.evaluation import choose_device
from lite3r_plugin.scene.data import ViewSets, open_scenes


def main(argv: Sequence[str] | None = None) -> tuple[nn.Module, list[float]]:
    """Freeze, train the head, save it; the model, and the losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the weights of the head, *.safetensors")
    parser.add_argument("--model", default="testbed", help="a name of `lite3r adapters`, such as vggt")
    parser.add_argument("--weights", help="a file or a Hub id; by default the published ones")
    parser.add_argument("--head", default="depth_head", help="the part of the model that learns")
    parser.add_argument("--scenes", default="procedural:scenes=4,views=4,size=112", help="with depth, as for `lite3r eval --data`")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--size", type=int, default=112, help="pixels, a multiple of the model's patches")
    args = parser.parse_args(argv)

    entry, device = find_model(args.model), choose_device("auto")
    model = apply_lite3r(entry.build(args.weights, device), keep_ratio=0.25, dense_below=0)
    model.requires_grad_(False)  # the backbone and the linear branches
    head = model.get_submodule(args.head).requires_grad_(True)
    optimizer = torch.optim.AdamW(head.parameters(), lr=2e-4)
    meaning = find_outputs(model)  # what the outputs are, of any model that an adapter knows

    scenes = list(ViewSets(open_scenes(args.scenes), args.views, (args.size, args.size)))
    losses = []
    for epoch in range(args.epochs):
        losses.append(0.0)
        for views in scenes:
            depth = meaning(model(entry.normalize(views.images)[None].to(device))).depth[0]  # [S, H, W]
            known, truth = views.valid.to(device), views.depth.to(device)
            loss = (depth[known].log() - truth[known].log()).abs().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1] += loss.item() / len(scenes)
        print(f"epoch {epoch}: error of log depth {losses[-1]:.4f}")

    save_model(head, args.out)
    print(f"wrote {args.out}")
    return model, losses


if __name__ == "__main__":
    main()
