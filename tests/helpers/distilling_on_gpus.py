"""Distil the testbed on all GPUs of a host, over NCCL: what `torchrun` runs for `tests/training/test_gpus.py`.

torchrun --nproc-per-node=2 tests/helpers/distilling_on_gpus.py FOLDER STEPS [resume]
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate import PartialState
from distilling import Slow, logged

from lite3r_plugin import apply_lite3r, distill
from lite3r_plugin.peft import add_lora
from lite3r_plugin.testbed import Testbed


def main(folder: Path, steps: int, resume: bool) -> None:
    """Steps with random images of few tokens, each of which is logged and saved. In FP32, where runs differ by the order of sums alone."""
    state = PartialState(cpu=not torch.cuda.is_available())
    model = apply_lite3r(Testbed.from_pretrained(device=state.device), keep_ratio=0.25, dense_below=0, block_q=32, block_k=16)
    torch.manual_seed(0)
    add_lora(model, rank=4)
    generator = torch.Generator().manual_seed(0)
    data = Slow(torch.rand(1, 4, 3, 112, 112, generator=generator) for _ in range(10))
    distill(model, data, steps=steps, save_every=1, resume=resume, **logged(folder))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), "resume" in sys.argv)
