"""The kernel for few rows compiles on a machine without a GPU, and its threads exchange nothing while they read the weight."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import lite3r_plugin

pytest.importorskip("triton")

PACKAGE = Path(lite3r_plugin.__file__).parents[1]


@pytest.mark.slow
def test_the_kernel_compiles_ahead_of_time() -> None:
    # A fresh process: Triton decides at import whether kernels are interpreted, as they are in this one.
    script = Path(__file__).with_name("aot.py")
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(Path.home()), "TRITON_DEFAULT_FP_FUSION": "1", "PYTHONPATH": str(PACKAGE)}
    done = subprocess.run([sys.executable, str(script), "80", "90"], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("exchanged=0 vectors=True loop=True") == 6, done.stdout
