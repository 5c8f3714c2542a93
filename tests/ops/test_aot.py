"""All kernels compile for the supported GPU generations on a machine without a GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.parametrize("capability", [80, 89, 90])
def test_kernels_compile_ahead_of_time(capability: int) -> None:
    # A fresh process: Triton decides at import whether kernels are interpreted, as they are in this one.
    script = Path(__file__).with_name("aot.py")
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(Path.home()), "TRITON_DEFAULT_FP_FUSION": "1"}
    done = subprocess.run([sys.executable, str(script), str(capability)], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(f"sm_{capability}") >= 20
