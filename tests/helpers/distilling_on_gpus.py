"""Distil the testbed on all GPUs of a host, over NCCL: what `torchrun` runs for `tests/training/test_gpus.py`.

torchrun --nproc-per-node=2 tests/helpers/distilling_on_gpus.py FOLDER STEPS [resume | KILLED_AFTER]
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch
from accelerate import PartialState
from distilling import Slow, logged

from lite3r_plugin import apply_lite3r, distill
from lite3r_plugin.apply.lookup import lite3r_modules
from lite3r_plugin.peft import add_lora
from lite3r_plugin.testbed import Testbed


def die(folder: Path, steps: float) -> None:
    """Kill this process when so many steps were logged; what is behind the point is a part of the time that one took."""
    begun, log = time.monotonic(), folder / "metrics.jsonl"
    while not log.exists() or log.read_text().count("\n") < int(steps):
        time.sleep(0.001)
    time.sleep((steps % 1) * (time.monotonic() - begun) / steps)
    os.kill(os.getpid(), signal.SIGKILL)


def main(folder: Path, steps: int, how: str) -> None:
    """Steps with random images of few tokens, each of which is logged and saved.

    In FP32, where runs differ by the order of sums alone; and with all blocks and a branch that is wrong at first: which blocks are kept is
    decided by that order where two score alike, and then a loss differs by percents.
    """
    state = PartialState(cpu=not torch.cuda.is_available())
    model = apply_lite3r(Testbed.from_pretrained(device=state.device), keep_ratio=0.99, dense_below=0, linear_branch="all")
    torch.manual_seed(0)
    for site in lite3r_modules(model).values():
        if hasattr(site, "proj_lin"):
            torch.nn.init.normal_(site.proj_lin.weight, std=0.05)
    add_lora(model, rank=4)
    generator = torch.Generator().manual_seed(0)
    data = Slow(torch.rand(1, 4, 3, 112, 112, generator=generator) for _ in range(10))
    if how not in ("", "resume"):
        threading.Thread(target=die, args=(folder, float(how)), daemon=True).start()
    distill(model, data, steps=steps, save_every=1, resume=how == "resume", **logged(folder))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), "".join(sys.argv[3:]))
