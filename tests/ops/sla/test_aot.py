"""All kernels compile for the supported GPU generations on a machine without a GPU, and so do the operator's own launches."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lite3r_plugin

pytest.importorskip("triton")


def script(name: str, *arguments: str) -> str:
    """What a script of this folder prints in a fresh process: Triton decides at import whether kernels are interpreted, as in this one."""
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(Path.home()), "TRITON_DEFAULT_FP_FUSION": "1"}
    environment["PYTHONPATH"] = str(Path(lite3r_plugin.__file__).parents[1])  # the same package as here
    command = [sys.executable, str(Path(__file__).with_name(name)), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_kernels_compile_ahead_of_time() -> None:
    """Every third for the oldest generation, since the next test compiles for the others; on a GPU all, for two of them.

    With nothing cached compilation takes a second each.
    """
    every = torch.cuda.is_available()
    compiled = script("aot.py", *(["80", "90"] if every else ["--some", "80"]))
    for capability in (80, 90) if every else (80,):
        assert compiled.count(f"sm_{capability}") >= (40 if every else 15)


@pytest.mark.parametrize(("capability", "cases", "others"), [(89, 5, 5), (90, 9, 5)])
def test_the_operator_compiles_and_fits(capability: int, cases: int, others: int) -> None:
    """With the arguments of real launches; as many of them for a long sequence as for a short one.

    Without a GPU one that fits into the smaller one too is compiled for one of the two, but the first, for both.
    """
    every = torch.cuda.is_available()
    report = json.loads(script("launches.py", str(capability), *([] if every else ["--in-turn"])))
    assert len(report) == (cases if every else others)
    for case in report:
        assert case["shared"] <= case["allowed"], case["case"]
        assert case["as_many_when_long"], case["case"]
        streams = capability == 90 and case["case"].endswith("all learns") and "float32" not in case["case"] and " 64 " in case["case"]
        assert case["tma"] == (["_dkv_kernel", "_dmeans_kernel", "_dq_kernel"] if streams else [])
        marginal = "marginal" in case["case"]
        assert len(case["forward"]) <= 6 + marginal
        assert len(case["backward"]) == {"all": 13 + 2 * marginal, "proj": 1, "nothing": 0}[case["case"].split()[-2]]
