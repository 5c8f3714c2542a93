"""The one configuration object: frozen, validated, JSON round trip."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Callable, Hashable, Iterator, Mapping
from decimal import Decimal
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Literal, TypedDict, get_args

from .errors import ConfigError, shown
from .ops.options import (
    Backend,
    BlockChoice,
    ConfigBlockChoice,
    FeatureMap,
    LinearBranch,
    check_block_choice,
    check_choice,
    check_ratio,
    check_share,
    is_int,
)

if TYPE_CHECKING:
    from torch import nn
    from typing_extensions import Unpack  # of the type checker

Scope = Literal["global", "frame", "encoder", "camera"]
Pin = Literal["none", "special", "reference_keys", "reference"]
Precision = Literal["full", "fp8_qat", "fp8"]
Fp8Backend = Literal["auto", "scaled_mm", "te", "weight_only", "emulated"]
Preset = Literal["fast", "small"]
Weights = Literal["host", "bf16", "bf16_everywhere"]
DenseAttention = Literal["host", "fastest"]
Fp8Filter = tuple[str, ...] | Literal["inner"] | Callable[["nn.Module", str], bool]

CONFIG_VERSION = 1
INNER = "inner"  # of fp8_filter
WRAPPER_NAMES = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
DEFAULT_KEEP_RATIO = 0.25
AUTO: Literal["auto"] = "auto"
MOST_TOKENS = 2**63 - 1
MOST_SHAPES = 1000


class SiteRatios(Mapping[str, float]):
    """Keep ratios by patterns of site names, in the order in which they are tried; immutable and hashable."""

    def __init__(self, ratios: Mapping[str, float]) -> None:
        self._items = tuple((pattern, _plain(ratio)) for pattern, ratio in ratios.items())

    def __getitem__(self, pattern: str) -> float:
        return dict(self._items)[pattern]

    def __iter__(self) -> Iterator[str]:
        return (pattern for pattern, _ in self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mapping) and tuple(other.items()) == self._items  # their order counts

    def __hash__(self) -> int:
        return hash(self._items)

    def __repr__(self) -> str:
        return repr(dict(self._items))


class WholeModelFields(TypedDict, total=False):
    """Fields of `Lite3RConfig` about how the whole model runs, as keywords."""

    preset: Preset | None
    weights: Weights | None
    keep_originals: bool
    compile_blocks: bool | None
    dense_attention: DenseAttention | None
    cuda_graphs: bool | None
    graph_shapes: int
    max_memory: int | str | None


class Lite3RFields(WholeModelFields, total=False):
    """All fields of `Lite3RConfig`, as keywords."""

    keep_ratio: float | Mapping[str, float] | Literal["auto"]
    negligible_ratio: float
    scopes: tuple[Scope, ...] | Literal["auto"]
    exclude: tuple[str, ...]
    linear_branch: LinearBranch
    feature_map: FeatureMap
    block_means: bool
    block_choice: ConfigBlockChoice
    pin: Pin
    dense_below: int | None
    fuse: bool
    exact_rewrites: bool
    attention_backend: Backend
    block_q: int
    block_k: int
    precision: Precision
    fp8_backend: Fp8Backend
    fp8_filter: Fp8Filter


@dataclasses.dataclass(frozen=True)
class WholeModel:
    """How the whole model runs: what ``preset`` stands for, but for the fields of `Lite3RConfig` that say something else.

    Attributes:
        weights, compile_blocks, dense_attention, cuda_graphs: As in `Lite3RConfig`, where None is what is here without a preset.
    """

    weights: Weights = "host"
    compile_blocks: bool = False
    dense_attention: DenseAttention = "host"
    cuda_graphs: bool = False


WHOLE_MODEL_FIELDS = frozenset(WholeModelFields.__annotations__)
PRESETS: Mapping[Preset, WholeModel] = {
    "fast": WholeModel("bf16", True, "fastest", True),
    "small": WholeModel("bf16", False, "fastest", False),
}


@dataclasses.dataclass(frozen=True)
class Lite3RConfig:
    """What `apply_lite3r` does to a model.

    Attributes:
        keep_ratio: Share of the key blocks that each query block attends to exactly, in (0, 1]. It is SLA's
            ``topk`` and ``1 - sparsity``. Blocks that are always kept (see ``pin``) come on top. 1 is dense attention. A mapping
            gives ratios by patterns of fully qualified site names, such as ``{"*.0.attn": 1.0, "*": 0.1}``; of several patterns
            that match a site the first counts, and a site that none matches gets the default, 0.25. ``"auto"``: sites wait for
            `choose_keep_ratios`, which chooses one for each; until then a forward raises `ConfigError`. What it chose
            (`KeepRatioProfile`) is a mapping of its own kind: it must name exactly the sites that become sparse.
        negligible_ratio: Share of the same key blocks that count for nothing, those with the lowest scores, in [0, 1] (SLA's third
            class, arXiv 2509.24006): they have no part in block means and the ``"marginal"`` linear branch. 0: none. Blocks
            that ``keep_ratio`` keeps come first: what it leaves is the most that can be negligible.
        scopes: Which kinds of attention become sparse. ``"auto"``: the global (cross-view) sites where the model has
            any, else every site, as in a single-image backbone; never the ``"camera"`` sites, which mix one token a view.
        exclude: Sites that stay the host's own whatever else is said: patterns of fully qualified site names.
        linear_branch: What the linear branch sums over: ``"all"`` tokens (Lite3R, arXiv 2605.11354), only the blocks
            that are neither critical nor negligible, ``"marginal"`` (SLA, arXiv 2509.24006, Eq. 5), or ``"none"``. Its output goes
            through ``proj_lin``, which starts at zero: it costs time and changes nothing until `calibrate` has fitted it. Fitted,
            ``"marginal"`` gains much more (benchmarks/quality.md) and takes about a twentieth more time.
        feature_map: The kernel feature map of the linear branch, softmax over the head dimension or elu + 1.
        block_means: Each block that is neither critical nor negligible enters the softmax as one key: its mean key and value, weighted
            by its size. Needs no training; takes about half off the change of depth on the testbed (benchmarks/quality.md).
        block_choice: By which score key blocks are kept. ``"mean"``: that of mean query and mean key (SLA). ``"error"``: by how far
            off the block's mean would be in its place; needs ``block_means`` and no ``negligible_ratio``. ``"auto"``: by error where it can
            be, which brings depth and cameras nearer (benchmarks/quality_blocks.md) in the same time within 2 % (docs/recipes.md).
        pin: Which tokens attend to all tokens while all attend to them, whatever ``keep_ratio`` says. ``"special"``: camera, register
            and class tokens; ``"reference"``: those, and the patches of the first view, which defines the coordinate frame;
            ``"reference_keys"``: the same, but these patches do not attend to all tokens themselves; ``"none"``.
        dense_below: Sites with fewer tokens than this run dense, because sparse attention does not pay there; keys, where those are others.
            ``None``: where measurements say so for the length and density at hand (`lite3r_plugin.costs.attention.break_even`);
            without a CUDA GPU all sites do.
        fuse: Replace QK norm and rotary embedding of known sites by one exact kernel, also at sites that stay dense; and, of exact
            rewrites, take those that run kernels inside of the model's own code.
        exact_rewrites: Write parts of the model so that they are faster and give the same numbers up to rounding, in the same dtypes, as
            its adapter describes them; what differs from the model's own code in a trial is left as it is, and `describe` says why.
        attention_backend: What runs sparse attention: ``"triton"`` kernels, the ``"naive"`` definition in plain torch, which is slow,
            or ``"auto"``: Triton where it can run.
        block_q, block_k: Tokens per query and per key block.
        precision: Of the Linears inside the transformer blocks. ``"full"``: as they are. ``"fp8_qat"``: their inputs and
            weights, and `proj_lin`, are rounded to FP8 in the forward pass, for training; `convert` makes it real.
            ``"fp8"``: `apply_lite3r` converts at once.
        fp8_backend: What runs the Linears of a converted model: ``"scaled_mm"`` (`torch._scaled_mm`, compute capability 8.9
            and later), ``"te"`` (TransformerEngine), ``"weight_only"`` (compute capability 8.0 and later: memory, not
            speed), ``"emulated"`` (anywhere, slow), or ``"auto"``: the fastest that can run. With ``"fp8_qat"`` and
            ``"te"``, `proj_lin` trains in TransformerEngine where that can run.
        fp8_filter: Which of those Linears FP8 takes: patterns of fully qualified names in the model that is given to `apply_lite3r`,
            one of which must match; ``"inner"``: of lists of four or more blocks all but those of the first and the last block and the
            output projections of attention, which together cost most of the quality, and shorter lists whole; or a function
            ``(module, fqn) -> bool``, as torchao's ``module_filter_fn``, which chooses once, in `apply_lite3r`: the configuration of the
            model holds the names that it chose. Of a Linear with several names, one is enough.
        preset: ``"fast"``: the fields below as they make a model fastest; each may be set besides. ``"small"``: for cards of 8 to 12 GB:
            weights in BF16, no recorded forward beside the running one, and memory planned for what the device has, if ``max_memory``
            says nothing else. None: none of them.
        weights: ``"bf16"``: weights in BF16 for as long as Lite3R is in the model; what its adapter says needs FP32, such as the camera
            head, computes in FP32, with all weights in FP32 but those that are widened when they are read. Images come in, and outputs go
            out, as without it. ``"bf16_everywhere"``: BF16 wherever it can be. ``"host"``: as they are.
        keep_originals: Keep the weights that became BF16, in main memory, so that `remove_lite3r` gives them back bit for bit. False
            frees them: `remove_lite3r`, and the dense model of `lite3r_disabled`, are refused then.
        compile_blocks: Compile the transformer blocks (`torch.compile`) when the model first runs; not around sparse attention in FP8,
            which is fused already.
        dense_attention: ``"fastest"``: prefer the backend of PyTorch that is fastest for the dense attention of the first forward, for as
            long as a forward runs. ``"host"``: whatever is set.
        cuda_graphs: Record the forward once for each layout of inputs, and replay it; where that cannot be, `describe` says why.
        graph_shapes: How many recordings are kept, those used last. Each holds memory.
        max_memory: Bytes that a forward may hold on the device of the model, weights included, or text such as ``"8GB"``. Each new
            layout of inputs is planned before it runs: which heads, blocks and MLPs run in chunks, with the same result up to rounding;
            `describe` shows the plan, and what cannot fit is refused. None: nothing is planned, but with ``preset="small"``.

    Raises:
        ConfigError: a field has a value that it does not take.

    Examples:
        >>> config = Lite3RConfig(keep_ratio=0.1, exclude=("*.0.attn",))
        >>> config.replace(pin="special").keep_ratio
        0.1
    """

    keep_ratio: float | Mapping[str, float] | Literal["auto"] = DEFAULT_KEEP_RATIO
    negligible_ratio: float = 0.0
    scopes: tuple[Scope, ...] | Literal["auto"] = "auto"
    exclude: tuple[str, ...] = ()
    linear_branch: LinearBranch = "marginal"
    feature_map: FeatureMap = "softmax"
    block_means: bool = True
    block_choice: ConfigBlockChoice = "auto"
    pin: Pin = "reference"
    dense_below: int | None = None
    fuse: bool = True
    exact_rewrites: bool = True
    attention_backend: Backend = "auto"
    block_q: int = 128
    block_k: int = 64
    precision: Precision = "full"
    fp8_backend: Fp8Backend = "auto"
    fp8_filter: Fp8Filter = "inner"
    preset: Preset | None = None
    weights: Weights | None = None
    keep_originals: bool = True
    compile_blocks: bool | None = None
    dense_attention: DenseAttention | None = None
    cuda_graphs: bool | None = None
    graph_shapes: int = 8
    max_memory: int | str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.keep_ratio, Mapping):
            for pattern, ratio in self.keep_ratio.items():
                if not isinstance(pattern, str):
                    raise ConfigError(f"keep_ratio maps patterns of site names to ratios, got the pattern {shown(pattern)}")
                check_ratio(f"keep_ratio[{shown(pattern)}]", ratio)
            if not self.keep_ratio:
                raise ConfigError('keep_ratio is an empty mapping; give a number, or a pattern of site names for a ratio, {"*": 0.25}')
            if not isinstance(self.keep_ratio, SiteRatios):  # which hold plain numbers, and may say more
                self._set(keep_ratio=SiteRatios(self.keep_ratio))
        elif not (isinstance(self.keep_ratio, str) and self.keep_ratio == AUTO):
            if isinstance(self.keep_ratio, (str, os.PathLike)):  # the command line takes the name of a file
                raise ConfigError(
                    f"keep_ratio must be in (0, 1], or {AUTO!r}, or what KeepRatioProfile.load(file) gives, got {shown(self.keep_ratio)}"
                )
            check_ratio("keep_ratio", self.keep_ratio)
            self._set(keep_ratio=_plain(self.keep_ratio))
        check_share("negligible_ratio", self.negligible_ratio)
        self._set(negligible_ratio=_plain(self.negligible_ratio))
        if not (isinstance(self.scopes, str) and self.scopes == "auto"):
            if not isinstance(self.scopes, (tuple, list)) or not self.scopes:
                raise ConfigError(f"scopes is 'auto' or a tuple of {get_args(Scope)}, got {shown(self.scopes)}")
            self._set(scopes=tuple(self.scopes))
            for scope in self.scopes:
                check_choice("scopes", scope, get_args(Scope))
            if len(set(self.scopes)) < len(self.scopes):
                raise ConfigError(f"scopes names a scope twice, got {self.scopes}")
        if not isinstance(self.exclude, (tuple, list)) or not all(isinstance(pattern, str) for pattern in self.exclude):
            raise ConfigError(f'exclude is a tuple of patterns of site names, such as ("*.0.attn",), got {shown(self.exclude)}')
        self._set(exclude=tuple(self.exclude))
        check_choice("linear_branch", self.linear_branch, get_args(LinearBranch))
        check_choice("feature_map", self.feature_map, get_args(FeatureMap))
        check_choice("pin", self.pin, get_args(Pin))
        check_choice("attention_backend", self.attention_backend, get_args(Backend))
        check_choice("precision", self.precision, get_args(Precision))
        check_choice("fp8_backend", self.fp8_backend, get_args(Fp8Backend))
        for name in ("block_means", "fuse", "exact_rewrites", "keep_originals"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} is True or False, got {shown(getattr(self, name))}")
        check_choice("block_choice", self.block_choice, get_args(ConfigBlockChoice))
        check_block_choice(self.chosen_by, self.block_means, self.negligible_ratio)
        for name in ("compile_blocks", "cuda_graphs"):
            if not isinstance(getattr(self, name), (bool, type(None))):
                raise ConfigError(f"{name} is True, False or None (as the preset has it), got {shown(getattr(self, name))}")
        for name, values in (("preset", get_args(Preset)), ("weights", get_args(Weights)), ("dense_attention", get_args(DenseAttention))):
            if getattr(self, name) is not None:
                check_choice(name, getattr(self, name), values)
        if self.precision == "fp8_qat" and self.whole_model.weights != "host":
            raise ConfigError(
                'precision="fp8_qat" trains, for which weights in BF16 are too coarse: train without them, then convert(model) and '
                'save_lite3r, and load_lite3r(model, directory, preset="fast")'
            )
        if self.max_memory is not None:
            size = parse_amount(self.max_memory)
            if size is None:
                raise ConfigError(
                    f"max_memory is a number of bytes above 0, or text such as '8GB' or '7.5GiB', got {shown(self.max_memory)}"
                )
            self._set(max_memory=size)
        if not is_int(self.graph_shapes) or not 1 <= self.graph_shapes <= MOST_SHAPES:
            raise ConfigError(f"graph_shapes is a number from 1 to {MOST_SHAPES}, got {shown(self.graph_shapes)}")
        if self.dense_below is not None and (not is_int(self.dense_below) or not 0 <= self.dense_below <= MOST_TOKENS):
            raise ConfigError(f"dense_below is a number of tokens >= 0 or None, got {shown(self.dense_below)}")
        for name in ("block_q", "block_k"):
            size = getattr(self, name)
            if not is_int(size) or size < 16 or size > 128 or size & (size - 1):
                raise ConfigError(f"{name} is a power of two from 16 to 128, got {shown(size)}")
        if self.block_q % self.block_k:
            raise ConfigError(f"block_q must be a multiple of block_k, got {self.block_q} and {self.block_k}")
        if isinstance(self.fp8_filter, (tuple, list)):
            if not all(isinstance(pattern, str) for pattern in self.fp8_filter):
                raise ConfigError(f"fp8_filter holds patterns of names of Linears, got {shown(self.fp8_filter)}")
            self._set(fp8_filter=tuple(self.fp8_filter))
        elif not _is_filter(self.fp8_filter):
            raise ConfigError(
                f'fp8_filter is a tuple of patterns, "inner" or a function (module, fqn) -> bool, got {shown(self.fp8_filter)}'
            )

    def _set(self, **fields: Any) -> None:
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    def replace(self, **fields: Unpack[Lite3RFields]) -> Lite3RConfig:
        """A copy with other values. Unknown names raise `ConfigError`, which lists the known ones."""
        known = {f.name for f in dataclasses.fields(self)}
        if unknown := sorted(set(fields) - known):
            raise ConfigError(f"unknown configuration field(s) {shown(unknown)}; known are {sorted(known)}")
        return dataclasses.replace(self, **fields)

    @property
    def whole_model(self) -> WholeModel:
        """How the whole model runs: what the preset says, and on top of it the fields that are set."""
        preset = WholeModel() if self.preset is None else PRESETS[self.preset]
        names = [field.name for field in dataclasses.fields(preset)]
        return dataclasses.replace(preset, **{name: getattr(self, name) for name in names if getattr(self, name) is not None})

    @property
    def chosen_by(self) -> BlockChoice:
        """By which score key blocks are kept: `block_choice`, or what ``"auto"`` comes to."""
        if self.block_choice != "auto":
            return self.block_choice
        return "error" if self.block_means and not self.negligible_ratio else "mean"

    @property
    def settled(self) -> Lite3RConfig:
        """The same with what ``"auto"`` comes to in place of it: two that are equal so choose blocks alike."""
        return self.replace(block_choice=self.chosen_by)

    @property
    def plans_memory(self) -> bool:
        """Whether forwards are kept within a limit: ``max_memory``, or else what the device has."""
        return self.max_memory is not None or self.preset == "small"

    @property
    def patterns(self) -> tuple[str, ...]:
        """The patterns of site names that ``keep_ratio`` has."""
        return tuple(self.keep_ratio) if isinstance(self.keep_ratio, Mapping) else ()

    @property
    def waits(self) -> bool:
        """Whether sites wait for `choose_keep_ratios`."""
        return isinstance(self.keep_ratio, str)

    def keep_ratio_of(self, fqn: str) -> float:
        """The keep ratio of the site `fqn`; NaN where it waits for a choice."""
        if isinstance(self.keep_ratio, str):
            return math.nan
        if not isinstance(self.keep_ratio, Mapping):
            return self.keep_ratio
        return next((ratio for pattern, ratio in self.keep_ratio.items() if matches(pattern, fqn)), DEFAULT_KEEP_RATIO)

    def excludes(self, fqn: str) -> bool:
        """Whether ``exclude`` names the site `fqn`."""
        return any(matches(pattern, fqn) for pattern in self.exclude)

    def takes_fp8(self, module: nn.Module, fqn: str) -> bool:
        """Whether ``fp8_filter`` takes the Linear `module` with the name `fqn`. Raises `ConfigError` where that depends on the blocks."""
        if isinstance(self.fp8_filter, str):
            raise ConfigError('fp8_filter "inner" depends on the blocks of a model: take the configuration of a model that has Lite3R')
        if callable(self.fp8_filter):
            return bool(self.fp8_filter(module, fqn))
        return any(matches(pattern, fqn) for pattern in self.fp8_filter)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-serialisable dict with a ``version``, the inverse of `from_dict`. Raises `ConfigError` where a function filters."""
        if callable(self.fp8_filter):
            raise ConfigError("fp8_filter is a function, which no file can hold; the configuration of a model has the names it chose")
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}
        if isinstance(self.keep_ratio, Mapping):
            plain["keep_ratio"] = dict(self.keep_ratio)
        return {"version": CONFIG_VERSION, **plain}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Lite3RConfig:
        """Build from `to_dict`'s result. Raises `ConfigError` on another version, unknown or wrong fields."""
        if not isinstance(fields, Mapping):
            raise ConfigError(f"a configuration is a dict of fields, got {shown(fields)}")
        if odd := [name for name in fields if not isinstance(name, str)]:
            raise ConfigError(f"a configuration is a dict of fields by name, got the name {shown(odd[0])}")
        fields = dict(fields)
        version = fields.pop("version", None)
        if not is_int(version) or version != CONFIG_VERSION:
            raise ConfigError(f"configuration version {shown(version)} is not {CONFIG_VERSION}; it was written by another release")
        return cls().replace(**fields)


