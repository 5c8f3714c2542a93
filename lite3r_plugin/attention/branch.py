"""The projection of the linear branch: how it is made, and how its weight is read and written, whatever is around it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..adapter.sites import AttentionSite
from ..errors import WeightsError
from ..ops.dispatch import without_autocast
from ..wrapper import active_copy, is_plain_tensor, may_be_read, must_be_called


class BranchLinear(nn.Linear):
    """The ``[D, D]`` map of a linear branch, without bias. It starts, and after `reset_parameters` starts again, at zero."""

    def __init__(self, dim: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(dim, dim, bias=False, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Zero: the branch adds nothing."""
        nn.init.zeros_(self.weight)


def make_branch(host: nn.Module, dim: int) -> BranchLinear:
    """A projection ``[dim, dim]`` for the attention module `host`, in FP32: steps of training are smaller than those of half precision.

    It is where the host computes, which is not where its weights are while they are offloaded. (FP64 for an FP64 host.)
    """
    like = next((p for p in host.parameters() if p.is_floating_point()), None)
    dtype = torch.float64 if like is not None and like.dtype == torch.float64 else torch.float32
    device = torch.device("cpu") if like is None else like.device
    if device.type == "meta":
        device = _device_of_calls(host) or device
    return BranchLinear(dim, device, dtype).train(host.training)


def branch_weight(branch: nn.Module, like: Tensor, site: AttentionSite) -> Tensor:
    """The weight ``[D, D]`` by which `branch` maps, with gradients.

    Where it is more than a Linear with a plain weight, it is what `branch` does to the unit vectors: adapters, quantised and
    sharded weights, and hooks that load weights for a call are then all taken along.

    Args:
        branch: The projection, or what was put in its place.
        like: ``[..., D]``, a tensor that the branch is for: it has its device.
        site: Whose projection it is. Only an error looks at its name, lest code that is compiled for one site depend on it.

    Raises:
        WeightsError: there are no values.
    """
    if type(branch) not in (BranchLinear, nn.Linear) and not must_be_called(branch):
        branch = active_copy(branch)
    stored: Any = branch.weight
    if type(branch) in (BranchLinear, nn.Linear) and may_be_read(branch):
        if stored.is_meta and not like.is_meta:
            raise WeightsError(
                f"{site.fqn}.proj_lin.weight is on the meta device and has no values: load weights first; a model that is to be offloaded "
                "block by block goes through apply_lite3r before"
            )
        return stored
    if _is_dtensor(stored) and not must_be_called(branch):
        return stored.full_tensor()
    dtype = stored.dtype if isinstance(stored, Tensor) and stored.is_floating_point() else like.dtype
    units = torch.eye(like.shape[-1], device=like.device, dtype=dtype)
    with without_autocast(like):
        return branch(units).mT


def why_not_written(branch: nn.Module) -> str | None:
    """The reason why `write_branch` cannot write the weight of `branch`, or None when it can."""
    branch = active_copy(branch)
    if not isinstance(branch, nn.Linear):
        return f"has an adapter around it ({type(branch).__name__}): merge it first"
    weight = branch._parameters.get("weight")
    if weight is None or tuple(weight.shape) != (branch.out_features, branch.in_features):
        return "does not hold its whole weight: do this before the model is sharded (or shard it by fully_shard of FSDP2)"
    if weight.is_meta:
        return "is on the meta device and has no values to replace: do this before weights are offloaded, or load them first"
    if not is_plain_tensor(weight) and not _is_dtensor(weight):
        return f"is a {type(weight).__name__}: do this before weights are quantised"
    return None


@torch.no_grad()
def write_branch(branch: nn.Module, weight: Tensor) -> None:
    """Let `weight` ``[D, D]`` be the weight of `branch`, that of the active adapter where PEFT holds a copy for each.

    Of a DTensor, of which each process holds a part, that of the first one counts.
    """
    own: Any = active_copy(branch).weight
    weight = weight.to(own.device, own.dtype)
    if _is_dtensor(own):
        from torch.distributed.tensor import distribute_tensor

        weight = distribute_tensor(weight, own.device_mesh, own.placements)
    own.copy_(weight)


def _is_dtensor(tensor: Any) -> bool:
    if not isinstance(tensor, Tensor) or is_plain_tensor(tensor):
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def _device_of_calls(host: nn.Module) -> torch.device | None:
    """Where `host`, whose weights are on the meta device, computes if hooks bring them in for each call; None if there are no hooks."""
    hooked = [module for module in host.modules() if must_be_called(module)]
    for module in hooked:  # as accelerate says it
        hook = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", (hook,)):
            if (device := getattr(one, "execution_device", None)) is not None:
                return torch.device(device)
    return torch.device("cpu") if hooked else None
