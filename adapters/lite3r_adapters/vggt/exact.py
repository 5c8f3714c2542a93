"""Exact rewrites of VGGT: the same numbers up to rounding, fewer launches, no waits for the GPU, less memory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lite3r_plugin.adapter import ExactRewrite, RewrittenModule, Trial, like
from lite3r_plugin.errors import AdapterError
from lite3r_plugin.runtime.exact import (
    NotKept,
    ReadLayers,
    few_rows,
    in_fp32,
    kept_embedding,
    layers_read,
    not_in_bf16,
    output_in_fp32,
    table_rope,
    token_positions,
    without_weights,
)
from lite3r_plugin.runtime.maps import map_kernels
from lite3r_plugin.runtime.patches import patch_products
from lite3r_plugin.runtime.values import exchanged

from .. import _blocks, _dinov2, _dpt
from .heads import EMBEDDING, METHOD, few_views, head_call
from .sites import is_aggregator, streams

_HEADS = ("camera_head", "depth_head", "point_head", "track_head")
_OWN = ("camera_token", "register_token", "_resnet_mean", "_resnet_std", "aa_order", "rope")


def rewrites(model: nn.Module) -> list[ExactRewrite] | None:
    """Exact rewrites of every VGGT inside `model`; None where there is none."""
    modules = dict(model.named_modules())
    aggregators: dict[str, Any] = {fqn: module for fqn, module in modules.items() if is_aggregator(module)}
    if not aggregators:
        return None  # its heads are found by what other families may have, too
    found: list[ExactRewrite] = []
    for fqn, aggregator in aggregators.items():
        rope = getattr(aggregator, "rope", None)
        if isinstance(rope, nn.Module) and hasattr(rope, "base_frequency"):
            found.append(table_rope(_join(fqn, "rope"), _blocks.head_dim(aggregator.frame_blocks[0].attn)))
        if isinstance(encoder := getattr(aggregator, "patch_embed", None), nn.Module):
            found += patch_products(*_dinov2.patch_embedding(_join(fqn, "patch_embed"), encoder))
        owner, _, name = fqn.rpartition(".")
        if not fqn or streams(aggregator) or not all(hasattr(aggregator, attribute) for attribute in _OWN):
            continue
        found.append(
            ExactRewrite(fqn, "special tokens joined at once, token positions kept; layers that nobody reads are not", _aggregate, _trial)
        )
        found.append(_read_layers(owner, name, modules[owner]))
    for fqn, module in modules.items():
        head: Any = module
        if hasattr(head, EMBEDDING) and hasattr(head, "intermediate_layer_idx") and hasattr(head, "scratch"):
            found += [*kept_embedding(fqn, EMBEDDING, 8), *_dpt.fusion_blocks(fqn, head), map_kernels(fqn, head_call)]
            if hasattr(head, METHOD):
                found.append(few_views(fqn))
            if hasattr(head.scratch, "output_conv2"):
                found.append(output_in_fp32(_join(fqn, "scratch.output_conv2")))
        elif hasattr(head, "trunk") and hasattr(head, "pose_branch"):
            found.append(output_in_fp32(fqn))
            if isinstance(getattr(head, "token_norm", None), nn.Module):
                found += in_fp32(fqn, "token_norm", for_precision=True)
            found += few_rows(fqn, head)
        elif hasattr(head, "trunk") and hasattr(head, "first_view") and isinstance(getattr(head, "norm", None), nn.Module):
            found += in_fp32(fqn, "norm", for_precision=True)  # of the testbed
        elif hasattr(head, "tracker") and hasattr(head, "feature_extractor"):
            found += in_fp32(fqn)  # its points are given in pixels
    if (other := _other_part(modules, aggregators)) is not None:
        reason = f"{other or 'the model'} has weights and is no part of VGGT's, and was not tried with weights in BF16"
        found.append(not_in_bf16(other, reason))
    return found or None


def _other_part(modules: Mapping[str, nn.Module], aggregators: Collection[str]) -> str | None:
    """The first module that has weights and is in no aggregator, nor in a head beside one that has the name of one of VGGT's."""
    known = {_join(fqn.rpartition(".")[0], name) for fqn in aggregators if fqn for name in _HEADS}.union(aggregators)
    for fqn, module in modules.items():
        places = fqn.split(".")
        inside = any(".".join(places[:i]) in known for i in range(len(places) + 1))
        if not inside and next(module.parameters(recurse=False), None) is not None:
            return fqn
    return None


