"""Lite3R as a method of PEFT: linear branches and LoRA in adapters that are saved, loaded, switched and merged by PEFT."""

from __future__ import annotations

import dataclasses
import functools
import re
import warnings
from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import register_peft_method
from torch import nn

from ..apply.lookup import Inventory, lite3r_modules, look_up
from ..apply.verbs import apply_lite3r, remove_lite3r
from ..attention.branch import BranchLinear
from ..attention.module import SparseLinearAttention
from ..errors import AlreadyAppliedError, CheckpointError, ConfigError, ConvertedError
from ..fp8.qat import FakeQuantLinear
from ..wrapper import Changes
from .config import BRANCH, NAME, Lite3RPeftConfig
from .lora import projections
from .qat_lora import QatLora


class Lite3RTuner(LoraModel):
    """LoRA's tuner, which applies Lite3R before it puts adapters in and switches it off with them.

    Without adapters the model is the dense one, bit for bit. What is merged and unloaded carries Lite3R, with the linear branches of the
    active adapter.
    """

    _switched: tuple[tuple[Any, bool], ...] = ()
    _trained: tuple[tuple[nn.Parameter, bool], ...] = ()
    _active: tuple[str, ...] = ()

    @torch.inference_mode(False)  # what is made here must serve outside of it
    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Put an adapter in. After an error or an interruption of the first one the model is as it was.

        Raises:
            ConfigError: the configuration of Lite3R differs from the one that the model has.
            CheckpointError: the adapter is for another architecture.
            AlreadyAppliedError: the model has LoRA of `add_lora`.
            ConvertedError: weights are in FP8.
            Lite3RError: what `apply_lite3r` raises.
        """
        config: Any = self.peft_config[adapter_name]
        if not isinstance(config, Lite3RPeftConfig):
            raise ConfigError(f"an adapter beside one of Lite3R needs a Lite3RPeftConfig, got a {type(config).__name__}")
        with Changes() as changes:
            if not lite3r_modules(model):
                changes.make(functools.partial(apply_lite3r, model, config.lite3r()), functools.partial(_take_out, model))
            found = look_up(model)
            _fill_branches(found)
            _check(config, found)
            if config.target_modules is None:
                config.target_modules = _pattern(found, config)
            config._register_custom_module({FakeQuantLinear: QatLora})
            if not any(isinstance(module, BaseTunerLayer) for module in model.modules()):
                changes.make(_nothing, functools.partial(_restore, *_snapshot(model)))
            super().inject_adapter(model, adapter_name, *args, **kwargs)

    def disable_adapter_layers(self) -> None:
        """The dense model from now on, bit for bit."""
        if not self._switched:
            modules = [m for m in self.model.modules() if isinstance(m, (SparseLinearAttention, FakeQuantLinear))]
            self._switched = tuple((module, module.enabled) for module in modules)
            self._trained = tuple((parameter, parameter.requires_grad) for parameter in self.model.parameters())
            self._active = tuple(self.active_adapters)
        super().disable_adapter_layers()
        for module, _ in self._switched:
            module.enabled = False

    def enable_adapter_layers(self) -> None:
        """Adapters and Lite3R again. What does not train does not train afterwards, unlike with LoRA alone."""
        super().enable_adapter_layers()
        for module, enabled in self._switched:
            module.enabled = enabled
        if self._active == tuple(self.active_adapters):
            for parameter, trains in self._trained:
                parameter.requires_grad_(trains)
        self._switched, self._trained = (), ()

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> Any:
        """Fold LoRA into the weights and take adapters out. The linear branches of the active adapter stay, in a model with Lite3R."""
        take_out = functools.partial(super().merge_and_unload, *args, **kwargs)
        return self._take_out("merge_and_unload", take_out, lambda layer: True)

    def unload(self) -> Any:
        """Take adapters out, with what they learned, but for LoRA that `merge_adapter` has folded into the weights."""
        return self._take_out("unload", super().unload, lambda layer: layer.merged)

    def _take_out(self, verb: str, take_out: Callable[[], Any], folds: Callable[[BaseTunerLayer], bool]) -> Any:
        """What `take_out` gives, remembering the weights of the layers of which `folds` says that they are others from then on."""
        state = look_up(self.model).require_one_state(verb)
        folded = [module.get_base_layer() for module in self.model.modules() if isinstance(module, BaseTunerLayer) and folds(module)]
        bare = take_out()
        state.changed = (*state.changed, *folded)
        return bare

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter. Where it was the only active one, the first of the others is activated, as PEFT does where there is LoRA."""
        left = [name for name in self.active_adapters if name != adapter_name]
        others = [name for name in self.peft_config if name != adapter_name]
        has_layers = any(isinstance(module, BaseTunerLayer) for module in self.model.modules())
        super().delete_adapter(adapter_name)
        if not left and others and not has_layers:
            warnings.warn(f"Adapter {adapter_name} was active which is now deleted. Setting active adapter to {others[0]}.", stacklevel=2)
        if left or others:
            self.set_adapter(left or others[:1])


