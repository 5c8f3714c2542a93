"""What a model carries of Lite3R, found in one walk over its modules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..attention.module import SparseLinearAttention
from ..attention.state import ModelState
from ..config import plain_name
from ..errors import ConfigError, ModelTypeError, NotAppliedError, WeightsError
from ..fp8.blocks import BlockLinear, find_linears
from ..fp8.linear import Fp8Linear
from ..fp8.qat import FakeQuantLinear
from ..runtime.rewrites import lies_outside
from ..wrapper import host_of, is_plain_tensor, is_tuner_layer


@dataclass(frozen=True, repr=False)
class Inventory:
    """The modules of a model, and among them what Lite3R has put there.

    Attributes:
        model: The model.
        modules: All its modules by all their names, as the walk met them. Whoever replaces a module keeps it up to date
            (`wrapper.replace_modules`), so that one walk does for a whole verb.
    """

    model: nn.Module
    modules: dict[str, nn.Module]

    @property
    def name(self) -> str:
        """The class of the model."""
        return type(self.model).__name__

    @property
    def plain_model(self) -> str:
        """The class of the model inside wrappers, such as DDP or `torch.compile`."""
        return type(self.innermost).__name__

    @property
    def innermost(self) -> nn.Module:
        """The model inside wrappers, such as DDP or `torch.compile`."""
        return [module for name, module in self.modules.items() if not plain_name(name)][-1]

    @property
    def attention(self) -> dict[str, SparseLinearAttention]:
        """The attention modules that Lite3R has put in, by fully qualified name; empty when there are none."""
        return {fqn: module for fqn, module in self.modules.items() if isinstance(module, SparseLinearAttention)}

    @property
    def states(self) -> list[ModelState]:
        """What the attention modules share: one state for each call of `apply_lite3r`."""
        return list({id(module.state): module.state for module in self.attention.values()}.values())

    def require_applied(self) -> dict[str, SparseLinearAttention]:
        """`attention`; raises `NotAppliedError` when there is none."""
        attention = self.attention
        if not attention:
            raise NotAppliedError(f"this {self.name} carries no Lite3R; call apply_lite3r(model) first")
        return attention

    def require_one_state(self, verb: str) -> ModelState:
        """The one state; raises `NotAppliedError` if there is none, or if Lite3R was applied to several parts on their own."""
        around = {id(module.state): fqn for fqn, module in self.require_applied().items()}
        if len(around) > 1:
            raise NotAppliedError(
                f"Lite3R was applied to {len(around)} parts of this {self.name} on their own (around {', '.join(around.values())}): "
                f"call {verb} on each of them"
            )
        return self.states[0]

    @property
    def converted(self) -> bool:
        """Whether a Linear of the model is in FP8: what the model is decides, whatever `ModelState` says."""
        return any(isinstance(module, Fp8Linear) for module in self.modules.values())

    def bare_hosts(self, state: ModelState) -> int:
        """How many attention modules of the dense model are back in their places, or still: an interruption left them there."""
        modules = set(self.modules.values())
        return sum(host in modules for host in state.hosts)

    def require_whole(self, state: ModelState, verb: str, *, in_part: bool = False) -> None:
        """Raise `NotAppliedError` unless the model holds all attention modules of `state`, `in_part` those of the dense model."""
        held = len({id(module) for module in self.attention.values() if module.state is state})
        bare = self.bare_hosts(state)
        if held + bare < len(state.hosts):
            raise NotAppliedError(
                f"this {self.name} holds {held} of the {len(state.hosts)} attention modules that Lite3R was applied to: call {verb} on "
                "the whole model (and take modules out of it before apply_lite3r)"
            )
        if bare and not in_part:
            raise NotAppliedError(
                f"{bare} of the {len(state.hosts)} attention modules that Lite3R was applied to are those of the dense model, since "
                f"something was interrupted: remove_lite3r(model) takes out the others; call apply_lite3r again before {verb}"
            )

    def require_rewrites_inside(self, verb: str) -> None:
        """Raise `NotAppliedError` if something outside of the model was rewritten, or it itself, which is then a part of another.

        In what Lite3R was applied to, or around it, a module that was rewritten may have been replaced since.
        """
        inside = set(self.modules.values())
        parts = [state for state in self.states if state.model not in inside]
        if any(lies_outside(item, self.modules) for state in parts for item in state.rewrites):
            raise NotAppliedError(f"this {self.name} is a part of the model that Lite3R was applied to: call {verb} on the whole model")

    def require_ratios(self, verb: str) -> None:
        """Raise `ConfigError` if sites wait for their keep ratios."""
        if any(state.config.waits for state in self.states):
            raise ConfigError(f"keep_ratio is 'auto', and no ratios were chosen yet: call choose_keep_ratios(model, inputs) before {verb}")

    def require_enabled(self, verb: str) -> None:
        """Raise `ConfigError` inside of `lite3r_disabled`, or where adapters of PEFT are switched off."""
        if any(not module.enabled for module in self.modules.values() if isinstance(module, (SparseLinearAttention, FakeQuantLinear))):
            raise ConfigError(f"Lite3R is disabled, in some modules at least: call {verb} outside lite3r_disabled")

    def changed(self, state: ModelState) -> list[nn.Module]:
        """Modules in this model whose weights are no longer those that the host had: they learned, or LoRA was merged into them.

        Where `distill` trained LoRA that PEFT had put around a Linear, that is seen by the weight, once the LoRA is gone.
        """
        inside = set(self.modules.values())
        adapted = {module.base_layer for module in inside if is_tuner_layer(module)}
        merged = [module for module, before in state.adapted if module not in adapted and sums(module) != before]
        return [module for module in dict.fromkeys((*state.changed, *merged)) if module in inside]

    def require_finished(self, state: ModelState, verb: str) -> None:
        """Raise `WeightsError` if a conversion to FP8 was begun and not finished."""
        if (unfinished := self.unfinished(state)) is not None:
            raise WeightsError(f"{unfinished}: finish that before {verb}")

    def unfinished(self, state: ModelState) -> str | None:
        """What is to be said of a conversion to FP8 that failed or was interrupted; None where there was none."""
        if state.phase == "fp8" or not (self.converted or state.config.precision == "fp8"):
            return None
        linears = [linear for linear in self.linears(state) if linear.known]
        done = sum(isinstance(linear.module, Fp8Linear) for linear in linears)
        wanted = sum(isinstance(linear.module, Fp8Linear) or linear.taken_by(state.config) for linear in linears)
        return f"the conversion to FP8 did not finish, {done} of {wanted} Linears are in FP8; convert(model) goes on"

    def linears(self, state: ModelState) -> list[BlockLinear]:
        """The Linears of the transformer blocks that are in this model."""
        names: dict[nn.Module, list[str]] = {}
        for name in state.blocks:
            names.setdefault(state.blocks[name], []).append(name)
        found = {place: names[host] for place, module in self.modules.items() if (host := host_of(module)) in names}
        return find_linears(self.modules, found, state.sites, [f"{fqn}.proj_lin" for fqn in self.attention])


def look_up(model: Any) -> Inventory:
    """Walk over `model`. Raises `ModelTypeError` when it is no module."""
    if not isinstance(model, nn.Module):
        raise ModelTypeError(f"Lite3R takes a torch.nn.Module, got {type(model).__name__}; pass the module inside it")
    return Inventory(model, dict(model.named_modules(remove_duplicate=False)))


def lite3r_modules(model: nn.Module) -> dict[str, SparseLinearAttention]:
    """The attention modules that Lite3R has put into `model`, by fully qualified name; empty when there are none.

    Raises:
        ModelTypeError: `model` is no module.
    """
    return look_up(model).attention


def require_lite3r(model: nn.Module) -> dict[str, SparseLinearAttention]:
    """`lite3r_modules`; raises `NotAppliedError` when there are none."""
    return look_up(model).require_applied()


def sums(module: Any) -> tuple[float, float] | None:
    """By what it is told whether the weight of `module` has changed: two sums of it. None where it is in parts, or without values."""
    weight = module.weight
    if not isinstance(weight, Tensor) or not is_plain_tensor(weight) or weight.is_meta:
        return None
    values = weight.detach().double()
    return float(values.sum()), float(values.square().sum())


def block_linears(model: nn.Module) -> list[Any]:
    """The Linears of the transformer blocks of `model` that FP8 knows, in full precision, in training or in FP8.

    Raises:
        ModelTypeError: `model` is no module.
        NotAppliedError: it carries no Lite3R, or several parts of it do on their own.
    """
    found = look_up(model)
    return [linear.module for linear in found.linears(found.require_one_state("it")) if linear.known]
