"""What must hold for every model with Lite3R, beyond `lite3r_plugin.testing.check_adapter`."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Sequence

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
    """Two models with different keep ratios on different inputs, side by side, give what they give alone."""
    models = [apply_lite3r(copy.deepcopy(model), TEST_CONFIG, keep_ratio=ratio) for ratio in (0.1, 0.6)]
    expected = [outputs(m, run) for m, run in zip(models, runs, strict=True)]
    found: list[list[dict[str, Tensor]]] = [[], []]

    def work(i: int) -> None:
        found[i] += [outputs(models[i], runs[i]) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for alone, repeated in zip(expected, found, strict=True):
        assert len(repeated) == 3
        for together in repeated:
            for path, x in alone.items():
                torch.testing.assert_close(together[path], x, atol=atol, rtol=0, equal_nan=True)
