"""The checkpoints that Lite3R's authors published (arXiv 2605.11354, github.com/AIGeeksGroup/Lite3R), in the format of this package.

Theirs are whole state dicts of a VGGT or a Depth Anything 3 in FP32, in which every attention module has besides

    proj_lin.weight  [D, D], shared by all heads: O = O_sparse + O_linear proj_lin^T, before the heads are merged, as here
    lam              a scalar that nothing reads

and every Linear that was trained for INT4 (stage 1) a buffer ``smooth [C]``. Such a Linear is round(x / smooth) round(W * smooth)^T:
without rounding ``smooth`` cancels, and ``weight`` alone is the Linear. Their deployment multiplies the weight by it and does not divide
the input, which is the same only where it is 1, as in the published files. FP8 training added nothing to the names.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..adapter.models import ModelEntry
from ..adapter.plugins import find_model, find_sites
from ..adapter.sites import AttentionSite
from ..adapter.weights import PICKLED, RANDOM, SAFETENSORS, find_weights, read_weights
from ..apply.checkpoint import save_lite3r
from ..apply.lookup import look_up
from ..apply.verbs import apply_lite3r
from ..config import Lite3RConfig, Scope, plain_name
from ..errors import AlreadyAppliedError, CheckpointError, ConfigError, InputError, ModelTypeError, shown

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..config import Lite3RFields

KEEP_RATIO = 0.3
"""Share of the keys that the published checkpoints were trained with."""
BRANCH, DEAD, SMOOTH, SECOND = "proj_lin.weight", "lam", "smooth", "proj_topk"
HUB_PREFIX = "model."
"""In front of all names where Depth Anything 3 was saved from its library's wrapper."""
KINDS = {"aggregator.": "vggt", "backbone.pretrained.": "da3-large"}

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

StateDict = dict[str, Tensor]


@dataclass(frozen=True)
class OfficialConversion:
    """What `convert_official` did; print it.

    Attributes:
        file: What was converted.
        folder: What `load_lite3r` takes now.
        config: The configuration in it.
        branches: How many linear branches there are, by the shape of their weights.
        weights: How many tensors of the dense model the file holds.
        whole: Whether they are in the folder, too; else they are those of the base weights, to the bit.
        dropped: How many tensors were left out, because nothing needs them, by what they are.
        differences: In what the converted model differs from what the authors ran, a sentence each.
    """

    file: Path
    folder: Path
    config: Lite3RConfig
    branches: dict[tuple[int, int], int]
    weights: int
    whole: bool
    dropped: dict[str, int]
    differences: tuple[str, ...]

    def __str__(self) -> str:
        shapes = ", ".join(f"{count} of {rows} x {columns}" for (rows, columns), count in sorted(self.branches.items()))
        kept = "kept" if self.whole else "equal to the base weights, left out"
        lines = [f"{self.file} -> {self.folder}", f"  linear branches: {shapes}", f"  weights of the model: {self.weights}, {kept}"]
        lines += [f"  left out: {count} {what}" for what, count in self.dropped.items()]
        lines += ["What differs from what the authors ran:", *(f"  - {text}" for text in self.differences)]
        return "\n".join(lines)


@dataclass
class _Sorted:
    """The tensors of a file by what they are."""

    weights: StateDict = field(default_factory=dict)
    branches: StateDict = field(default_factory=dict)
    dead: StateDict = field(default_factory=dict)
    smooth: StateDict = field(default_factory=dict)
    second: list[str] = field(default_factory=list)


