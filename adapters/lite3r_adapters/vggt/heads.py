"""The DPT heads of VGGT, their large maps for few views at a time: the same numbers, less memory."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from lite3r_plugin.adapter import ExactRewrite, Trial
from lite3r_plugin.errors import AdapterError
from lite3r_plugin.runtime.chunks import by_views
from lite3r_plugin.runtime.exact import KeptEmbedding, Started, StartingMethod
from lite3r_plugin.runtime.maps import MapKernels, random_head
from lite3r_plugin.runtime.modes import operators_are_transformed
from lite3r_plugin.wrapper import has_forward_hooks, is_plain_tensor

VIEWS = 2
"""Whose large maps are made at once. At 518 x 518 two have enough pixels to fill a GPU."""

METHOD, EMBEDDING = "_forward_impl", "_apply_pos_embed"
CALLED = ("custom_interpolate", "activate_head")
"""Functions beside the class of a head that its method calls."""

MAP = 4
"""Dimensions of a map; tokens have three."""

FINEST = 4
"""How many times as high and as wide as the grid of patches the finest maps are that are fused."""


STARTING = 8
"""Views whose tokens are projected at once when a head starts from a layer, as many as the host takes."""


class FewViews(StartingMethod):
    """The method of a DPT head that goes from layers to predictions for the views that it takes at once.

    Maps of the three coarse levels are made for all of these views. From the finest level on, where maps grow to the size of the images,
    `VIEWS` run at a time and write into one result. Of the chunks of views that a head takes without data, while memory is planned, the
    first two and the last two run, and the others give their result alone.

    The head's own method runs where gradients are wanted, where somebody watches its modules, in code that is compiled, traced or
    transformed (`torch.func`), and on tensors of other classes.

    Raises:
        AdapterError: a function that the head's own method calls cannot be found.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module, METHOD)
        if missing := [name for name in CALLED if name not in self._functions]:
            raise AdapterError(f"there is no {missing[0]} where its class is")
        self._planned: tuple[tuple[Any, ...], list[tuple[torch.Size, torch.dtype]]] = (), []

    def rewritten(
        self, aggregated_tokens_list: Sequence[Any], images: Tensor, patch_start_idx: int, frames_start_idx: int | None = None,
        frames_end_idx: int | None = None,
    ) -> Any:  # fmt: skip
        """As the host's method: layers ``[B, S, P, C]`` and images ``[B, S, 3, H, W]`` to predictions and confidences, or to features."""
        head: Any = self.module
        read = head.intermediate_layer_idx
        try:
            layers = [aggregated_tokens_list[i] for i in read]
        except LookupError:  # a fork's head may be given the layers that it reads alone
            return self.run_host(aggregated_tokens_list, images, patch_start_idx, frames_start_idx, frames_end_idx)
        started = [isinstance(layer, Started) and layer.layer == i for i, layer in zip(read, layers, strict=True)]
        if any(started) and torch.compiler.is_compiling():  # of a model that is compiled in parts
            eager: Any = torch.compiler.disable(self.rewritten)
            return eager(aggregated_tokens_list, images, patch_start_idx, frames_start_idx, frames_end_idx)
        layers = [layer.of(self) if of_it else layer for layer, of_it in zip(layers, started, strict=True)]
        if not self._takes(layers):
            return self.run_host(aggregated_tokens_list, images, patch_start_idx, frames_start_idx, frames_end_idx)
        batch, height, width = layers[0].shape[0], *images.shape[-2:]
        chunk: tuple[Any, ...] | None = None
        if frames_start_idx is not None and frames_end_idx is not None:
            size = frames_end_idx - frames_start_idx
            if isinstance(layers[0], FakeTensor):
                chunk, (planned, shapes) = (batch, size, height, width, layers[0].dtype), self._planned
                if chunk == planned and 0 < size <= frames_start_idx <= images.shape[1] - 3 * size:
                    found = [layers[0].new_empty(shape, dtype=dtype) for shape, dtype in shapes]
                    return found[0] if head.feature_only else tuple(found)
            layers = [layer[:, frames_start_idx:frames_end_idx] for layer in layers]
        levels = [x.flatten(0, 1) if x.dim() > MAP else x.flatten(0, 1)[:, patch_start_idx:] for x in layers]
        coarse = self._coarse(levels[1:], height, width)
        found = by_views(VIEWS, self._finest, coarse, levels[0], height, width)
        found = [x.unflatten(0, (batch, -1)) for x in found]
        if chunk is not None:
            self._planned = chunk, [(x.shape, x.dtype) for x in found]
        return found[0] if head.feature_only else tuple(found)

    def may_start(self) -> bool:
        """Not where the head is compiled, somebody watches it or its modules, or has put a forward of his own there."""
        head: Any = self.module
        called = has_forward_hooks(head) or not isinstance(vars(head).get("forward"), MapKernels | None)
        compiled = not isinstance(head._compiled_call_impl, functools.partial | None)  # partial: of `in_chunks`
        return not called and not compiled and not self._is_watched

    def start(self, layer: int, tokens: Tensor, special: int, height: int, width: int) -> Tensor | None:
        """The patches of a layer in the channels of their level ``[B, S, C', h, w]``. Not under autocast: the head may have another."""
        head: Any = self.module
        read = list(head.intermediate_layer_idx)
        autocast = not tokens.is_meta and torch.is_autocast_enabled(tokens.device.type)  # which knows no meta device
        if read.count(layer) != 1 or autocast or not self._can_read([tokens]):
            return None
        level = read.index(layer)
        weights = [parameter for module in (head.norm, head.projects[level]) for parameter in module.parameters()]
        if any(weight.device != tokens.device for weight in weights):  # which may come when the head is called
            return None
        shape = tokens.shape[:2]
        return by_views(STARTING, self._projected, tokens.flatten(0, 1)[:, special:], level, height, width).unflatten(0, shape)

    @property
    def _functions(self) -> Mapping[str, Any]:
        return getattr(getattr(type(self.module), METHOD), "__globals__", {})

    @property
    def _is_watched(self) -> bool:
        return any(has_forward_hooks(inside) for inside in self.module.modules() if inside is not self.module)

    def _takes(self, layers: Iterable[Any]) -> bool:
        """Whether views of these layers may be told apart, and nobody sees that they are."""
        return self._can_read(layers) and not self._is_watched

    def _can_read(self, layers: Iterable[Any]) -> bool:
        """Whether operators run now, on these layers, without gradients, as they are written."""
        head = self.module
        return (
            not torch.compiler.is_compiling()
            and all(isinstance(x, FakeTensor) or (isinstance(x, Tensor) and is_plain_tensor(x)) for x in layers)
            and not (torch.is_grad_enabled() and any(x.requires_grad for x in (*layers, *head.parameters())))
            and not operators_are_transformed()
        )

    def _projected(self, tokens: Tensor, i: int, height: int, width: int) -> Tensor:
        """Tokens ``[N, P, C]`` of the layer of level `i` to a map ``[N, C', h, w]`` of one value for each patch."""
        head: Any = self.module
        rows, columns = height // head.patch_size, width // head.patch_size
        x = head.norm(tokens.contiguous())
        return head.projects[i](x.transpose(1, 2).unflatten(2, (rows, columns)))

    def _level(self, i: int, x: Tensor, height: int, width: int) -> Tensor:
        """Tokens of the layer of level `i`, or their map (`_projected`), to a map of the level, in the channels of all levels."""
        head: Any = self.module
        if x.dim() < MAP:
            x = self._projected(x, i, height, width)
        if head.pos_embed:
            x = head._apply_pos_embed(x, width, height)
        return getattr(head.scratch, f"layer{i + 1}_rn")(head.resize_layers[i](x))

    def _coarse(self, levels: Sequence[Tensor], height: int, width: int) -> Tensor:
        """What there is of the three coarse levels to their map ``[N, C, h, w]``, as large as that of the finest level."""
        head: Any = self.module
        two, three, four = (self._level(i, x, height, width) for i, x in enumerate(levels, 1))
        x = head.scratch.refinenet4(four, size=three.shape[2:])
        x = head.scratch.refinenet3(x, three, size=two.shape[2:])
        return head.scratch.refinenet2(x, two, size=tuple(FINEST * (side // head.patch_size) for side in (height, width)))

    def _finest(self, coarse: Tensor, level: Tensor, height: int, width: int) -> tuple[Tensor, ...]:
        """What there is of the coarse levels and of the finest one to predictions ``[N, H, W, D]`` and confidences, or to features."""
        head: Any = self.module
        x = head.scratch.refinenet1(coarse, self._level(0, level, height, width))
        x = head.scratch.output_conv1(x)
        rows, columns = (int(side // head.patch_size * head.patch_size / getattr(head, "down_ratio", 1)) for side in (height, width))
        x = self._grown(x, (rows, columns), height, width)
        if head.feature_only:
            return (x,)
        x = head.scratch.output_conv2(x)
        return self._functions["activate_head"](x, activation=head.activation, conf_activation=head.conf_activation)

    def _grown(self, x: Tensor, size: tuple[int, int], height: int, width: int) -> Tensor:
        """A map at the size of the result, with its position embedding: in one pass where a kernel does both."""
        head: Any = self.module
        kept = vars(head).get(EMBEDDING)
        if head.pos_embed and isinstance(kept, KeptEmbedding) and (made := kept.upsampled(x, size, width, height)) is not None:
            return made
        x = self._functions["custom_interpolate"](x, size, mode="bilinear", align_corners=True)
        return head._apply_pos_embed(x, width, height) if head.pos_embed else x


def few_views(fqn: str) -> ExactRewrite:
    """`FewViews` of the head `fqn`."""
    return ExactRewrite(fqn, "large maps of the head for few views at a time", FewViews, _trial, METHOD)


def head_call(head: Any, batch: int = 1, views: int = 2, *chunk: int) -> tuple[Any, ...]:
    """``(layers [B, S, P, C], images [B, S, 3, H, W], special tokens)`` of small images, and the first view of a `chunk` and its end."""
    generator = torch.Generator("cpu").manual_seed(0)
    read, patch = head.intermediate_layer_idx, head.patch_size
    shape = (max(*read, -min(read)) + 1, batch, views, 1 + 2 * 3, head.projects[0].in_channels)
    images = torch.rand(batch, views, 3, 2 * patch, 3 * patch, generator=generator, device="cpu")
    return list(torch.randn(shape, generator=generator, device="cpu")), images, 1, *chunk


def _trial(head: nn.Module) -> Trial:
    return Trial(random_head(head), [head_call(head, 1, VIEWS + 1), head_call(head, 2, VIEWS + 1, 1, VIEWS + 1)])
