"""One scene on the GPUs of a host, over NCCL: what `torchrun` runs for `tests/parallel/test_gpus.py`.

torchrun --nproc-per-node=2 tests/helpers/spreading_on_gpus.py found.json cuda
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from spreading import COMPILED, SPARSE, difference, fast_of, images, sparse, two_blocks
from torch import Tensor, nn

from lite3r_plugin.costs.views import GROUP_BYTES
from lite3r_plugin.parallel import ViewParallel, launched, parallelize_views
from lite3r_plugin.runtime.values import tensors_in

BLOCKS = {"block_q": 32, "block_k": 16}


def model(device: torch.device, **fields: Any) -> Any:
    """With four heads."""
    made = two_blocks(heads=4).to(device)
    return sparse(made, **{**SPARSE, **BLOCKS, **fields})


def outputs(one: nn.Module, x: Tensor) -> dict[str, Any]:
    """All heads at once and in four groups, several times over, since what is read too early is mostly right."""
    with torch.no_grad():
        expected = one(x)
        with parallelize_views(one) as parallel:
            whole = one(x)
            parallel.attention.least = 1
            groups = [one(x) for _ in range(20)]
    return {
        "difference": difference(expected, whole), "groups": max(difference(whole, found) for found in groups),
        "again": max(difference(groups[0], found) for found in groups),
    }  # fmt: skip


def gradients(one: nn.Module, x: Tensor) -> dict[str, Any]:
    """Of all parameters together, in relative L2 errors."""

    def backward(parallel: ViewParallel | None) -> Tensor:
        torch.stack([value.float().square().mean() for value in tensors_in(one(x))]).sum().backward()
        if parallel is not None:
            parallel.add_gradients()
        found = torch.cat([parameter.grad.flatten() for parameter in one.parameters() if parameter.grad is not None])
        one.zero_grad()
        return found

    expected, found = backward(None), {}
    with parallelize_views(one) as parallel:
        for name, least in (("whole", GROUP_BYTES), ("groups", 1)):
            parallel.attention.least = least
            found[name] = float((backward(parallel) - expected).norm() / expected.norm())
    return found


def main(path: str, device: str) -> None:
    """See the module."""
    with launched(device) as place:
        x = images(7, size=(64, 96)).to(place.device)
        found: dict[str, Any] = {"outputs": outputs(model(place.device), x), "gradients": gradients(model(place.device), x)}
        compiled = model(place.device, **{**COMPILED, **BLOCKS})
        found["compiled"] = outputs(compiled, x)
        found["report"] = fast_of(compiled).report()
        if place.rank == 0:
            Path(path).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