def convert_official(
    file: str | os.PathLike[str],
    model: nn.Module | str,
    directory: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    **fields: Unpack[Lite3RFields],
) -> OfficialConversion:
    """Write a published checkpoint of Lite3R as a folder that `load_lite3r` takes.

    Every tensor of the file is used, or known to be of no use, or named in the error. Nothing is written before all is checked; the file is
    read without running anything that is in it.

    The configuration is as near to the authors' code as this package comes: every site sparse-linear that has a branch in the file, the
    linear branch over all tokens with elu + 1, nothing pinned, no block means, whatever pays. The report says what differs. With
    ``keep_ratio=1`` attention is dense with the linear branch on top, which is what the authors deployed, but for its INT8.

    Args:
        file: A ``.pt`` file of the authors.
        model: What it is of: a name that `lite3r adapters` lists (``"vggt"``, ``"da3-large"``), whose library must be installed, or the
            dense model itself. It is left as it is, and its values do not matter.
        directory: Where to.
        base: The dense model's weights, a file or a Hub id. Then those of the file must be equal to them, to the bit, and only the branches
            are written. None: all weights are written, as ``save_lite3r(whole=True)`` does.
        **fields: Fields of `Lite3RConfig` to set on top.

    Returns:
        What was done, and in what the result differs from what the authors ran.

    Raises:
        InputError: the file cannot be read, is none of the authors', belongs to another model, lacks something or holds more, holds values
            that are not finite, or differs from `base`.
        CheckpointError: `directory` is a file.
        UnknownModelError: no adapter knows the model.
        AlreadyAppliedError: the model carries Lite3R.
        ConfigError: a field has a value that it does not take, or would leave branches of the file out.
    """
    path, folder = _checked_paths(file, directory, base)
    Lite3RConfig().replace(**fields)  # before anything is read
    entry = _checked_model(model)
    base_file = None if base is None else find_weights(os.fspath(base))
    found = _sort(_plain_names(read_weights(path), path))
    if not found.branches:
        raise InputError(
            f"{path} holds no {BRANCH}: it is no checkpoint of Lite3R's authors; plain weights go to --weights or load_state_dict"
        )
    dense = model if isinstance(model, nn.Module) else find_model(model).build(RANDOM)
    sites = _sites_with_branches(dense, found)
    _check(dense, sites, found, path)
    if base_file is not None:
        _check_base(found.weights, base_file, entry.rename if entry else None, path)
    nearest = _config(sites)
    chosen = nearest.replace(**fields)
    if chosen.scopes != nearest.scopes or chosen.linear_branch == "none":
        raise ConfigError(f"{path} has linear branches at all sites of {nearest.scopes}: leave scopes and linear_branch as they are")
    made = _skeleton(dense)
    own = made.state_dict()
    made.load_state_dict({name: tensor.to(own[name].dtype) for name, tensor in found.weights.items()}, assign=True)
    apply_lite3r(made, chosen)
    with torch.no_grad():
        for name, weight in found.branches.items():
            made.get_parameter(name).copy_(weight)
    save_lite3r(made, folder, whole=base is None)
    shapes = [(int(weight.shape[0]), int(weight.shape[1])) for weight in found.branches.values()]
    return OfficialConversion(
        file=path,
        folder=folder,
        config=chosen,
        branches={shape: shapes.count(shape) for shape in shapes},
        weights=len(found.weights),
        whole=base is None,
        dropped=_dropped(found),
        differences=tuple(_differences(chosen, sites, found)),
    )


def _checked_paths(file: Any, directory: Any, base: Any) -> tuple[Path, Path]:
    for name, value in (("file", file), ("directory", directory), ("base", "" if base is None else base)):
        if not isinstance(value, (str, os.PathLike)):
            raise InputError(f"{name} is a path, got {shown(value)}")
    path, folder = Path(file).expanduser(), Path(directory)
    if not path.is_file():
        raise InputError(f"there is no file {path}; download the published checkpoint and pass its path")
    if path.suffix.lower() not in (SAFETENSORS, *PICKLED):
        raise InputError(f"{path}: checkpoints are {', '.join(PICKLED)} or {SAFETENSORS} files")
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; name a folder for the converted checkpoint")
    return path, folder


def _plain_names(state: StateDict, path: Path) -> StateDict:
    """`state` by names without wrappers."""
    prefix = HUB_PREFIX if all(plain_name(name).startswith(HUB_PREFIX) for name in state) else ""
    plain: StateDict = {}
    for name, tensor in state.items():
        short_name = plain_name(name).removeprefix(prefix)
        if short_name in plain:
            raise InputError(f"{path} holds {short_name!r} twice, with and without the name of a wrapper, such as {name!r}")
        plain[short_name] = tensor
    return plain


