"""With `--bounds`, an interpreted kernel that leaves its tensors fails."""

from __future__ import annotations

from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402


@triton.jit
def _copy_kernel(X, Out, n, read: tl.constexpr):
    """n elements of X into Out, where `read` may be said to be in X."""
    at = tl.arange(0, 16)
    tl.store(Out + at, tl.load(X + at, mask=at < read, other=0.0), mask=at < n)


@pytest.mark.slow
def test_a_kernel_that_leaves_its_tensors_fails(request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("--bounds") or torch.cuda.is_available():
        pytest.skip("needs --bounds and Triton's interpreter")
    x, kernel = torch.randn(10), _copy_kernel[(1,)]  # pyright: ignore[reportIndexIssue]
    out: Any = torch.empty(10)
    kernel(x, out, 10, read=10)
    assert torch.equal(out, x)
    with pytest.raises(Exception, match="_copy_kernel reads outside of its tensors: 1 of 11 elements"):
        kernel(x, out, 10, read=11)
    with pytest.raises(Exception, match="_copy_kernel writes outside of its tensors: 2 of 12 elements"):
        kernel(x, out, 12, read=10)
