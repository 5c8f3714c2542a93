"""The processes that `torchrun` started, for commands that run in all of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from ..errors import InputError, short

HOW = "torchrun --nproc-per-node=N -m lite3r_plugin ..."


@dataclass(frozen=True)
class Place:
    """Where this process stands.

    Attributes:
        rank: Its number; the first one, 0, is the one that speaks and writes.
        size: How many there are.
        device: Its device.
    """

    rank: int
    size: int
    device: torch.device


@contextlib.contextmanager
def launched(device: str) -> Iterator[Place]:
    """The processes of `torchrun`, in a process group of NCCL or gloo, which ends with the context.

    Args:
        device: ``"cuda"``: the GPU of each by its number on its host; ``"cpu"``; or ``"auto"``, that GPU where there are any.

    Raises:
        InputError: `torchrun` did not start this process, or the device is none of these, or there are fewer GPUs than processes.
    """
    local = dist.get_node_local_rank(-1)  # pyright: ignore[reportPrivateImportUsage]
    if local < 0:
        raise InputError(f"views are spread over processes, which torchrun starts: {HOW}")
    if device not in ("auto", "cpu", "cuda"):
        raise InputError(f"with several processes --device is auto, cpu or cuda, each process has a GPU of its own, got {device[:40]!r}")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    where = torch.device("cpu")
    if device == "cuda":
        if local >= torch.cuda.device_count():
            raise InputError(f"process {local} of this host has no GPU, there are {torch.cuda.device_count()}: start as many as there are")
        where = torch.device("cuda", local)
        torch.cuda.set_device(where)
    try:
        dist.init_process_group("nccl" if where.type == "cuda" else "gloo")
    except ValueError as error:  # not all is there that a launcher tells
        raise InputError(f"views are spread over processes, which torchrun starts: {HOW} ({short(error)})") from error
    try:
        yield Place(dist.get_rank(), dist.get_world_size(), where)
    finally:
        dist.destroy_process_group()
