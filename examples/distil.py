"""Train the linear branches and LoRA beside them to give what the dense model gives, on one process or several.

    python examples/distil.py --out distilled
    torchrun --standalone --nproc-per-node 2 examples/distil.py --out distilled
    accelerate launch --num_processes 2 examples/distil.py --out distilled

Writes `distilled/run`, what a stopped run goes on from (`--resume`), and the trained model, `distilled/model`, for `load_and_run.py`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lite3r_plugin import DistillConfig, apply_lite3r, distill, save_lite3r
from lite3r_plugin.adapter.plugins import find_model
from lite3r_plugin.peft import merge_lora
from lite3r_plugin.scene.data import ViewSets, open_scenes


class Inputs(Dataset[Tensor]):
    """Inputs of the model ``[1, S, 3, H, W]``, without labels: put your own data here."""

    def __init__(self, args: argparse.Namespace, scenes: str, draws: int) -> None:
        self.entry = find_model(args.model)
        self.sets = ViewSets(open_scenes(scenes), args.views, (args.size, args.size), draws=draws)

    def __len__(self) -> int:
        return len(self.sets)

    def __getitem__(self, index: int) -> Tensor:
        return self.entry.normalize(self.sets[index].images)[None]


def main(argv: Sequence[str] | None = None) -> nn.Module:
    """Apply, distil, merge, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the run and for the model")
    parser.add_argument("--model", default="testbed", help="a name of `lite3r adapters`, such as vggt")
    parser.add_argument("--weights", help="a file or a Hub id; by default the published ones")
    parser.add_argument("--scenes", default="procedural:scenes=16,views=8,size=112,seed=1", help="as for `lite3r eval --data`")
    parser.add_argument("--held-out", default="procedural:scenes=2,views=8,size=112,seed=2", help="other scenes, to judge by")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--views", type=int, default=4)
    parser.add_argument("--size", type=int, default=112, help="pixels, a multiple of the model's patches")
    parser.add_argument("--resume", action="store_true", help="go on from what is in the folder")
    args = parser.parse_args(argv)

    machines = PartialState(cpu=not torch.cuda.is_available())  # which of the processes this one is, and on which device
    model = apply_lite3r(find_model(args.model).build(args.weights, machines.device), keep_ratio=0.25)
    data = DataLoader(Inputs(args, args.scenes, draws=4), batch_size=1, shuffle=True, collate_fn=torch.cat)
    config = DistillConfig(steps=args.steps, output_dir=args.out / "run", resume=args.resume, trackers=("jsonl",), log_every=1)
    report = distill(model, data, config, validation=Inputs(args, args.held_out, draws=1))
    merge_lora(model)
    if machines.is_main_process:
        print(report)
        save_lite3r(model, args.out / "model", whole=True)  # whole, since LoRA is in the weights now
    machines.destroy_process_group()
    return model


if __name__ == "__main__":
    main()