def _plain(ratio: float) -> float:
    """`ratio` as Python's own number, where it is of a class on top of it, as numpy's are."""
    return ratio if type(ratio) in (int, float) else float(ratio)


def matches(pattern: str, fqn: str) -> bool:
    """Whether a fully qualified name is `pattern`, or fits it as file names do in a shell (``*``, ``?``, ``[...]``).

    The name may be the one that the module has without wrappers around it (`plain_name`).
    """
    return any(pattern == name or fnmatchcase(name, pattern) for name in {fqn, plain_name(fqn)})


def parse_amount(text: str | int) -> int | None:
    """``50000000``, ``200M``, ``1.5GB`` or ``4GiB`` as a number: K, M, G and T are powers of 1000, and with an i of 1024.

    Returns:
        The number; None where `text` is none of these, or less than 1.
    """
    if not isinstance(text, str):
        return text if is_int(text) and text > 0 else None
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,9})?) ?(?:([kmgt])(i?))?b?", text.strip(), re.IGNORECASE)
    if match is None:
        return None
    number = int(Decimal(match[1]) * (1024 if match[3] else 1000) ** " kmgt".index((match[2] or " ").lower()))
    return number if number > 0 else None


def plain_name(fqn: str) -> str:
    """The name of a module or tensor without what wrappers put into it: DDP, DataParallel, `torch.compile`, FSDP, checkpointing."""
    return ".".join(part for part in fqn.split(".") if part not in WRAPPER_NAMES)


def _is_filter(value: object) -> bool:
    """Whether it is a `fp8_filter` other than patterns."""
    return value == INNER if isinstance(value, str) else callable(value) and isinstance(value, Hashable)
