"""What must hold for every model with Lite3R, beyond `lite3r_plugin.testing.check_adapter`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from lite3r_plugin import apply_lite3r
from lite3r_plugin.testing import TEST_CONFIG, named_tensors

Run = Callable[[nn.Module], object]


def outputs(model: nn.Module, run: Run) -> dict[str, Tensor]:
    """Every tensor of ``run(model)``, by path."""
    with torch.no_grad():
        return named_tensors(run(model))


def enlarge_layer_scales(model: nn.Module, value: float = 0.3) -> None:
    """Freshly built models hide their blocks behind tiny layer scales; make the blocks count."""
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2] in ("gamma", "lambda1"):
            nn.init.constant_(parameter, value)


def assert_bf16_is_as_exact_as_dense(model: nn.Module, images: Tensor) -> None:
    """At ``keep_ratio=1`` the error to FP32 is at most twice that of the dense BF16 model, for every output."""
    reference = outputs(model, lambda m: m(images))
    dense = copy.deepcopy(model).bfloat16()
    student = apply_lite3r(copy.deepcopy(dense), TEST_CONFIG, keep_ratio=1.0)
    expected, found = (outputs(m, lambda m: m(images.bfloat16())) for m in (dense, student))
    for path, x in reference.items():
        if x.is_floating_point():
            error, allowed = ((y[path].float() - x).norm().item() for y in (found, expected))
            assert error <= 2 * allowed, (path, error, allowed)


def assert_compiled_equals_eager(
    model: nn.Module, run: Callable[[nn.Module, Tensor], object], inputs: Sequence[Tensor], *, dynamic: int = 1, fullgraph: bool = True
) -> None:
    """Sparse, under `torch.compile`, as one graph that serves all `inputs`, which differ in dimension `dynamic`."""
    model = apply_lite3r(copy.deepcopy(model), TEST_CONFIG)
    expected = [outputs(model, lambda m, x=x: run(m, x)) for x in inputs]
    torch._dynamo.reset()
    model.compile(backend="eager", fullgraph=fullgraph)
    for i, x in enumerate(inputs):
        torch._dynamo.mark_dynamic(x, dynamic)
        with torch.compiler.set_stance("fail_on_recompile" if i and fullgraph else "default"):
            found = outputs(model, lambda m, x=x: run(m, x))
        for path, y in found.items():
            torch.testing.assert_close(y, expected[i][path], atol=1e-5, rtol=1e-5, equal_nan=True)
    torch._dynamo.reset()


def assert_threads_do_not_mix(model: nn.Module, runs: tuple[Run, Run], atol: float = 0) -> None:
    """Models with different keep ratios on different inputs, side by side, give what they give alone; one that threads share, too."""
    first, second = (apply_lite3r(copy.deepcopy(model), TEST_CONFIG, keep_ratio=ratio) for ratio in (0.1, 0.6))
    work = [(first, runs[0]), (first, runs[1]), (second, runs[1])]
    alone = [outputs(m, run) for m, run in work]
    with ThreadPoolExecutor(len(work)) as pool:
        together = [pool.submit(lambda m, run: [outputs(m, run) for _ in range(3)], *each) for each in work]
    for expected, found in zip(alone, together, strict=True):
        for repeated in found.result():
            for path, x in expected.items():
                torch.testing.assert_close(repeated[path], x, atol=atol, rtol=0, equal_nan=True)