class Aggregate(RewrittenModule):
    """VGGT's aggregator in evaluation. In training the host's own forward runs, which saves memory by recomputing blocks.

    Attributes:
        not_given: The layers in whose place the host gives None, as forks do that keep those of their heads alone.
    """

    not_given: frozenset[int] = frozenset()

    def rewritten(self, images: Tensor) -> tuple[list[Any], int]:
        """As the host's: images ``[B, S, 3, H, W]`` to one ``[B, S, P, 2C]`` per layer, and the number of special tokens."""
        if self.training:
            return self.run_host(images)
        aggregator: Any = self
        read = layers_read(self)
        batch, views = images.shape[:2]
        rows, columns = (size // aggregator.patch_size for size in images.shape[-2:])
        patches = aggregator.patch_embed(((images - aggregator._resnet_mean) / aggregator._resnet_std).flatten(0, 1))
        if isinstance(patches, dict):
            patches = patches["x_norm_patchtokens"]
        # Row 0 of the special tokens belongs to the reference view, row 1 to all others.
        special = torch.cat((aggregator.camera_token, aggregator.register_token), 2)
        special = torch.cat((special[:, :1], special[:, 1:].expand(-1, views - 1, -1, -1)), 1).expand(batch, -1, -1, -1)
        tokens = torch.cat((special.flatten(0, 1), patches), 1)
        per_view, width = tokens.shape[1:]
        frame_shape, global_shape = (batch * views, per_view), (batch, views * per_view)
        positions = token_positions(batch * views, rows, columns, aggregator.patch_start_idx, images.device)
        kept: list[Any] = []
        for i, (frame_block, global_block) in enumerate(zip(aggregator.frame_blocks, aggregator.global_blocks, strict=True)):
            in_frame = tokens = frame_block(tokens.view(*frame_shape, width), pos=positions)
            tokens = global_block(tokens.view(*global_shape, width), pos=positions.view(*global_shape, 2))
            if i in self.not_given:
                kept.append(None)
            elif read is not None and i not in read.layers:
                kept.append(NotKept(i))
            else:
                layer = torch.cat((in_frame.view(batch, views, per_view, width), tokens.view(batch, views, per_view, width)), -1)
                kept.append(layer if read is None else read.kept(i, layer, aggregator.patch_start_idx, *images.shape[-2:]))
                layer = None  # which the list may not hold
            in_frame = None  # the next block has no use for it
        return kept, aggregator.patch_start_idx


def _aggregate(module: nn.Module) -> Aggregate:
    trial, made = _trial(module), Aggregate(module)
    with torch.no_grad(), torch.device("cpu"), torch.autocast("cpu", enabled=False):
        layers: Any = trial.module(*trial.inputs[0])
    made.not_given = frozenset(i for i, layer in enumerate(layers[0]) if layer is None)
    return made


def _trial(module: nn.Module) -> Trial:
    aggregator: Any = module
    width, patch = aggregator.camera_token.shape[-1], aggregator.patch_size
    children: dict[str, nn.Module] = {
        name: nn.ModuleList(_SmallBlock(0.5 + i + offset) for i in range(len(getattr(aggregator, name))))
        for name, offset in (("frame_blocks", 0.0), ("global_blocks", 0.25))
    }
    if isinstance(aggregator.rope, nn.Module):
        children["rope"] = nn.Identity()
    small = like(module, patch_embed=_SmallPatches(patch, width), **children)
    generator = torch.Generator("cpu").manual_seed(0)
    sizes = [(1, 1, 3, 2 * patch, 2 * patch), (2, 3, 3, 2 * patch, 3 * patch), (1, 2, 3, 3 * patch, patch)]
    return Trial(small, [(torch.rand(*size, generator=generator, device="cpu"),) for size in sizes])


class _SmallBlock(nn.Module):
    """Mixes tokens of a sequence, and lets positions, their order and its own place count."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: Tensor, pos: Tensor | None = None) -> Tensor:
        mixed = 0.5 * x + 0.25 * x.roll(1, 1) + 0.01 * self.scale * x.mean(1, keepdim=True)
        return mixed if pos is None else mixed + 0.01 * self.scale * (pos.to(x.dtype) @ pos.new_tensor([[1], [3]], dtype=x.dtype))


class _SmallPatches(nn.Module):
    """Means of patches as tokens; of images that are wider than high in a dict, as DINOv2 has it."""

    def __init__(self, patch: int, width: int) -> None:
        super().__init__()
        self.patch, self.width = patch, width

    def forward(self, images: Tensor) -> Any:
        means = F.avg_pool2d(images, self.patch).flatten(2).transpose(1, 2)
        tokens = means.repeat(1, 1, -(-self.width // 3))[..., : self.width]
        return {"x_norm_patchtokens": tokens} if images.shape[-1] > images.shape[-2] else tokens


def _read_layers(fqn: str, backbone: str, owner: nn.Module) -> ExactRewrite:
    """Of the layers only what the forward of `owner` reads is kept while it runs, told by a run on zeros."""
    return ExactRewrite(
        fqn, "of the layers only what the heads read is kept", functools.partial(_make_read_layers, backbone), None,
        needs=(_join(fqn, backbone),),
    )  # fmt: skip


def _make_read_layers(backbone: str, owner: nn.Module) -> ReadLayers:
    aggregator: Any = getattr(owner, backbone)
    count = len(aggregator.frame_blocks)
    layers = {count - 1}
    for module in owner.modules():  # of heads that run when they are asked for, such as that of tracks
        if isinstance(indices := getattr(module, "intermediate_layer_idx", None), Sequence):
            layers.update(i % count for i in indices)
    watched = _layers_in_a_run(owner, backbone)
    read = {name: set(indices) for name, indices in watched.read.items()}
    layers.update(*read.values())
    by_others = read.pop("", set[int]()) | {count - 1}  # no block runs after the last layer that could use its memory
    heads = {i: names for i in layers - by_others if (names := tuple(name for name, of_head in read.items() if i in of_head))}
    if len(layers) == count and not heads:
        raise AdapterError("its heads read all layers")
    plain_on = frozenset({"cuda"} if watched.autocast == {False} else ())
    return ReadLayers(owner, backbone, frozenset(layers), heads, METHOD, plain_on, sorted(watched.given))


def _layers_in_a_run(owner: nn.Module, backbone: str) -> _WatchedLayers:
    """What becomes of the layers in a forward of `owner`, by one on zeros, under autocast of GPUs, which changes nothing here.

    Raises whatever its code does.
    """
    aggregator: Any = getattr(owner, backbone)
    watched = _WatchedAggregator(aggregator)
    layers = watched.layers
    copied = without_weights(owner, {aggregator: watched})
    inside = {name: module for name, module in copied.named_modules() if not isinstance(module, torch.jit.ScriptModule)}  # takes no hooks
    for name, module in inside.items():
        module.register_forward_pre_hook(functools.partial(layers.give_to, name), with_kwargs=True)
        if hasattr(module, METHOD) and isinstance(expected := getattr(module, "intermediate_layer_idx", None), Sequence):
            vars(module)[METHOD] = functools.partial(layers.read_by, name, expected, getattr(module, METHOD))
    size = 4 * watched.patch, 5 * watched.patch
    before = torch.is_autocast_enabled("cuda")
    try:
        torch.set_autocast_enabled("cuda", True)
        with torch.no_grad(), torch.device("cpu"), torch.autocast("cpu", enabled=False):
            found = copied(torch.zeros(1, 2, 3, *size, dtype=torch.float32, device="cpu"))
    finally:
        torch.set_autocast_enabled("cuda", before)
    attributes = [value for module in inside.values() if module is not watched for value in vars(module).values() if value is layers]
    exchanged((found, attributes), lambda x: x, lambda value: layers[:] if value is layers else value)  # who has them may read any
    return layers


class _WatchedAggregator(nn.Module):
    """Gives layers of the right shapes, all zeros, that note which of them are read."""

    def __init__(self, aggregator: Any) -> None:
        super().__init__()
        self.patch, self.special = aggregator.patch_size, aggregator.patch_start_idx
        self.layers = _WatchedLayers(len(aggregator.frame_blocks))
        self.width = 2 * aggregator.camera_token.shape[-1]

    def forward(self, images: Tensor) -> tuple[Any, int]:
        views, rows, columns = images.shape[1], *(size // self.patch for size in images.shape[-2:])
        self.layers.layer = images.new_zeros(1, views, self.special + rows * columns, self.width)
        return self.layers, self.special


class _WatchedLayers(Sequence[Tensor]):
    """No list, whose items C code reads unseen.

    Attributes:
        read: Which were read, in order: in the methods `METHOD` of heads by their names, and elsewhere by "".
        given: Names of the modules that were given it.
        autocast: Whether that of GPUs was on in these methods.
    """

    def __init__(self, count: int) -> None:
        self.indices = range(count)
        self.read: dict[str, list[int]] = {}
        self.given: set[str] = set()
        self.reader = ""
        self.autocast: set[bool] = set()
        self.layer = torch.empty(0)

    def give_to(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A hook of the module `name`."""
        if any(value is self for value in (*args, *kwargs.values())):
            self.given.add(name)

    def read_by(self, reader: str, expected: Sequence[int], method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call `method`, whose reads are those of `reader` if they are the `expected` ones: it may be given others in their places."""
        before, self.reader = self.read.pop(reader, []), reader
        self.autocast.add(torch.is_autocast_enabled("cuda"))
        try:
            return method(*args, **kwargs)
        finally:
            self.reader = ""
            found = self.read.pop(reader, [])
            self.read.setdefault(reader if found == list(expected) else "", []).extend((*before, *found))

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, key: Any) -> Any:
        found = self.indices[key]
        self.read.setdefault(self.reader, []).extend([found] if isinstance(found, int) else found)
        return self.layer if isinstance(found, int) else [self.layer for _ in found]


def _join(fqn: str, name: str) -> str:
    return f"{fqn}.{name}" if fqn else name
