"""Distillation on two GPUs over NCCL, killed at some time and gone on with."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from distilling import finish, kill, metrics

SCRIPT = Path(__file__).parents[1] / "helpers" / "distilling_on_gpus.py"
STEPS = 24


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    """A run on two GPUs, in a session of its own, so that all of it can be killed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(SCRIPT), str(folder), str(STEPS)]
    return subprocess.Popen([*command, *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)


def steps(folder: Path) -> int:
    """How many were logged so far."""
    file = folder / "metrics.jsonl"
    return len(file.read_text().splitlines()) if file.exists() else 0


@pytest.mark.gpu
def test_two_gpus_that_are_killed_go_on_to_the_same_losses(tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    chance = random.Random(os.getpid())
    runs = {name: start(tmp_path / name) for name in ("whole", "killed")}
    least, until = chance.randint(2, STEPS // 2), time.monotonic() + 240
    while steps(tmp_path / "killed") < least and time.monotonic() < until and runs["killed"].poll() is None:
        time.sleep(0.005)
    time.sleep(chance.random() * 0.05)
    assert runs["killed"].poll() is None, finish(runs["killed"])
    kill(runs["killed"])
    assert steps(tmp_path / "killed") < STEPS
    finish(start(tmp_path / "killed", "resume"))
    finish(runs["whole"])
    whole, killed = metrics(tmp_path / "whole"), metrics(tmp_path / "killed")
    assert list(killed) == list(whole) == list(range(1, STEPS + 1))
    assert list(killed.values()) == pytest.approx(list(whole.values()), rel=1e-4)
