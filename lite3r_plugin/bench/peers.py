"""Peers of Lite3R that run without building anything, for `lite3r bench --peers`: each in a process of its own, on the same images.

A peer starts from a dense model with random weights and changes it. What it is compared with for its fidelity is that dense model, run in
the same process, since forks bring the code of their own model.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..adapter.plugins import find_model, find_sites
from ..apply.verbs import apply_lite3r
from ..errors import InputError, NoSitesError, short
from ..wrapper import Changes, RewrittenMethod, by_name
from .models import BenchModel, build
from .variants import DENSE, FAST

STRIDE = 4
STRONG: dict[str, Any] = {**DENSE, **FAST}  # the variant strong-exact
EAGER: dict[str, Any] = {**STRONG, "compile_blocks": False, "cuda_graphs": False}
FORK = ("vggt",)  # models that the forks of VGGT are forks of


@dataclass
class Running:
    """A peer that is ready.

    Attributes:
        dense: The model before the peer changed it.
        change: Changes it in place, or gives another module with the same weights.
        run: ``run(module, images [1, S, 3, H, W])``, its outputs.
        autocast: Whether it runs under BF16 autocast.
        density: Share of the scores over the sites it changes, from the number of views; None where it does not tell.
    """

    dense: nn.Module
    change: Callable[[nn.Module], nn.Module]
    run: Callable[[nn.Module, Tensor], Any]
    autocast: bool
    density: Callable[[int], float | None] = lambda views: None


@dataclass(frozen=True)
class Peer:
    """Something that Lite3R is measured beside.

    Attributes:
        name: What users type after ``--peers``.
        summary: What runs, for the conditions.
        checkout: What the path after ``=`` is a checkout of; None where no path is needed.
        package: What must be installed for it, or None.
        models: Names of models it is for; empty: any with an adapter.
        prepare: ``(model, checkout, device, seed)`` to it. May raise `InputError` with the reason why it cannot run here.
    """

    name: str
    summary: str
    checkout: str | None
    package: str | None
    models: tuple[str, ...]
    prepare: Callable[[str, Path | None, torch.device, int], Running]

    def why_not(self, model: str, path: Path | None) -> str | None:
        """Why it cannot be asked for, or None."""
        if self.models and model not in self.models:
            return f"it is for {', '.join(self.models)}, not for {model}"
        if self.checkout is not None and path is None:
            return f"it is no package: clone {self.checkout} and write {self.name}=PATH"
        if self.checkout is None and path is not None:
            return "it needs no checkout"
        if self.package is not None and importlib.util.find_spec(self.package) is None:
            return f"{self.package} is not installed: pip install {self.package}"
        if path is not None and not path.is_dir():
            return f"there is no folder {path}"
        return None


def chosen(wanted: str, model: str) -> dict[str, Path | None]:
    """The peers of ``NAME,NAME=PATH,...`` with their checkouts.

    Raises:
        InputError: one is not known, is named twice, or cannot be asked for, with the reason.
    """
    found: dict[str, Path | None] = {}
    for item in wanted.split(","):
        name, equals, path = item.strip().partition("=")
        if name not in PEERS:
            raise InputError(f"unknown peer {name[:60]!r}; known are {', '.join(PEERS)}")
        if name in found:
            raise InputError(f"the peer {name} is named twice")
        found[name] = Path(path).expanduser().absolute() if equals else None
        if (reason := PEERS[name].why_not(model, found[name])) is not None:
            raise InputError(f"the peer {name} cannot run: {reason}")
    return found


# Keys and values of a frame stride


class StridedKeys(RewrittenMethod):
    """Lies over the forward of a global attention module: queries of all views attend to the keys and values of every n-th view.

    The first view, which defines the coordinate frame, is always among them. The idea is that of Spark3R (tokens of keys and values are
    fewer than those of queries); this is a baseline in its spirit with whole frames, not its code.

    Args:
        module: The attention module. Its tokens are view after view, so many in each.
        views: The number of views of the forward that is to run.
        stride: n.
    """

    def __init__(self, module: nn.Module, views: Callable[[], int], stride: int) -> None:
        super().__init__(module, "forward")
        self.views, self.stride = views, stride

    def rewritten(self, *args: Any, **kwargs: Any) -> Any:
        """As the host's forward, of fewer keys."""
        with _Strided(self.views(), self.stride):
            return self.run_host(*args, **kwargs)


class _Strided(TorchFunctionMode):
    def __init__(self, views: int, stride: int) -> None:
        super().__init__()
        self.views, self.stride = views, stride

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        given = by_name(("query", "key", "value"), args) | kwargs
        for name in ("key", "value"):
            x: Tensor = given[name]  # [B, H, N, D]
            if x.shape[-2] % self.views:
                raise InputError(
                    f"a global site has {x.shape[-2]} tokens, which are not alike in {self.views} views: its frames have no stride"
                )
            given[name] = x.unflatten(-2, (self.views, -1))[:, :, :: self.stride].flatten(-3, -2)
        return func(**given, **by_name(("attn_mask", "dropout_p", "is_causal"), args[3:]))


