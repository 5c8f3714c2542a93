"""The configuration that PEFT keeps of an adapter: LoRA's, and Lite3R's beside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from peft import LoraConfig
from peft.utils import PeftType
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import nn

from ..apply.lookup import look_up
from ..config import CONFIG_VERSION, DenseAttention, Fp8Backend, Fp8Filter, Lite3RConfig, Pin, Precision, Preset, Scope, Weights
from ..errors import ConfigError, shown
from ..ops.options import Backend, ConfigBlockChoice, FeatureMap, LinearBranch, check_choice

NAME = "LITE3R"
BRANCH = "proj_lin"

if NAME not in PeftType.__members__:  # a closed enumeration, and what register_peft_method takes is one of it
    _member = str.__new__(PeftType, NAME)
    _member._name_ = _member._value_ = NAME
    _member.__objclass__ = PeftType  # pyright: ignore[reportAttributeAccessIssue]
    PeftType._member_map_[NAME] = PeftType._value2member_map_[NAME] = _member
    PeftType._member_names_.append(NAME)
    type.__setattr__(PeftType, NAME, _member)


@dataclass
class Lite3RPeftConfig(LoraConfig):
    """Of an adapter for `peft.get_peft_model` that holds linear branches, and LoRA beside them.

    `get_peft_model` applies Lite3R if the model does not carry it yet. The adapter has its own copy of every `proj_lin`, in PEFT's
    `modules_to_save`, and `peft.PeftModel.from_pretrained` brings everything back on the dense model.

    It has the fields of `peft.LoraConfig` and those of `Lite3RConfig`, of which all adapters of one model share the values.

    Attributes:
        keep_ratio: As in `Lite3RConfig`. Of a mapping it holds pairs: the order counts, and PEFT sorts what it writes.
        target_modules: Where LoRA goes, as PEFT takes it. None: around the projections of the attention sites of `lora_scopes`, as
            `add_lora` does; their names then take its place, as a pattern.
        lora_scopes: See there; ``()`` for linear branches alone.
        model_adapter: Name of the Lite3R adapter that knows the model; filled in.
        version: Of the fields of Lite3R.

    Raises:
        ConfigError: a field has a value that it does not take.
    """

    keep_ratio: float | Mapping[str, float] | Literal["auto"] | list[list[Any]] = Lite3RConfig.keep_ratio
    negligible_ratio: float = Lite3RConfig.negligible_ratio
    scopes: tuple[Scope, ...] | Literal["auto"] = Lite3RConfig.scopes
    exclude: tuple[str, ...] = Lite3RConfig.exclude
    linear_branch: LinearBranch = Lite3RConfig.linear_branch
    feature_map: FeatureMap = Lite3RConfig.feature_map
    block_means: bool = Lite3RConfig.block_means
    block_choice: ConfigBlockChoice = Lite3RConfig.block_choice
    pin: Pin = Lite3RConfig.pin
    dense_below: int | None = Lite3RConfig.dense_below
    fuse: bool = Lite3RConfig.fuse
    exact_rewrites: bool = Lite3RConfig.exact_rewrites
    attention_backend: Backend = Lite3RConfig.attention_backend
    block_q: int = Lite3RConfig.block_q
    block_k: int = Lite3RConfig.block_k
    precision: Precision = Lite3RConfig.precision
    fp8_backend: Fp8Backend = Lite3RConfig.fp8_backend
    fp8_filter: Fp8Filter = Lite3RConfig.fp8_filter
    preset: Preset | None = Lite3RConfig.preset
    weights: Weights | None = Lite3RConfig.weights
    keep_originals: bool = Lite3RConfig.keep_originals
    compile_blocks: bool | None = Lite3RConfig.compile_blocks
    dense_attention: DenseAttention | None = Lite3RConfig.dense_attention
    cuda_graphs: bool | None = Lite3RConfig.cuda_graphs
    graph_shapes: int = Lite3RConfig.graph_shapes
    max_memory: int | str | None = Lite3RConfig.max_memory
    lora_scopes: tuple[Scope, ...] = ("global", "frame")
    model_adapter: str | None = None
    version: int = CONFIG_VERSION

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType[NAME]
        if self.version != CONFIG_VERSION:
            raise ConfigError(f"configuration version {shown(self.version)} is not {CONFIG_VERSION}; it was written by another release")
        for name in ("scopes", "exclude", "fp8_filter", "lora_scopes"):  # a file holds lists
            if isinstance(getattr(self, name), list):
                setattr(self, name, tuple(getattr(self, name)))
        if callable(self.fp8_filter):
            raise ConfigError(
                'fp8_filter of an adapter is "inner" or a tuple of patterns of names of Linears, which a file can hold; for those that a '
                "function chooses call apply_lite3r first, and take Lite3RPeftConfig.of(model)"
            )
        if not isinstance(self.lora_scopes, tuple):
            raise ConfigError(f"lora_scopes is a tuple of {get_args(Scope)}, got {shown(self.lora_scopes)}")
        for scope in self.lora_scopes:
            check_choice("lora_scopes", scope, get_args(Scope))
        if isinstance(self.keep_ratio, Mapping):
            self.keep_ratio = [[pattern, ratio] for pattern, ratio in self.keep_ratio.items()]
        config = self.lite3r()
        if config.precision == "fp8":
            raise ConfigError('precision of an adapter is "full" or "fp8_qat": merge what was trained, and then call convert(model)')
        if self.bias != "none":
            raise ConfigError(f"bias={self.bias!r}: an adapter of Lite3R holds no biases of the model; name modules in modules_to_save")
        if config.linear_branch == "none" and not self.lora_scopes and self.target_modules is None:
            raise ConfigError('with linear_branch="none" and lora_scopes=() there is nothing that the adapter could hold')
        if config.linear_branch != "none":
            self.modules_to_save = sorted({*(self.modules_to_save or ()), BRANCH})
        if self.target_modules is None and not self.lora_scopes:
            self.target_modules = DUMMY_TARGET_MODULES

    def lite3r(self) -> Lite3RConfig:
        """The configuration for `apply_lite3r`. Raises `ConfigError` where a field has a value that it does not take."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(Lite3RConfig)}
        if isinstance(self.keep_ratio, list):
            try:
                fields["keep_ratio"] = dict(self.keep_ratio)
            except (TypeError, ValueError) as error:
                raise ConfigError(f"keep_ratio is a number or ratios by patterns of names, got {shown(self.keep_ratio)}") from error
        return Lite3RConfig(**fields)

    @classmethod
    def of(cls, model: nn.Module, **fields: Any) -> Lite3RPeftConfig:
        """One for a model that carries Lite3R already, calibrated perhaps: with its configuration.

        Args:
            model: The model.
            **fields: Further fields, such as ``r``.

        Raises:
            ModelTypeError: `model` is no `torch.nn.Module`.
            NotAppliedError: the model carries no Lite3R, or several parts of it do on their own.
        """
        config = look_up(model).require_one_state("Lite3RPeftConfig.of").config
        return cls(**{field.name: getattr(config, field.name) for field in dataclasses.fields(config)}, **fields)