def _sort(state: StateDict) -> _Sorted:
    found = _Sorted()
    for name, tensor in state.items():
        owner, _, kind = name.rpartition(".")
        if SECOND in name.split("."):
            found.second.append(name)
        elif kind == DEAD:
            found.dead[owner] = tensor
        elif kind == SMOOTH:
            found.smooth[owner] = tensor
        elif name.endswith(f".{BRANCH}"):
            found.branches[name] = tensor
        else:
            found.weights[name] = tensor
    return found


def _checked_model(model: Any) -> ModelEntry | None:
    """What builds the model of this name; None where the model itself was given."""
    if isinstance(model, str):
        entry = find_model(model)
        entry.require_library()
        return entry
    if not isinstance(model, nn.Module):
        raise ModelTypeError(f"model is a name that `lite3r adapters` lists or a torch.nn.Module, got {type(model).__name__}")
    if look_up(model).attention:
        raise AlreadyAppliedError("this model carries Lite3R already; pass the dense model")
    return None


def _sites_with_branches(dense: nn.Module, found: _Sorted) -> list[AttentionSite]:
    """The sites of all scopes in which the file has a branch."""
    sites = find_sites(dense)[1]
    scopes = {site.scope for site in sites if f"{site.fqn}.{BRANCH}" in found.branches}
    return [site for site in sites if site.scope in scopes]


def _check(dense: nn.Module, sites: list[AttentionSite], found: _Sorted, path: Path) -> None:
    """Raise `InputError` unless the file fits the model."""
    if found.second:
        raise InputError(
            f"{path} holds {_some(found.second)}: a second projection (LITE3R_DUAL_PROJ=1), which has no place here; it cannot be converted"
        )
    own = {name: tuple(tensor.shape) for name, tensor in dense.state_dict().items()}
    branches = {f"{site.fqn}.{BRANCH}": (site.head_dim,) * 2 for site in sites}
    known = {site.fqn for site in sites}
    shapes = {owner: (found_weight.shape[-1],) for owner in found.smooth if (found_weight := _weight_of(owner, found)) is not None}
    unexpected = [
        *(found.weights.keys() - own.keys()), *(found.branches.keys() - branches.keys()),
        *(f"{owner}.{DEAD}" for owner in found.dead if owner not in known),
        *(f"{owner}.{SMOOTH}" for owner in found.smooth.keys() - shapes.keys()),
    ]  # fmt: skip
    missing = [*(own.keys() - found.weights.keys()), *(branches.keys() - found.branches.keys())]
    wanted = own | branches | {f"{owner}.{SMOOTH}": shape for owner, shape in shapes.items()}
    given = found.weights | found.branches | {f"{owner}.{SMOOTH}": tensor for owner, tensor in found.smooth.items()}
    misfits = [
        f"{name} {list(tensor.shape)} for {list(wanted[name])}"
        for name, tensor in given.items()
        if name in wanted and tuple(tensor.shape) != wanted[name]
    ]
    misfits += [f"{owner}.{DEAD} {list(tensor.shape)} for a scalar" for owner, tensor in found.dead.items() if tensor.numel() != 1]
    problems = [(missing, "missing"), (unexpected, "that no such model has"), (misfits, "of another shape")]
    if any(names for names, _ in problems):
        text = "; ".join(f"{len(names)} {what}: {_some(names)}" for names, what in problems if names)
        raise InputError(f"{path} does not fit a {type(dense).__name__}: {text}{_hint(found.weights)}")
    for name, tensor in given.items():
        if tensor.dtype not in FLOATS or tensor.layout != torch.strided or tensor.is_meta:
            raise InputError(
                f"{path} cannot be converted: {name} is {tensor.dtype}, {tensor.layout} on {tensor.device}; theirs are dense, of floats"
            )
        if not bool(tensor.isfinite().all()):
            raise InputError(f"{path} is damaged: {name} has infinities or NaN")
    if odd := [f"{owner}.{SMOOTH}" for owner, tensor in found.smooth.items() if not bool((tensor > 0).all())]:
        raise InputError(f"{path} is damaged: {_some(odd)} divides by numbers that are not positive")


