"""Launches of forms that were found before are those that Triton would make."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from lite3r_plugin.ops import launch as module  # noqa: E402
from lite3r_plugin.ops.launch import launch  # noqa: E402


@triton.jit(do_not_specialize=["shift"])
def _add_kernel(X, Out, More, n, stride, shift, FACTOR: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + at * stride, mask=at < n, other=0.0).to(tl.float32)
    if More is not None:
        x += tl.load(More)
    tl.store(Out + at, (x * FACTOR + shift).to(Out.dtype.element_ty), mask=at < n)


def add(x: torch.Tensor, factor: int = 2, shift: float = 0.5, more: torch.Tensor | None = None) -> torch.Tensor:
    out = torch.full_like(x, float("nan"), memory_format=torch.contiguous_format)
    launch(_add_kernel, (-(-len(x) // 64),), x, out, more, len(x), x.stride(0), shift, FACTOR=factor, BLOCK=64, num_warps=1)
    return out


CASES: list[Any] = [
    lambda x: (x[:128], {}),
    lambda x: (x[:128], dict(shift=2.0)),
    lambda x: (x[:128], dict(shift=2)),  # an integer where a number with a fraction was: a form of its own
    lambda x: (x[1:129], {}),  # not aligned
    lambda x: (x[:127], {}),
    lambda x: (x[:1], {}),
    lambda x: (x[:128:16], {}),
    lambda x: (x[:128:2], {}),
    lambda x: (x[:128].bfloat16(), {}),
    lambda x: (x[:128], dict(factor=3)),
    lambda x: (x[:128], dict(more=x[5:6])),
]


def check(device: str) -> None:
    x = torch.arange(256, device=device, dtype=torch.float32)
    for _ in range(3):
        for make in CASES:
            given, options = make(x)
            wanted = ((given.float() + options.get("more", 0)) * options.get("factor", 2) + options.get("shift", 0.5)).to(given.dtype)
            assert torch.equal(add(given, **options), wanted)


def test_on_a_cpu_triton_interprets_each_launch() -> None:
    check("cpu")


@pytest.mark.gpu
def test_a_form_that_was_found_runs_without_triton_looking_at_arguments_again() -> None:
    with mock.patch.dict(module._forms, clear=True), torch.cuda.device(0):
        check("cuda")
        count = len(module._forms)
        assert count == len(CASES) - 1  # a number with a fraction has no form of its own
        with mock.patch.object(_add_kernel, "run", side_effect=AssertionError("Triton looked")):
            check("cuda")
        assert len(module._forms) == count
        with mock.patch.object(module, "MOST_FORMS", count):
            add(torch.ones(40, device="cuda"))
        assert len(module._forms) == 1  # bounded
        check("cuda")
