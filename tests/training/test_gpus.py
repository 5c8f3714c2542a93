"""Distillation on two GPUs over NCCL, killed at some time and gone on with."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distilling import finish, metrics

SCRIPT = Path(__file__).parents[1] / "helpers" / "distilling_on_gpus.py"
STEPS = 24


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    """A run on two GPUs."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(SCRIPT), str(folder), str(STEPS)]
    return subprocess.Popen([*command, *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)


@pytest.mark.gpu
def test_two_gpus_that_are_killed_go_on_to_the_same_losses(tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    killed = start(tmp_path / "killed", f"{random.Random(os.getpid()).uniform(2, STEPS / 2):.3f}")
    whole = start(tmp_path / "whole")
    _, error = killed.communicate(timeout=240)
    assert killed.returncode != 0
    assert "SIGKILL" in error, error[-3000:]
    assert len(metrics(tmp_path / "killed")) < STEPS
    finish(start(tmp_path / "killed", "resume"))
    finish(whole)
    expected, found = metrics(tmp_path / "whole"), metrics(tmp_path / "killed")
    assert list(found) == list(expected) == list(range(1, STEPS + 1))
    assert list(found.values()) == pytest.approx(list(expected.values()), rel=1e-4)