def _weight_of(owner: str, found: _Sorted) -> Tensor | None:
    """The weight of the Linear `owner`, if there is one."""
    weight = found.weights.get(f"{owner}.weight", found.branches.get(f"{owner}.weight"))
    return weight if weight is not None and weight.dim() == 2 else None


def _hint(names: Iterable[str]) -> str:
    names = list(names)
    kinds = [kind for prefix, kind in KINDS.items() if any(name.startswith(prefix) for name in names)]
    return f". By its names it is of {kinds[0]!r}" if len(kinds) == 1 else ""


def _check_base(weights: StateDict, base: Path, rename: Callable[[str], str | None] | None, path: Path) -> None:
    """Raise `InputError` unless the file's weights are those of the dense model, to the bit."""
    state = read_weights(base)
    if rename is not None:
        state = {new: tensor for name, tensor in state.items() if (new := rename(name)) is not None}
    if missing := sorted(weights.keys() - state.keys()):
        raise InputError(f"{base} lacks {_some(missing)}, which {path} holds: it is the base of another model")
    other = [name for name, tensor in weights.items() if not _same(tensor, state[name])]
    if other:
        raise InputError(
            f"{len(other)} of {len(weights)} weights of {path} differ from {base}: {_some(other)}. They were trained: leave out the base, "
            "so that all weights are kept"
        )


def _same(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and first.dtype == second.dtype and torch.equal(first, second)


def _config(sites: list[AttentionSite]) -> Lite3RConfig:
    scopes: tuple[Scope, ...] = tuple(dict.fromkeys(site.scope for site in sites))
    cameras = {site.fqn: 1.0 for site in sites if site.scope == "camera"}
    return Lite3RConfig(
        keep_ratio={**cameras, "*": KEEP_RATIO} if cameras else KEEP_RATIO,
        scopes=scopes,
        linear_branch="all",
        feature_map="elu",
        block_means=False,
        pin="none",
        dense_below=0,
    )


def _skeleton(model: nn.Module) -> nn.Module:
    """A copy of `model` whose parameters have no memory."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, memo)


def _dropped(found: _Sorted) -> dict[str, int]:
    dropped = {f"{DEAD}, which nothing reads": len(found.dead), f"{SMOOTH} of INT4 training, which cancels out": len(found.smooth)}
    return {what: count for what, count in dropped.items() if count}


def _differences(config: Lite3RConfig, sites: list[AttentionSite], found: _Sorted) -> Iterable[str]:
    ratios = {config.keep_ratio_of(site.fqn) for site in sites if site.scope != "camera"}
    if ratios == {1.0}:
        yield "attention is dense with the linear branch on top, as they deployed it, in the precision of the model instead of INT8"
    else:
        yield (
            f"attention keeps blocks of {config.block_k} keys for blocks of {config.block_q} queries, by the means of blocks; they kept "
            "single tokens for each query in training, and all tokens in deployment (keep_ratio=1 is that)"
        )
    if ratios != {1.0} and any(site.scope == "camera" and config.keep_ratio_of(site.fqn) == 1 for site in sites):
        yield "sites of cameras keep all tokens, one a view; they kept int(0.3 * views), at least one, in training"
    yield "the linear branch divides without their epsilon of 1e-6"
    if config.precision == "full":
        yield (
            "Linears run in full precision; they trained them, and proj_lin, rounded to FP8: convert(model) stores those in FP8 that "
            "fp8_filter takes"
        )
    if smoothed := sum(bool((tensor != 1).any()) for tensor in found.smooth.values()):
        yield f"{smoothed} Linears were smoothed and rounded to INT4 in training; here they are not rounded, so that smoothing cancels out"
    if any(name.startswith("cam_enc.") for name in found.branches):
        yield "the branches of cam_enc ran neither in their training nor in their evaluation: they are the noise that they began with"
    if any(name.startswith("backbone.pretrained.") for name in found.weights):
        yield "they gave Depth Anything 3 pixels in [0, 1]; it takes, and the commands of this package give it, ImageNet's normalisation"


def _some(names: Iterable[str], most: int = 4) -> str:
    names = sorted(names)
    return f"{', '.join(names[:most])}{', ...' if len(names) > most else ''}"
