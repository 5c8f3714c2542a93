"""Save and load what Lite3R adds to a model: the linear branches, the FP8 weights, a versioned JSON configuration."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from ..adapter.sites import AttentionSite
from ..attention.branch import BranchLinear
from ..config import WHOLE_MODEL_FIELDS, Lite3RConfig, plain_name
from ..errors import BackendError, CheckpointError, ConfigError, NoSitesError, UnknownModelError, short, shown
from ..files import locked, replacing
from ..fp8.checkpoint import check_fp8_tensors, fp8_linears, fp8_tensors, install_fp8_tensors, other_tensors
from ..fp8.convert import require_plain_weight
from ..ops.dispatch import SlowPathWarning, triton_installed
from ..wrapper import Changes
from . import ranks
from .lookup import Inventory, look_up
from .names import by_plain_name, plain_config
from .plan import BY_HAND, ApplyPlan, left_linears, plan_application
from .seal import CONFIG_NAME, FORMAT_VERSION, WEIGHTS_NAME, metadata_of, read_sealed, same_text, seals
from .source import find_checkpoint
from .swap import fast_of, put_in, run_fast, run_in_fp8
from .tensors import fill_tensors, named_tensors, writable

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..config import WholeModelFields

Model = TypeVar("Model", bound=nn.Module)


def save_lite3r(model: nn.Module, directory: str | os.PathLike[str], *, whole: bool = False) -> None:
    """Write the configuration and what Lite3R added to `model` to `directory`, each file atomically, the weights first.

    A save that fails, or whose process is killed, leaves what was there, or the new checkpoint, or the new weights, whole, beside the old
    configuration or none: that `load_lite3r` refuses, and says that the metadata of the weights holds the new configuration.

    Names are those of the model without wrappers (DDP, DataParallel, `torch.compile`, FSDP, checkpointing), so that what was saved
    from inside of one loads without it. All processes of a model that `fully_shard` has sharded must call it: each gives its shards,
    rank 0 writes, and all end together.

    Args:
        model: A model with Lite3R. Of a converted one, the FP8 weights (E4M3, with FP32 scales) are written too.
        directory: Where to.
        whole: Write everything else that the model holds as well, so that `load_lite3r` can fill a model that has no
            weights, made under ``torch.device("meta")``, or that was trained: without it, biases, norms and heads stay behind.

    Raises:
        ModelTypeError: `model` is no `torch.nn.Module`.
        NotAppliedError: the model carries no Lite3R, or several parts of it do on their own.
        ConfigError: ``keep_ratio`` is ``"auto"``, and nothing was chosen yet.
        WeightsError: the model, on the meta device, has no values to write, a parameter has infinities or NaN, or a
            conversion to FP8 did not finish.
        CheckpointError: an adapter is around a linear branch, there is LoRA of `lite3r_plugin.peft.add_lora`, or it was merged and is in
            nothing that would be written; `directory` is a file or cannot be made, two modules have one name without their wrappers,
            a tensor is of a kind that no file holds, `FullyShardedDataParallel` has flattened the weights, or another process failed.

    Examples:
        >>> model = apply_lite3r(model, keep_ratio=0.1)
        >>> save_lite3r(model, "checkpoint")
    """
    found = look_up(model)
    sharded = ranks.is_sharded(model)
    writer = ranks.writes(sharded)
    with ranks.together(sharded):
        found.require_finished(found.require_one_state("save_lite3r"), "save_lite3r")
        found.require_ratios("save_lite3r")
        target = _target(directory)
        _check_savable(found, whole)
        record = _record(found, whole)
        linears = by_plain_name(fp8_linears(found.modules))
        learned = {**_branches(found), **(dict(model.named_parameters()) if whole else {})}
        others = by_plain_name(_as_they_came(found, other_tensors(model))) if whole else {}
        weights = {**by_plain_name(_branches(found)), **fp8_tensors(linears), **others}
        if sharded:
            ranks.check_mesh(weights)
    weights = ranks.gather(weights, writer)
    with ranks.together(sharded):
        if writer:
            weights = writable(weights, {plain_name(name) for name in learned})
            _write(target, {**record, "tensors": seals(weights)}, weights)


@torch.inference_mode(False)  # what is made here must serve outside of it
def load_lite3r(
    model: Model,
    source: str | os.PathLike[str],
    *,
    sites: Sequence[AttentionSite] | None = None,
    device: torch.device | str = "cpu",
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    token: str | None = None,
    **fields: Unpack[WholeModelFields],
) -> Model:
    """Apply the stored configuration to the dense `model` and load what `save_lite3r` wrote, in place.

    Everything is checked before anything is changed, and changes are undone: after an error, an interruption too, the model is the dense
    one that it was. FP8 weights
    take the place of the original ones as they are; no copy in high precision is made, and a model on the meta device
    never has any.

    What exists here, and any path object, is a folder. Any other text of the form ``owner/name`` is a repository of the Hugging Face Hub,
    of which the two files of the checkpoint are downloaded, or found in the cache. ``./owner/name`` is always a folder.

    Args:
        model: The dense model, with its weights, or on the meta device without. It may be inside of a wrapper, such as DDP or
            `torch.compile`, but not sharded.
        source: The folder that `save_lite3r` wrote, or the Hub id that `push_to_hub` was given; with ``whole=True``, if the model is on
            the meta device and is to be complete.
        sites: As in `apply_lite3r`: the attention sites of `model`, where no adapter is installed that names them.
        device: Where the tensors of a model on the meta device go.
        revision: Of the repository: a branch, a tag or a commit; None: the main branch.
        cache_dir: The cache of the Hub's files, by default that of huggingface_hub.
        local_files_only: Use the cache alone, without a network.
        token: For the Hub, by default that of `hf auth login`.
        **fields: Fields of `Lite3RConfig` about how the whole model runs (``preset="fast"``, ``weights``, ``cuda_graphs`` and others)
            in the place of those that were stored.

    Returns:
        The same model.

    Raises:
        ModelTypeError: `model` is no `torch.nn.Module`.
        CheckpointError: files are missing or damaged, of another version, of two saves, or belong to another model; or the model is
            sharded.
        HubError: the Hub does not give the checkpoint, and the cache does not hold it.
        AlreadyAppliedError: the model carries Lite3R already.
        BackendError: `device` cannot be used.
        ConfigError: `fields` has others than these.
        UnknownModelError: no adapter knows the model.
        WeightsError: a weight that is to be in FP8, or to round to it in training, is made by a parametrisation or by pruning.

    Examples:
        >>> save_lite3r(apply_lite3r(model, keep_ratio=0.1), "checkpoint")
        >>> another = load_lite3r(another, "checkpoint")  # a dense model with the same weights
    """
    found = look_up(model)
    if others := sorted(set(fields) - WHOLE_MODEL_FIELDS):
        raise ConfigError(f"load_lite3r takes fields about how the whole model runs, {sorted(WHOLE_MODEL_FIELDS)}, not {others}")
    Lite3RConfig().replace(**fields)
    try:
        device = torch.empty(0, device=device).device
    except Exception as error:  # whatever a missing driver raises
        raise BackendError(f"device {str(device)!r} cannot be used here: {(str(error).splitlines() or [''])[0]}") from error
    if ranks.is_sharded(model):
        raise CheckpointError(f"this {found.name} is sharded: call load_lite3r first, and fully_shard then")
    directory = find_checkpoint(source, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only, token=token)
    record, weights = read_sealed(directory)
    try:
        config = Lite3RConfig.from_dict(record["config"]).replace(**fields)
        if (config.precision == "fp8") != bool(record["fp8"]):
            raise ConfigError(f"precision is {config.precision!r}, but there are {'' if record['fp8'] else 'no '}FP8 weights")
        plan = _plan(found, config, sites, str(record["adapter"]))
    except (ConfigError, NoSitesError) as error:
        raise CheckpointError(f"{directory / CONFIG_NAME} does not fit this {found.name}: {str(error)[:500]}") from error
    linears = _fp8_candidates(plan)
    _check_record(plan, record, weights, linears, directory)
    with Changes() as changes:
        state = put_in(plan, changes)
        install_fp8_tensors(changes, found.modules, {name: linears[name] for name in record["fp8"]}, weights, device)
        others = {name: tensor for name, tensor in weights.items() if not _is_fp8(name, record)}
        fill_tensors(changes, model, others, device, str(directory / WEIGHTS_NAME))
        modules = {plain_name(name): module for name, module in look_up(model).modules.items()}
        changes.put(vars(state), "changed", tuple(modules[name] for name in record["changed"]))
        if record["fp8"]:
            run_in_fp8(found, state, left_linears(found.linears(state), config), changes)
        run_fast(plan, state, changes)
        for note in (*state.notes.get("te", ()), *state.notes.get("fast", ()), *_without_triton(plan)):
            warnings.warn(f"Lite3R: {note}", SlowPathWarning, stacklevel=3)
        return model


def _as_they_came(found: Inventory, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """`tensors`, those that became BF16 as they were before."""
    found_there = named_tensors(found.model)
    halves = [fast.half for fast in map(fast_of, found.states) if fast is not None and fast.half is not None]
    for half in halves:
        if len(half) and not half.kept:
            raise CheckpointError(
                "weights became BF16 and keep_originals=False freed what they were, so there is no whole model to save: leave out "
                "whole=True, or apply Lite3R with keep_originals=True"
            )
    originals = {id(tensor): original for half in halves for tensor, original in half.originals()}
    return {name: originals.get(id(found_there[name]), tensor) for name, tensor in tensors.items()}


def _plan(found: Inventory, config: Lite3RConfig, sites: Sequence[AttentionSite] | None, adapter: str) -> ApplyPlan:
    try:
        return plan_application(found, config, sites, with_weights=False)
    except UnknownModelError as error:
        if adapter != BY_HAND:
            raise
        raise UnknownModelError(
            f"no installed adapter knows {type(found.model).__name__}, and the checkpoint is of a model whose sites were given: pass the "
            "same ones, load_lite3r(model, source, sites=[...])"
        ) from error


def _without_triton(plan: ApplyPlan) -> list[str]:
    """What is to be said where the kernels that a checkpoint is meant for are missing."""
    if triton_installed() or plan.config.attention_backend == "naive" or not any(swap.sparse for swap in plan.swaps):
        return []
    return [
        "triton is not installed, so sparse sites run dense, or, from dense_below tokens on, in plain torch operators, which is slow; "
        "install triton for the kernels"
    ]


def _check_savable(found: Inventory, whole: bool) -> None:
    """Raise `CheckpointError` where the weights are not those that the modules run with."""
    if any(state.lora for state in found.states):
        raise CheckpointError(
            "LoRA that add_lora put in is in no checkpoint: fold it into the weights before save_lite3r, by merge_lora(model) of "
            "lite3r_plugin.peft"
        )
    for fqn, module in found.attention.items():
        if "proj_lin" in module._modules and not isinstance(module.proj_lin, BranchLinear):
            raise CheckpointError(
                f"{fqn}.proj_lin has an adapter around it ({type(module.proj_lin).__name__}): merge it before save_lite3r"
            )
    if not whole and any(map(found.changed, found.states)):
        raise CheckpointError(
            "weights of the model itself were trained, or had LoRA merged into them, and this checkpoint would not hold them: "
            "save_lite3r(model, directory, whole=True). Of merged LoRA alone it holds what convert(model) makes FP8 weights of, the "
            'Linears that fp8_filter takes: all of them with fp8_filter=("*",)'
        )
    shapes = {f"{fqn}.proj_lin.weight": (module.site.head_dim,) * 2 for fqn, module in found.attention.items()}
    # Outside of a forward, FSDP shows weights cut to the shard, or whole without memory behind them.
    flat = [
        name
        for name, tensor in _branches(found).items()
        if tuple(tensor.shape) != shapes[name] or not (tensor.is_meta or ranks.is_shard(tensor) or tensor.untyped_storage().nbytes())
    ]
    flat += [f"{fqn}._flat_param" for fqn, module in found.modules.items() if whole and "_flat_param" in module._parameters]
    flat += [
        f"{fqn}.weight"
        for fqn, module in found.modules.items()
        if whole and type(module) is nn.Linear and tuple(module.weight.shape) != (module.out_features, module.in_features)
    ]
    if flat:
        raise CheckpointError(
            f"{flat[0]} holds a shard, not a weight: call save_lite3r inside of `with FullyShardedDataParallel.summon_full_params(model)`, "
            "for whole=True with a model that was wrapped with use_orig_params=True"
        )


def _record(found: Inventory, whole: bool) -> dict[str, Any]:
    """What the JSON says but for the checksums."""
    attention = by_plain_name(found.attention)
    linears = by_plain_name(fp8_linears(found.modules))
    state, config = found.states[0], plain_config(found)
    changed = set(found.changed(state))
    # What runs attention and FP8 depends on the machine that loads.
    if config.attention_backend == "triton":
        config = config.replace(attention_backend="auto")
    if state.phase == "fp8":
        config = config.replace(fp8_backend="auto")
    return {
        "format": FORMAT_VERSION,
        "model": found.plain_model,
        "adapter": state.adapter,
        "config": config.to_dict(),
        "sites": {fqn: {"head_dim": m.site.head_dim, "sparse": m.sparse} for fqn, m in attention.items()},
        "fp8": {fqn: list(linear.weight_data.shape) for fqn, linear in linears.items()},
        "fp8_biases": sorted(fqn for fqn, linear in linears.items() if linear.bias is not None),
        "whole": whole,
        "changed": sorted({plain_name(fqn) for fqn, module in found.modules.items() if module in changed}),
    }


def _target(directory: Any) -> Path:
    """The directory to save into. Raises `CheckpointError` where it cannot be one."""
    name = os.fspath(directory) if isinstance(directory, (str, os.PathLike)) else None
    if not isinstance(name, str) or not name or "\0" in name:
        raise CheckpointError(f"save_lite3r takes the name of a directory, got {shown(directory)}")
    path = Path(name)
    try:
        is_file = path.exists() and not path.is_dir()
    except OSError as error:  # a name that is too long
        raise CheckpointError(f"{shown(directory)} cannot be a directory: {short(error)}") from error
    if is_file:
        raise CheckpointError(f"{path} is a file; save_lite3r takes a directory")
    return path


def _write(directory: Path, record: dict[str, Any], weights: dict[str, Tensor]) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{directory} cannot be made: {short(error)}") from error
    with locked(directory):  # who saves at the same time writes both files before or after
        with replacing(directory / WEIGHTS_NAME) as path:
            try:
                save_file(weights, path, metadata_of(record))
            except (SafetensorError, KeyError, TypeError, ValueError) as error:
                raise CheckpointError(f"{directory / WEIGHTS_NAME} cannot be written: {short(error)}") from error
        with replacing(directory / CONFIG_NAME) as path:
            path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _belongs(record: dict[str, Any], directory: Path) -> str:
    return f"{directory} belongs to another model: it was saved from a {record['model'][:100]}"


def _branches(found: Inventory) -> dict[str, Tensor]:
    """The weights ``[D, D]`` of the linear branches, each by the first name of its module."""
    first = {module: fqn for fqn, module in reversed(found.attention.items())}
    return {
        f"{fqn}.proj_lin.weight": module.proj_lin.weight.detach()
        for module, fqn in reversed(first.items())
        if "proj_lin" in module._modules
    }


def _planned_branches(plan: ApplyPlan) -> dict[str, tuple[int, ...]]:
    """The shapes of the linear branches that a model is going to have, by the names under which they are stored."""
    if plan.config.linear_branch == "none":
        return {}
    first = {swap.host: (fqn, swap) for fqn, swap in reversed(plan.places.items())}
    return {f"{plain_name(fqn)}.proj_lin.weight": (swap.site.head_dim,) * 2 for fqn, swap in first.values() if swap.sparse}


def _fp8_candidates(plan: ApplyPlan) -> dict[str, nn.Linear]:
    """The Linears that the configuration lets be in FP8, by plain name."""
    taken = {linear.module for linear in plan.linears if linear.known and linear.taken_by(plan.config)}
    return by_plain_name({fqn: module for fqn, module in plan.found.modules.items() if isinstance(module, nn.Linear) and module in taken})


def _is_fp8(name: str, record: dict[str, Any]) -> bool:
    owner, _, kind = name.rpartition(".")
    return kind in ("weight_data", "weight_scale") and owner in record["fp8"]


def _check_record(
    plan: ApplyPlan, record: dict[str, Any], weights: dict[str, Tensor], linears: dict[str, nn.Linear], directory: Path
) -> None:
    """Raise `CheckpointError` unless what was read fits the model that is going to take it."""
    places = by_plain_name(plan.places)
    sites = {fqn: {"head_dim": swap.site.head_dim, "sparse": swap.sparse} for fqn, swap in places.items()}
    if record["adapter"] != plan.adapter and BY_HAND not in (record["adapter"], plan.adapter):  # then the sites alone tell
        raise CheckpointError(
            f"{_belongs(record, directory)} (adapter {record['adapter'][:100]!r}), this is a {plan.found.plain_model} (adapter "
            f"{plan.adapter!r})"
        )
    if same_text(sites) != same_text(record["sites"]):
        other = sorted(set(record["sites"]) ^ set(sites)) or sorted(
            f for f in sites if same_text(sites[f]) != same_text(record["sites"][f])
        )
        raise CheckpointError(
            f"{_belongs(record, directory)} with {len(record['sites'])} sites (adapter {record['adapter']!r}), this is a "
            f"{plan.found.plain_model} with {len(sites)}; the first that differs is {other[0]!r}"
        )
    if unknown := sorted(set(record["changed"]) - set(map(plain_name, plan.found.modules))):
        raise CheckpointError(f"{_belongs(record, directory)}, of which {unknown[0]!r} was trained: this {plan.found.plain_model} has none")
    where = str(directory / WEIGHTS_NAME)
    check_fp8_tensors(linears, record["fp8"], record["fp8_biases"], weights, where, plan.found.name)
    for linear in plan.linears:
        if linear.module in {linears[name] for name in record["fp8"]}:
            require_plain_weight(linear)
    replaced = {f"{fqn}.weight" for fqn in record["fp8"]}
    others = by_plain_name(other_tensors(plan.found.model)) if record["whole"] else {}
    expected = _planned_branches(plan) | {name: tuple(tensor.shape) for name, tensor in others.items() if name not in replaced}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items() if not _is_fp8(name, record)}
    if expected != found:
        other = sorted(dict(expected.items() ^ found.items()))
        raise CheckpointError(f"{where} does not fit its configuration: {other[0]!r} is missing, extra or of another shape")