def _check(config: Lite3RPeftConfig, found: Inventory) -> None:
    """Raise unless an adapter of this configuration can be put into the model, which carries Lite3R."""
    state = found.require_one_state("get_peft_model")
    found.require_whole(state, "get_peft_model")
    if found.converted:
        raise ConvertedError("weights are in FP8, beside which no adapter can be switched: use adapters before convert(model)")
    if state.lora:
        raise AlreadyAppliedError("this model has LoRA of add_lora: fold it in by merge_lora(model) before get_peft_model")
    own, wanted = state.config.settled, config.lite3r().settled
    if differing := [f.name for f in dataclasses.fields(own) if getattr(own, f.name) != getattr(wanted, f.name)]:
        raise ConfigError(
            f"the model carries Lite3R with {', '.join(f'{name}={getattr(own, name)!r}' for name in differing)}, which all of its adapters "
            "share, but this adapter has other values: Lite3RPeftConfig.of(model, ...) takes those of the model"
        )
    if config.model_adapter not in (None, state.adapter):
        raise CheckpointError(
            f"this adapter is for a model that the Lite3R adapter {config.model_adapter!r} knows, but this {found.name} is known to "
            f"{state.adapter!r}"
        )
    config.model_adapter = state.adapter


def _pattern(found: Inventory, config: Lite3RPeftConfig) -> str:
    """A regular expression for the names of the Linears that LoRA goes around: PEFT takes a name for the end of one as well."""
    wanted = {linear.module if linear.tuner is None else linear.tuner for linear in projections(found, config.lora_scopes)}
    return "|".join(re.escape(name) for name, module in found.modules.items() if module in wanted)


def _fill_branches(found: Inventory) -> None:
    """Put branches where their hosts are: PEFT makes everything on the meta device while it loads with ``low_cpu_mem_usage``."""
    for module in found.attention.values():
        branch = module._modules.get(BRANCH)
        like = next((parameter for parameter in module.host.parameters() if not parameter.is_meta), None)
        if isinstance(branch, BranchLinear) and branch.weight.is_meta and like is not None:
            branch._parameters["weight"] = nn.Parameter(torch.zeros_like(branch.weight, device=like.device))


def _take_out(model: nn.Module) -> None:
    if lite3r_modules(model):
        remove_lite3r(model)


def _nothing() -> None:
    pass


Tables = list[tuple[nn.Module, dict[str, Any]]]
Flags = list[tuple[nn.Parameter, bool]]


def _snapshot(model: nn.Module) -> tuple[Tables, Flags]:
    """The children of all modules, and which parameters train."""
    return [(module, dict(module._modules)) for module in model.modules()], [(p, p.requires_grad) for p in model.parameters()]


def _restore(tables: Tables, flags: Flags) -> None:
    for module, children in tables:
        module._modules.clear()
        module._modules.update(children)
    for parameter, trains in flags:
        parameter.requires_grad_(trains)


register_peft_method(name=NAME.lower(), config_cls=Lite3RPeftConfig, model_cls=Lite3RTuner, prefix="lora_")
