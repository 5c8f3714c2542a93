"""Saving a sharded model: every process gives its shards, one writes, and none waits for one that has failed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch.distributed
from torch import Tensor, nn

from ..errors import CheckpointError, short


def is_sharded(model: nn.Module) -> bool:
    """Whether a parameter or buffer of `model` is a DTensor."""
    return any(is_shard(tensor) for tensor in _tensors(model))


def is_shard(tensor: Tensor) -> bool:
    """Whether `tensor` is a DTensor, told by what it can do: importing its class takes seconds."""
    return hasattr(tensor, "full_tensor")


def writes(sharded: bool) -> bool:
    """Whether this process is the one that writes. Where nothing is sharded each has all there is, and whoever is asked writes."""
    return not sharded or torch.distributed.get_rank() == 0


@contextlib.contextmanager
def together(sharded: bool) -> Iterator[None]:
    """Do something in all processes of a sharded model and end when all have ended.

    Raises:
        CheckpointError: another process has failed.
    """
    if not sharded:
        yield
        return
    error: BaseException | None = None
    try:
        yield
    except BaseException as raised:
        error = raised
        raise
    finally:
        errors: list[str | None] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(errors, None if error is None else short(error))
        if error is None and (failed := [(rank, text) for rank, text in enumerate(errors) if text is not None]):
            raise CheckpointError(f"nothing was saved, because save_lite3r failed on rank {failed[0][0]}: {failed[0][1]}")


def gather(tensors: dict[str, Tensor], writer: bool) -> dict[str, Tensor]:
    """The whole of each tensor on the CPU in the process that writes, nothing in the others. All processes must call it.

    Raises:
        CheckpointError: the processes that hold a tensor are not all there are, so that who waits for whom cannot be known.
    """
    whole: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if is_shard(tensor):
            full: Tensor = tensor.full_tensor()  # pyright: ignore[reportAttributeAccessIssue]
            if writer:
                whole[name] = full.detach().cpu()
        elif writer:
            whole[name] = tensor
    return whole


def check_mesh(tensors: dict[str, Any]) -> None:
    """Raise `CheckpointError` unless every process holds a part of each DTensor: the others could not help to gather it."""
    for name, tensor in tensors.items():
        if is_shard(tensor) and tensor.device_mesh.size() != torch.distributed.get_world_size():
            raise CheckpointError(
                f"{name} is a DTensor of {tensor.device_mesh.size()} of {torch.distributed.get_world_size()} processes: give a model that "
                "is not sharded these weights (torch.distributed.checkpoint.state_dict.get_model_state_dict with full_state_dict=True) "
                "and save that"
            )


def _tensors(model: nn.Module) -> Iterable[Tensor]:
    yield from model.parameters()
    yield from model.buffers()
