"""Which parameters learn."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..apply.lookup import Inventory
from ..apply.ranks import is_shard
from ..attention.branch import why_not_written
from ..attention.module import SparseLinearAttention
from ..config import plain_name
from ..errors import ConfigError, WeightsError
from ..wrapper import Changes, host_of, is_lora
from .config import DistillConfig

PRECISE = (torch.float32, torch.float64)


@dataclass(frozen=True)
class Trainable:
    """The parameters that learn.

    Attributes:
        parameters: They, by the names that they have without wrappers; each once.
        of: How many numbers all parameters of the model hold.
    """

    parameters: Mapping[str, nn.Parameter]
    of: int

    @property
    def count(self) -> int:
        """How many numbers they hold."""
        return sum(parameter.numel() for parameter in self.parameters.values())

    def shared(self, found: Inventory) -> dict[nn.Module, list[nn.Parameter]]:
        """Those of them that are the dense model's own, neither linear branches nor LoRA, by the module that holds them."""
        own = {id(p) for p in self.parameters.values()} - added_parameters(found)
        held = {module: [p for p in module._parameters.values() if id(p) in own] for module in found.modules.values()}
        return {module: [p for p in parameters if p is not None] for module, parameters in held.items() if parameters}

    def freeze(self, model: nn.Module, changes: Changes) -> None:
        """Let these parameters of `model` have gradients and no other; none has one at hand."""
        learning = set(map(id, self.parameters.values()))
        for parameter in model.parameters():
            if (gradient := parameter.grad) is not None:
                drop, give = (functools.partial(setattr, parameter, "grad", value) for value in (None, gradient))
                changes.make(drop, give)
            before, wanted = parameter.requires_grad, id(parameter) in learning
            if before != wanted:
                changes.make(functools.partial(parameter.requires_grad_, wanted), functools.partial(parameter.requires_grad_, before))


def added_parameters(found: Inventory) -> set[int]:
    """The ids of the parameters that are not the dense model's own: linear branches, and LoRA of `add_lora` and of PEFT."""
    branches = {id(site.proj_lin.weight) for site in found.attention.values() if "proj_lin" in site._modules}
    lora = (parameter for layer in filter(is_lora, found.modules.values()) for parameter in layer.named_parameters())
    return branches | {id(parameter) for name, parameter in lora if name.startswith(("lora_A.", "lora_B."))}


def sparse_sites(found: Inventory) -> dict[str, SparseLinearAttention]:
    """The sites of a model that leave something out, each by its first name."""
    first = {module: fqn for fqn, module in reversed(found.attention.items())}
    return {fqn: module for module, fqn in reversed(first.items()) if module.sparse and module.keep_ratio < 1}


def check_branches(found: Inventory, config: DistillConfig) -> None:
    """Raise where what is to learn has no linear branch to train, or one that cannot be trained.

    Raises:
        ConfigError: no site is sparse, or the model has no linear branch.
        WeightsError: a branch has an adapter around it, is on the meta device, or is sharded by another than FSDP2.
    """
    sites = sparse_sites(found)
    if not sites:
        raise ConfigError("no site is sparse (keep_ratio is 1), so student and teacher are the same and there is nothing to learn")
    if config.trainable == "blocks":
        return
    if all("proj_lin" not in site._modules for site in sites.values()):
        raise ConfigError(
            f"trainable={config.trainable!r} trains the linear branch, and linear_branch is 'none': apply_lite3r(model, "
            'linear_branch="marginal"), or distill(..., trainable="blocks")'
        )
    for fqn, site in sites.items():
        if "proj_lin" in site._modules and (reason := why_not_written(site.proj_lin)):
            raise WeightsError(f"{fqn}.proj_lin cannot be trained: it {reason}")


def choose(found: Inventory, config: DistillConfig, lora: Mapping[str, nn.Parameter]) -> Trainable:
    """The parameters that `config` lets learn.

    Args:
        found: A model that `check_branches` has passed.
        config: Of the training.
        lora: The matrices of LoRA that are in the model, by name.

    Raises:
        WeightsError: a parameter is in half precision, on the meta device, made in inference mode, or whole in a sharded model.
    """
    sites = sparse_sites(found)
    chosen: dict[str, Any] = {f"{fqn}.proj_lin.weight": site.proj_lin.weight for fqn, site in sites.items() if "proj_lin" in site._modules}
    if config.trainable == "proj+lora":
        chosen |= lora
    elif config.trainable != "proj":
        adapters = set(map(id, lora.values()))
        for block, module in _blocks(found, sites).items():
            for name, part in module.named_modules(prefix=block):
                if config.trainable == "blocks" or _is_norm(part):
                    chosen |= {f"{name}.{own}": p for own, p in part._parameters.items() if p is not None and id(p) not in adapters}
    named: dict[str, nn.Parameter] = {}
    for name, parameter in chosen.items():
        if parameter.is_floating_point() and not any(parameter is other for other in named.values()):
            named[plain_name(name)] = parameter
    _check(found, named)
    return Trainable(named, sum(p.numel() for p in found.model.parameters()))


def _check(found: Inventory, parameters: Mapping[str, nn.Parameter]) -> None:
    sharded = any(map(is_shard, found.model.parameters()))
    for name, parameter in parameters.items():
        if parameter.is_meta:
            raise WeightsError(f"{name} is on the meta device and has no values to train: load weights first, and train without offloading")
        if parameter.is_inference():
            raise WeightsError(f"{name} was made in torch.inference_mode, where nothing learns: build the model outside of it")
        if parameter.dtype not in PRECISE:
            raise WeightsError(
                f"{name} is in {parameter.dtype}, in which most steps of training round to nothing: train a model in float32, with "
                'mixed_precision="bf16" for speed'
            )
        if sharded and not is_shard(parameter):
            raise WeightsError(f"{name} is whole in a sharded model, where nobody adds up its gradients: put it in before fully_shard")


def _blocks(found: Inventory, sites: Mapping[str, SparseLinearAttention]) -> dict[str, nn.Module]:
    """The transformer blocks around `sites`, by name."""
    hosts = {module for state in found.states for module in state.blocks.values()}
    places = {name: module for name, module in found.modules.items() if host_of(module) in hosts}
    return {name: module for name, module in places.items() if any(f"{fqn}.".startswith(f"{name}.") for fqn in sites)}


def _is_norm(module: nn.Module) -> bool:
    """Whether `module` only scales and shifts what it normalises: its class says so, and it has no more than vectors."""
    parameters = [p for p in module._parameters.values() if p is not None]
    return "norm" in type(module).__name__.lower() and bool(parameters) and all(p.dim() == 1 for p in parameters)
