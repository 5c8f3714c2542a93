"""CUDA graphs: a forward recorded once and replayed without launching its kernels one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .device import release_memory


def capture(call: Callable[[], Any], device: torch.device) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Capture a call into a CUDA graph, after two calls on a side stream, as `torch.cuda.graphs` asks for.

    The peak of memory (`lite3r_plugin.runtime.device.peak`) is counted anew from the capture on.

    Args:
        call: Reads and writes the same tensors in every call, and never waits for the GPU.
        device: A CUDA device.

    Returns:
        The graph, and the outputs of `call`, which every ``graph.replay()`` writes.

    Raises:
        RuntimeError: something inside cannot be captured.
    """
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream(device).wait_stream(stream)
    release_memory(device)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            outputs = call()
    except RuntimeError:
        # The GPU's generator of random numbers stays in a capture that failed, and refuses every later call; one that succeeds frees it.
        with torch.cuda.device(device), torch.cuda.graph(torch.cuda.CUDAGraph()):
            torch.zeros(1, device=device)
        raise
    return graph, outputs
