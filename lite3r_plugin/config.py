"""The one configuration object: frozen, validated, JSON round trip."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, get_args

from .errors import ConfigError
from .ops.options import Backend, FeatureMap, LinearBranch, check_choice, check_ratio

Scope = Literal["global", "frame", "encoder"]
Precision = Literal["full", "fp8_qat", "fp8"]
Fp8Backend = Literal["auto", "torch", "te", "weight_only", "emulated"]

CONFIG_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Lite3RConfig:
    """What `apply_lite3r` does to a model.

    Attributes:
        keep_ratio: Share of the key blocks that each query block attends to exactly, in (0, 1]. It is SLA's
            ``topk`` and ``1 - sparsity``. Blocks that are always kept (see ``keep_special_tokens`` and
            ``keep_reference_view``) come on top. 1 is dense attention.
        site_keep_ratios: Other keep ratios for single sites, by fully qualified name.
        negligible_ratio: Share of the same key blocks that count for nothing, those with the lowest scores, in [0, 1] (SLA's third
            class, arXiv 2509.24006): they have no part in block means and the ``"marginal"`` linear branch. 0: none. Blocks
            that ``keep_ratio`` keeps come first: what it leaves is the most that can be negligible.
        scopes: Which kinds of attention become sparse. ``"auto"``: the global (cross-view) sites where the model has
            any, else every site, as in a single-image backbone.
        linear_branch: What the linear branch sums over: ``"all"`` tokens (Lite3R, arXiv 2605.11354), only the blocks
            that are neither critical nor negligible, ``"marginal"`` (SLA, arXiv 2509.24006, Eq. 5), or ``"none"``. Its output goes
            through ``proj_lin``, which starts at zero: it costs time and changes nothing until `calibrate` has fitted it. Fitted,
            ``"marginal"`` gains much more (benchmarks/quality.md) and takes about a twentieth more time.
        feature_map: The kernel feature map of the linear branch, softmax over the head dimension or elu + 1.
        block_means: Each block that is neither critical nor negligible enters the softmax as one key: its mean key and value, weighted
            by its size. Needs no training; takes 40 to 50 % off the change of depth on the testbed (benchmarks/quality.md).
        keep_special_tokens: Camera, register and class tokens attend to all tokens and all attend to them.
        keep_reference_view: The same for the patches of the first view, which defines the coordinate frame.
        dense_below: Sites with fewer tokens than this run dense, because sparse attention does not pay there.
            ``None``: where measurements say so for the length and density at hand (`lite3r_plugin.costs.attention.break_even`).
        fuse: Replace QK norm and rotary embedding of known sites by one exact kernel, also at sites that stay dense.
        backend: ``"triton"`` kernels, ``"torch"`` operators, or ``"auto"``: Triton where it can run.
        block_q, block_k: Tokens per query and per key block.
        precision: Of the Linears inside the transformer blocks. ``"full"``: as they are. ``"fp8_qat"``: their inputs and
            weights, and `proj_lin`, are rounded to FP8 in the forward pass, for training; `convert` makes it real.
            ``"fp8"``: `apply_lite3r` converts at once.
        fp8_backend: What runs the Linears of a converted model: ``"torch"`` (`torch._scaled_mm`, compute capability 8.9
            and later), ``"te"`` (TransformerEngine), ``"weight_only"`` (compute capability 8.0 and later: memory, not
            speed), ``"emulated"`` (anywhere, slow), or ``"auto"``: the fastest that can run. With ``"fp8_qat"`` and
            ``"te"``, `proj_lin` trains in TransformerEngine where that can run.

    Raises:
        ConfigError: a field has a value that it does not take.
    """

    keep_ratio: float = 0.25
    site_keep_ratios: Mapping[str, float] = dataclasses.field(default_factory=dict)
    negligible_ratio: float = 0.0
    scopes: tuple[Scope, ...] | Literal["auto"] = "auto"
    linear_branch: LinearBranch = "marginal"
    feature_map: FeatureMap = "softmax"
    block_means: bool = True
    keep_special_tokens: bool = True
    keep_reference_view: bool = True
    dense_below: int | None = None
    fuse: bool = True
    backend: Backend = "auto"
    block_q: int = 128
    block_k: int = 64
    precision: Precision = "full"
    fp8_backend: Fp8Backend = "auto"

    def __post_init__(self) -> None:
        check_ratio("keep_ratio", self.keep_ratio)
        if not isinstance(self.site_keep_ratios, Mapping):
            raise ConfigError(f"site_keep_ratios maps site names to ratios, got {self.site_keep_ratios!r}")
        for fqn, ratio in self.site_keep_ratios.items():
            if not isinstance(fqn, str):
                raise ConfigError(f"site_keep_ratios maps site names to ratios, got the name {fqn!r}")
            check_ratio(f"site_keep_ratios[{fqn!r}]", ratio)
        object.__setattr__(self, "site_keep_ratios", dict(self.site_keep_ratios))
        ratio = self.negligible_ratio
        if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 <= ratio <= 1:
            raise ConfigError(f"negligible_ratio must be in [0, 1], got {ratio!r}; 0.1 leaves out the last tenth of the key blocks")
        if self.scopes != "auto":
            if not isinstance(self.scopes, (tuple, list)) or not self.scopes:
                raise ConfigError(f"scopes is 'auto' or a tuple of {get_args(Scope)}, got {self.scopes!r}")
            object.__setattr__(self, "scopes", tuple(self.scopes))
            for scope in self.scopes:
                check_choice("scopes", scope, get_args(Scope))
        check_choice("linear_branch", self.linear_branch, get_args(LinearBranch))
        check_choice("feature_map", self.feature_map, get_args(FeatureMap))
        check_choice("backend", self.backend, get_args(Backend))
        check_choice("precision", self.precision, get_args(Precision))
        check_choice("fp8_backend", self.fp8_backend, get_args(Fp8Backend))
        for name in ("block_means", "keep_special_tokens", "keep_reference_view", "fuse"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} is True or False, got {getattr(self, name)!r}")
        if self.keep_reference_view and not self.keep_special_tokens:
            raise ConfigError("keep_reference_view needs keep_special_tokens: the reference view has special tokens of its own")
        if self.dense_below is not None and (not _is_int(self.dense_below) or self.dense_below < 0):
            raise ConfigError(f"dense_below is a number of tokens >= 0 or None, got {self.dense_below!r}")
        for name in ("block_q", "block_k"):
            size = getattr(self, name)
            if not _is_int(size) or size < 16 or size > 128 or size & (size - 1):
                raise ConfigError(f"{name} is a power of two from 16 to 128, got {size!r}")
        if self.block_q % self.block_k:
            raise ConfigError(f"block_q must be a multiple of block_k, got {self.block_q} and {self.block_k}")

    def replace(self, **fields: Any) -> Lite3RConfig:
        """A copy with other values. Unknown names raise `ConfigError`, which lists the known ones."""
        known = {f.name for f in dataclasses.fields(self)}
        if unknown := sorted(set(fields) - known):
            raise ConfigError(f"unknown configuration field(s) {unknown}; known are {sorted(known)}")
        return dataclasses.replace(self, **fields)

    def keep_ratio_of(self, fqn: str) -> float:
        """The keep ratio of the site `fqn`."""
        return self.site_keep_ratios.get(fqn, self.keep_ratio)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-serialisable dict with a ``version``, the inverse of `from_dict`."""
        fields = dataclasses.asdict(self)
        if self.scopes != "auto":
            fields["scopes"] = list(self.scopes)
        return {"version": CONFIG_VERSION, **fields}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Lite3RConfig:
        """Build from `to_dict`'s result. Raises `ConfigError` on another version, unknown or wrong fields."""
        if not isinstance(fields, Mapping):
            raise ConfigError(f"a configuration is a dict of fields, got {fields!r}")
        fields = dict(fields)
        version = fields.pop("version", None)
        if version != CONFIG_VERSION:
            raise ConfigError(f"configuration version {version!r} is not {CONFIG_VERSION}; it was written by another release")
        if isinstance(fields.get("scopes"), list):
            fields["scopes"] = tuple(fields["scopes"])
        return cls().replace(**fields)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
