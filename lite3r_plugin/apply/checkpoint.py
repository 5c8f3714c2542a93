"""Save and load what Lite3R adds to a model: the linear branches, the FP8 weights, a versioned JSON configuration."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..config import Lite3RConfig
from ..errors import BackendError, CheckpointError, ConfigError, NoSitesError, WeightsError
from ..files import replacing
from ..fp8.checkpoint import check_fp8_tensors, fill_tensors, fp8_linears, fp8_tensors, install_fp8_tensors, other_tensors
from ..ops.dispatch import SlowPathWarning
from ..wrapper import Changes
from .lookup import Inventory, look_up
from .plan import ApplyPlan, left_linears, plan_application
from .swap import put_in, run_in_fp8

Model = TypeVar("Model", bound=nn.Module)

WEIGHTS_NAME = "lite3r.safetensors"
CONFIG_NAME = "lite3r_config.json"
FORMAT_VERSION = 1


def save_lite3r(model: nn.Module, directory: str | os.PathLike[str], *, whole: bool = False) -> None:
    """Write the configuration and what Lite3R added to `model` to `directory`, each file atomically.

    Args:
        model: A model with Lite3R. Of a converted one, the FP8 weights (E4M3, with FP32 scales) are written too.
        directory: Where to.
        whole: Write everything else that the model holds as well, so that `load_lite3r` can fill a model that has no
            weights, made under ``torch.device("meta")``, or that was trained: without it, biases, norms and heads stay behind.

    Raises:
        ModelTypeError: `model` is no `torch.nn.Module`.
        NotAppliedError: the model carries no Lite3R, or several parts of it do on their own.
        WeightsError: the model, on the meta device, has no values to write, or its conversion to FP8 did not finish.
        CheckpointError: an adapter is around a linear branch, or `directory` is a file.
    """
    found = look_up(model)
    state, attention = found.require_one_state("save_lite3r"), found.attention
    found.require_finished(state, "save_lite3r")
    directory = Path(directory)
    if directory.exists() and not directory.is_dir():
        raise CheckpointError(f"{directory} is a file; save_lite3r takes a directory")
    for fqn, module in attention.items():
        if "proj_lin" in module._modules and type(module.proj_lin) is not nn.Linear:
            raise CheckpointError(
                f"{fqn}.proj_lin has an adapter around it ({type(module.proj_lin).__name__}): merge it before save_lite3r"
            )
    linears = fp8_linears(found.modules)
    weights = {**_branches(found), **fp8_tensors(linears), **(other_tensors(model) if whole else {})}
    if empty := [name for name, tensor in weights.items() if tensor.is_meta]:
        raise WeightsError(f"{empty[0]} and others are on the meta device and have no values: load weights before save_lite3r")
    directory.mkdir(parents=True, exist_ok=True)
    record = {
        "format": FORMAT_VERSION,
        "adapter": state.adapter,
        # Which backend runs FP8 depends on the machine that loads.
        "config": (state.config.replace(fp8_backend="auto") if state.phase == "fp8" else state.config).to_dict(),
        "sites": {fqn: {"head_dim": m.site.head_dim, "sparse": m.sparse} for fqn, m in attention.items()},
        "fp8": {fqn: list(linear.weight_data.shape) for fqn, linear in linears.items()},
        "fp8_biases": sorted(fqn for fqn, linear in linears.items() if linear.bias is not None),
        "whole": whole,
    }
    with replacing(directory / WEIGHTS_NAME) as path:
        save_file(weights, path)
    with replacing(directory / CONFIG_NAME) as path:
        path.write_text(json.dumps(record, indent=2) + "\n")


@torch.inference_mode(False)  # what is made here must serve outside of it
def load_lite3r(model: Model, directory: str | os.PathLike[str], *, device: torch.device | str = "cpu") -> Model:
    """Apply the stored configuration to the dense `model` and load what `save_lite3r` wrote, in place.

    Everything is checked before the model keeps any change: after an error it is the dense model again. FP8 weights
    take the place of the original ones as they are; no copy in high precision is made, and a model on the meta device
    never has any.

    Args:
        model: The dense model, with its weights, or on the meta device without.
        directory: What `save_lite3r` wrote; with ``whole=True``, if the model is on the meta device and is to be complete.
        device: Where the tensors of a model on the meta device go.

    Returns:
        The same model.

    Raises:
        ModelTypeError: `model` is no `torch.nn.Module`.
        CheckpointError: files are missing or damaged, of another version, or belong to another model.
        AlreadyAppliedError: the model carries Lite3R already.
        BackendError: `device` cannot be used.
        UnknownModelError: no adapter knows the model.
        WeightsError: a weight that is to round to FP8 in training is made by a parametrisation or by pruning.
    """
    found = look_up(model)
    directory = Path(directory)
    try:
        device = torch.empty(0, device=device).device
    except Exception as error:  # whatever a missing driver raises
        raise BackendError(f"device {str(device)!r} cannot be used here: {(str(error).splitlines() or [''])[0]}") from error
    record, weights = _read(directory)
    try:
        config = Lite3RConfig.from_dict(record["config"])
        if config.precision != "fp8" and record["fp8"]:
            raise ConfigError(f"precision is {config.precision!r}, but there are FP8 weights")
        plan = plan_application(found, config, with_weights=False)
    except (ConfigError, NoSitesError) as error:
        raise CheckpointError(f"{directory / CONFIG_NAME} does not fit this {found.name}: {error}") from error
    _check_record(plan, record, weights, directory)
    with Changes() as changes:
        state = put_in(plan, changes)
    if config.precision == "fp8":
        install_fp8_tensors(found.modules, record["fp8"], weights, device)
    fill_tensors(model, {name: tensor for name, tensor in weights.items() if not _is_fp8(name, record)}, device)
    if config.precision == "fp8":
        with Changes() as changes:
            run_in_fp8(found, state, left_linears(found.linears(state), config), changes)
    for note in state.notes.get("te", ()):
        warnings.warn(f"Lite3R: {note}", SlowPathWarning, stacklevel=3)
    return model


def _branches(found: Inventory) -> dict[str, Tensor]:
    """The weights ``[D, D]`` of the linear branches, each by the first name of its module."""
    first = {module: fqn for fqn, module in reversed(found.attention.items())}
    return {
        f"{fqn}.proj_lin.weight": module.proj_lin.weight.detach().contiguous()
        for module, fqn in reversed(first.items())
        if "proj_lin" in module._modules
    }


def _planned_branches(plan: ApplyPlan) -> dict[str, tuple[int, ...]]:
    """The shapes of the linear branches that a model is going to have, by the names under which `_branches` stores them."""
    if plan.config.linear_branch == "none":
        return {}
    first = {swap.host: (fqn, swap) for fqn, swap in reversed(plan.places.items())}
    return {f"{fqn}.proj_lin.weight": (swap.site.head_dim,) * 2 for fqn, swap in first.values() if swap.sparse}


def _is_fp8(name: str, record: dict[str, Any]) -> bool:
    owner, _, kind = name.rpartition(".")
    return kind in ("weight_data", "weight_scale") and owner in record["fp8"]


def _read(directory: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (directory / name).is_file():
            raise CheckpointError(f"{directory} holds no {name}; load_lite3r takes a directory written by save_lite3r")
    try:
        record = json.loads((directory / CONFIG_NAME).read_text())
        weights = load_file(directory / WEIGHTS_NAME)
    except (ValueError, RecursionError, SafetensorError) as error:  # no JSON, no text, or numbers and nesting beyond reason
        raise CheckpointError(f"{directory} is damaged: {error}; save it again with save_lite3r") from error
    version = record.get("format") if isinstance(record, dict) else None
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{directory / CONFIG_NAME} has format {version!r}, this release reads {FORMAT_VERSION}")
    if missing := {"adapter", "config", "sites", "fp8", "whole"} - set(record):
        raise CheckpointError(f"{directory / CONFIG_NAME} lacks {sorted(missing)}; save it again with save_lite3r")
    if wrong := [name for name in ("config", "sites", "fp8") if not isinstance(record[name], dict)]:
        raise CheckpointError(f"{directory / CONFIG_NAME} is damaged: {wrong[0]!r} is no JSON object; save it again with save_lite3r")
    return record, weights


def _check_record(plan: ApplyPlan, record: dict[str, Any], weights: dict[str, Tensor], directory: Path) -> None:
    """Raise `CheckpointError` unless what was read fits the model that is going to take it."""
    sites = {fqn: {"head_dim": swap.site.head_dim, "sparse": swap.sparse} for fqn, swap in plan.places.items()}
    if sites != record["sites"]:
        other = sorted(set(record["sites"]) ^ set(sites)) or sorted(f for f in sites if sites[f] != record["sites"][f])
        raise CheckpointError(
            f"{directory} belongs to another model: it was saved for {len(record['sites'])} sites of adapter {record['adapter']!r}, this "
            f"{plan.found.name} has {len(sites)}; the first that differs is {other[0]!r}"
        )
    where = str(directory / WEIGHTS_NAME)
    linears = [linear.module for linear in plan.linears if linear.known and linear.taken_by(plan.config)]
    check_fp8_tensors(plan.found.modules, record["fp8"], record.get("fp8_biases"), weights, linears, where)
    branches = _planned_branches(plan)
    for name in branches:
        if (tensor := weights.get(name)) is not None and not (tensor.is_floating_point() and tensor.isfinite().all()):
            raise CheckpointError(f"{where} is damaged: {name} is {tensor.dtype}, or has infinities or NaN")
    replaced = {f"{fqn}.weight" for fqn in record["fp8"]}
    others = other_tensors(plan.found.model) if record["whole"] else {}
    expected = branches | {name: tuple(tensor.shape) for name, tensor in others.items() if name not in replaced}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items() if not _is_fp8(name, record)}
    if expected != found:
        other = sorted(dict(expected.items() ^ found.items()))
        raise CheckpointError(f"{where} does not fit its configuration: {other[0]!r} is missing, extra or of another shape")
