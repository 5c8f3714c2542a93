"""What other libraries (PEFT) put around modules to adapt them, told by the names of its children: none of them is imported."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn


def is_tuner_layer(module: nn.Module) -> bool:
    """Whether `module` adapts another one, its `base_layer`."""
    return "base_layer" in module._modules


def is_lora(module: nn.Module) -> bool:
    """Whether `module` adds a product of two small matrices, `lora_B` and `lora_A`, to what its `base_layer` gives."""
    return is_tuner_layer(module) and {"lora_A", "lora_B"} <= set(module._modules.keys())


def keeps_copies(module: nn.Module) -> bool:
    """Whether `module` stands for its `original_module`, of which each adapter has a copy of its own (`modules_to_save` of PEFT)."""
    return {"original_module", "modules_to_save"} <= set(module._modules.keys())  # no view where it is scripted


def active_copy(module: nn.Module) -> nn.Module:
    """`module`, or of one that keeps copies the one that runs."""
    if not keeps_copies(module):
        return module
    copies: Any = module.modules_to_save
    names = [] if module.disable_adapters else list(module.active_adapters)  # pyright: ignore[reportArgumentType, reportCallIssue]
    running: Any = copies[names[0]] if names and names[0] in copies else module.original_module
    return running


def around_and_itself(name: str) -> Iterator[str]:
    """The names of all modules around one, the outermost first, and its own."""
    yield ""
    for end in (i for i, character in enumerate(name) if character == "."):
        yield name[:end]
    if name:
        yield name


def tuner_around(modules: Mapping[str, nn.Module], around: Iterable[str]) -> nn.Module | None:
    """The first of the modules named `around` that adapts what is inside, or keeps copies of it (`modules_to_save` of PEFT); or None."""
    for module in map(modules.__getitem__, around):
        if is_tuner_layer(module) or keeps_copies(module):
            return module
    return None


def belongs_to_tuner(modules: Mapping[str, nn.Module], name: str, around: Iterable[str]) -> bool:
    """Whether the module `name`, inside of those named `around`, is a part of what adapts another module, and not of that module."""
    insides = (name.removeprefix(outer).strip(".").split(".")[0] for outer in around if is_tuner_layer(modules[outer]))
    return any(inside != "base_layer" for inside in insides)


def configs_of_tuners(modules: Iterable[nn.Module]) -> list[Any]:
    """The configurations of adapters in `modules` that hold Lite3R's fields too, which PEFT writes beside their weights."""
    tables = (vars(module).get("peft_config") for module in modules)
    configs = {id(config): config for table in tables if isinstance(table, Mapping) for config in table.values()}
    return [config for config in configs.values() if hasattr(config, "keep_ratio") and hasattr(config, "lora_scopes")]
