"""Lite3R as an adapter of PEFT: linear branches and LoRA in one file of a few megabytes, beside the untouched model.

python examples/peft_adapter.py --out adapter
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model

from lite3r_plugin.adapter.plugins import find_model, find_outputs
from lite3r_plugin.evaluation import choose_device
from lite3r_plugin.peft import Lite3RPeftConfig
from lite3r_plugin.scene.data import open_scenes


def main(argv: Sequence[str] | None = None) -> tuple[list[float], float]:
    """Put in, train, save, load; the losses, and how far the loaded model is from the trained one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the adapter")
    parser.add_argument("--model", default="testbed", help="a name of `lite3r adapters`, such as vggt")
    parser.add_argument("--weights", help="a file or a Hub id; by default the published ones")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--size", type=int, default=112, help="pixels, a multiple of the model's patches")
    args = parser.parse_args(argv)

    entry, device = find_model(args.model), choose_device("auto")
    scene = open_scenes(f"procedural:scenes=1,views=4,size={args.size}")[0]  # take images of your own
    images = entry.normalize(scene.sample(range(4), None).images)[None].to(device)  # [1, S, 3, H, W]
    config = Lite3RPeftConfig(keep_ratio=0.25, dense_below=0, r=8, lora_alpha=8)
    model = get_peft_model(entry.build(args.weights, device), config).eval()
    meaning = find_outputs(model)  # what the outputs are, of any model that an adapter knows
    model.print_trainable_parameters()

    with torch.no_grad(), model.disable_adapter():
        dense = meaning(model(images)).depth
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    losses = []
    for step in range(args.steps):
        loss = (meaning(model(images)).depth.log() - dense.log()).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        print(f"step {step}: error of log depth {losses[-1]:.4g}")

    model.save_pretrained(args.out)
    loaded = PeftModel.from_pretrained(entry.build(args.weights, device), args.out).eval()
    with torch.no_grad():
        difference = (meaning(loaded(images)).depth - meaning(model(images)).depth).abs().max().item()
    print(f"wrote {args.out}; the loaded model differs by {difference:.2g}")
    return losses, difference


if __name__ == "__main__":
    main()
