"""The FP8 kernels compile for the supported GPU generations on a machine without a GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lite3r_plugin

pytest.importorskip("triton")

PACKAGE = Path(lite3r_plugin.__file__).parents[1]


@pytest.mark.slow
def test_fp8_kernels_compile_ahead_of_time() -> None:
    # A fresh process: Triton decides at import whether kernels are interpreted, as they are in this one.
    script = Path(__file__).with_name("aot.py")
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(Path.home()), "TRITON_DEFAULT_FP_FUSION": "1", "PYTHONPATH": str(PACKAGE)}
    every = torch.cuda.is_available()
    arguments = [*([] if every else ["--some"]), "80", "89", "90"]
    done = subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [done.stdout.count(f"sm_{capability}") for capability in (80, 89, 90)] == ([9, 30, 30] if every else [3, 10, 10])