def _strided_keys(model: str, checkout: Path | None, device: torch.device, seed: int) -> Running:
    views = [1]

    def change(module: nn.Module) -> nn.Module:
        sites = [site for site in find_sites(module)[1] if site.scope == "global"]
        if not sites:
            raise NoSitesError(f"the model {model} has no global attention, whose frames could have a stride")
        names = [site.fqn for site in sites]
        # Eager, since Python must see the calls; with everything else that makes a dense model fast.
        apply_lite3r(module, **EAGER)
        with Changes() as changes:
            for name in names:
                StridedKeys(module.get_submodule(name), lambda: views[0], STRIDE).put_in(changes)
        return module

    bench = BenchModel.of(find_model(model))

    def run(module: nn.Module, images: Tensor) -> Any:
        views[0] = images.shape[1]
        return bench.run(module, images)

    return Running(build(bench, device, seed), change, run, autocast=False, density=lambda views: -(-views // STRIDE) / views)


# Torchao


def _torchao(model: str, checkout: Path | None, device: torch.device, seed: int) -> Running:
    quantization = importlib.import_module("torchao.quantization")
    bench = BenchModel.of(find_model(model))

    def change(module: nn.Module) -> nn.Module:
        from ..apply.lookup import block_linears

        apply_lite3r(module, **STRONG)
        inside = {id(linear) for linear in block_linears(module)}
        config = quantization.Float8DynamicActivationFloat8WeightConfig(granularity=quantization.PerRow())
        quantization.quantize_(module, config, filter_fn=lambda linear, name: id(linear) in inside)
        return module

    return Running(build(bench, device, seed), change, bench.run, autocast=False, density=lambda views: 1.0)


# Forks of VGGT, from checkouts


def _fastvggt(model: str, checkout: Path | None, device: torch.device, seed: int) -> Running:
    assert checkout is not None
    _first_on_path(checkout)
    VGGT = _imported("vggt.models.vggt", checkout).VGGT

    def make(merging: int | None) -> nn.Module:
        return _only_depth_and_cameras(lambda: VGGT(merging=merging), device, seed)

    def change(module: nn.Module) -> nn.Module:
        merged = make(0)  # from block 0 on, as its scripts have it
        merged.load_state_dict(module.state_dict())
        return merged

    def run(module: nn.Module, images: Tensor) -> Any:
        if hasattr(module, "update_patch_dimensions"):
            module.update_patch_dimensions(images.shape[-1] // 14, images.shape[-2] // 14)  # pyright: ignore[reportCallIssue]
        return module(images)

    return Running(make(None), change, run, autocast=True)


def _saf3r(model: str, checkout: Path | None, device: torch.device, seed: int) -> Running:
    assert checkout is not None
    _first_on_path(checkout)
    # Its packages import what every one of its models needs; one of them is enough.
    for name in ("saf3r", "saf3r.patch"):
        package = types.ModuleType(name)
        package.__path__ = [str(checkout.joinpath(*name.split(".")))]
        sys.modules[name] = package
    VGGT = _imported("saf3r.models.official_vggt.models.vggt", checkout).VGGT
    patch = _imported("saf3r.patch.patch_vggt", checkout)
    profile = checkout / "configs" / "sparse_attn" / "vggt" / "eth3d-train-fltr-calib_cmpmse.json"
    if not profile.is_file():
        raise InputError(f"{checkout} has no profile of heads {profile.relative_to(checkout)}: check the checkout out again")

    def change(module: nn.Module) -> nn.Module:
        # As configs/evaluation/eval_saf3r_vggt.yaml has it.
        Dict = _imported("addict", checkout).Dict
        part = {"type": "headsparse", "topk_mode": "token", "lazy_dino_topk": True, "topk": 4}
        return patch.patch_model(module, Dict({"sparse_config_path": str(profile), "patch_module": part}))

    def run(module: nn.Module, images: Tensor) -> Any:
        patch.update_args_per_forward(module, *images.shape[-2:])
        return module(images)

    return Running(_only_depth_and_cameras(lambda: VGGT(save_intermediates=False), device, seed), change, run, autocast=True)


def _first_on_path(checkout: Path) -> None:
    sys.path.insert(0, str(checkout))


def _imported(name: str, checkout: Path) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:  # whatever code of others raises
        raise InputError(f"{name} cannot be imported from {checkout}: {short(error)}") from error


def _only_depth_and_cameras(make: Callable[[], nn.Module], device: torch.device, seed: int) -> nn.Module:
    """A fork of VGGT with random weights and the heads that the benchmark runs."""
    torch.manual_seed(seed)
    with torch.device(device):
        module: Any = make()
    for head in ("point_head", "track_head"):
        if hasattr(module, head):
            setattr(module, head, None)
    return module.to(device).eval().requires_grad_(False)


PEERS: Mapping[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer(
            "strided-keys",
            f"keys and values of every {STRIDE}th view at global sites, BF16 weights, exact rewrites, best SDPA backend, eager; our own "
            "small implementation of the idea",
            None, None, (), _strided_keys,
        ),
        Peer(
            "torchao-float8", "strong-exact with the Linears of the blocks in torchao's float8, dynamic, a scale for each row",
            None, "torchao", (), _torchao,
        ),
        Peer(
            "fastvggt", "FastVGGT as its scripts have it: merging from block 0, FP32 weights, BF16 autocast, eager",
            "mystorm16/FastVGGT", None, FORK, _fastvggt,
        ),
        Peer(
            "saf3r", "SAF3R with its profile of heads for VGGT, as its scripts have it: FP32 weights, BF16 autocast, eager",
            "jndeng/SAF3R", "addict", FORK, _saf3r,
        ),
    )
}  # fmt: skip
"""The peers by name."""


@dataclass(frozen=True)
class Task:
    """What the process of a peer is to do; it goes there as JSON.

    Attributes:
        peer: Its name.
        checkout: Its folder, or None.
        model: Name of the model.
        views: Numbers of views.
        resolution, device, seed, repeats: As of `Bench`.
    """

    peer: str
    checkout: str | None
    model: str
    views: list[int]
    resolution: int
    device: str
    seed: int
    repeats: int
