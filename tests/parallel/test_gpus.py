"""One scene on two GPUs over NCCL, against one: what travels beside work is there when it is read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HELPERS = Path(__file__).parents[1] / "helpers"


@pytest.mark.gpu
def test_two_gpus_give_what_one_gives(tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    path = tmp_path / "found.json"
    start = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    process = subprocess.run(
        [*start, str(HELPERS / "spreading_on_gpus.py"), str(path), "cuda"], capture_output=True, text=True, timeout=540, check=False
    )
    assert process.returncode == 0, process.stderr[-3000:]
    found = json.loads(path.read_text())
    for name in ("outputs", "compiled"):
        assert found[name]["difference"] < 5e-3
        assert found[name]["groups"] < 5e-3
        assert found[name]["again"] == 0
    assert found["report"] == ["6 blocks compiled"]
    assert max(found["gradients"].values()) < 1e-2
