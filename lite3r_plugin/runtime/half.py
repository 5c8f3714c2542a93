"""Weights in BF16 for as long as Lite3R is in a model, and the way back to those that it came with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..attention.module import SparseLinearAttention
from ..errors import WeightsError
from ..fp8.linear import Fp8Linear
from ..wrapper import Changes, is_plain_tensor
from .exact import KeptInFp32, narrow_parameters
from .maps import MapKernels

HALF = torch.bfloat16
Place = tuple[dict[str, Any], str]
"""A table of a module, and a name in it."""


@dataclass
class _Weight:
    """A parameter or buffer.

    Attributes:
        places: Where it is.
        tensor: It.
        dtype, given: Its dtypes before and since.
        original: What it held, if that is kept.
        version: Which version of it was made of that; None where nobody counts, as of tensors made for inference alone.
        narrow: Whether it is BF16 although it is computed with in FP32.
        strides: Its own, where it became one with channels side by side (`_with_channels_side_by_side`); else None.
        host: What it took the place of, where that is a view, and comes back; None where it is the host's own tensor.
        lost: Whether something else was written to it before this was copied: a copy counts versions of its own.
    """

    places: list[Place]
    tensor: Tensor
    dtype: torch.dtype
    given: torch.dtype
    original: Tensor | None
    version: int | None
    narrow: bool
    strides: tuple[int, ...] | None = None
    host: Tensor | None = None
    lost: bool = False

    @property
    def current(self) -> list[Tensor]:
        """What is there now: another tensor where somebody has put one, as `to_empty` and ``load_state_dict(assign=True)`` do."""
        there = {id(tensor): tensor for table, name in self.places if (tensor := table.get(name)) is not None}
        return list(there.values()) or [self.tensor]

    def is_new(self, tensor: Tensor) -> bool:
        """Whether `tensor`, one of the current ones, holds something else than what was made of the original."""
        if self.lost or tensor is not self.tensor or _version(tensor) != self.version:
            return True
        if self.version is not None or self.original is None or tensor.dtype != self.given:
            return False
        return not torch.equal(tensor.cpu(), self.original.to(self.given).cpu())

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"lost": self.is_new(self.tensor)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.version = _version(self.tensor)


class HalfWeights:
    """Weights that became BF16, or FP32 where their model says that they must be.

    Of what computes in FP32, those that are widened when they are read are BF16 too (`narrow_parameters`). Linear branches stay in FP32,
    and what is in FP8 stays there.

    Args:
        model: The model, with its rewrites in it.
        keep: Whether what they were is kept, in main memory.

    Attributes:
        kept: The same.
    """

    def __init__(self, model: nn.Module, keep: bool) -> None:
        self.kept = keep
        self._weights: list[_Weight] = []
        self._linears: list[tuple[Fp8Linear, torch.dtype]] = []
        self._model = model
        self._sample: tuple[Place, Tensor] | None = None

    @property
    def original_bytes(self) -> int:
        """Bytes of what is kept."""
        return sum(weight.original.nbytes for weight in self._weights if weight.original is not None)

    @property
    def changed(self) -> int:
        """How many weights have had something else written to them since."""
        return sum(any(map(weight.is_new, weight.current)) for weight in self._weights)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that what computes in BF16 has now: who moved the model may have changed it."""
        if self._sample is None:
            return HALF
        (table, name), tensor = self._sample
        there = table.get(name)
        return (tensor if there is None else there).dtype

    @property
    def narrow(self) -> int:
        """How many weights are computed with in FP32, although they became BF16."""
        return sum(weight.narrow for weight in self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    def originals(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Weights as they are now, each with what it was; of one that was written to since, what was written, in the dtype that it had."""
        for weight in self._weights:
            for tensor in weight.current:
                now = tensor.detach()
                dtype = weight.dtype if now.dtype == weight.given else now.dtype  # of who has made the model another since
                original = now if weight.original is None or weight.is_new(tensor) else weight.original
                yield tensor, _laid_out(original.to(dtype), weight.strides if original is now else None)

    def put_in(self, changes: Changes) -> None:
        """Make them BF16."""
        side_by_side = _with_channels_side_by_side(self._model)
        for tensor, dtype, places, narrow in _wanted(self._model):
            if self._sample is None and dtype == HALF and not narrow:
                self._sample = places[0], tensor
            if tensor.dtype == dtype:
                continue
            before = tensor.data
            original = _in_main_memory(before) if self.kept else None
            host = tensor if tensor._is_view() and not isinstance(tensor, nn.Parameter) else None
            strides = before.stride() if id(tensor) in side_by_side else None
            if host is not None:  # compilers refuse one of another dtype than its base
                tensor = before.to(dtype)
                _put(changes, places, tensor)
            else:
                layout = torch.preserve_format if strides is None else torch.channels_last
                _exchange(changes, tensor, before.to(dtype, memory_format=layout))
            self._weights.append(_Weight(places, tensor, before.dtype, dtype, original, _version(tensor), narrow, strides, host))
        for module in self._model.modules():
            if isinstance(module, Fp8Linear) and module.dtype != HALF:
                self._linears.append((module, module.dtype))
                changes.put(vars(module), "dtype", HALF)

    def put_back(self, changes: Changes) -> None:
        """Make them what they were. They are BF16 again where `changes` are undone."""
        for tensor, original in self.originals():
            _exchange(changes, tensor, original.to(tensor.device))
        for weight in self._weights:
            places = [(table, name) for table, name in weight.places if table.get(name) is weight.tensor]
            if weight.host is not None and places:
                _exchange(changes, weight.host, weight.tensor.data)
                _put(changes, places, weight.host)
        for module, dtype in self._linears:
            changes.put(vars(module), "dtype", dtype)

    def require_kept(self, verb: str) -> None:
        """Raise `WeightsError` where what they were is gone."""
        if self._weights and not self.kept:
            raise WeightsError(
                f"{verb} needs the weights that became BF16, and keep_originals=False freed them: build the model again, or apply Lite3R "
                "with keep_originals=True"
            )


def why_not_half(model: nn.Module) -> str | None:
    """Why the weights of `model` cannot become BF16, or None."""
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and not is_plain_tensor(tensor):
            return f"{name} is a {type(tensor).__name__}: weights that are sharded or quantised stay as they are"
    return None


def weight_dtype(model: nn.Module) -> torch.dtype:
    """The dtype that the images of `model` are to have: of its first weights with more than one dimension."""
    return next((p.dtype for p in model.parameters() if p.dim() > 1 and p.is_floating_point()), torch.get_default_dtype())


def _wanted(model: nn.Module) -> Iterator[tuple[Tensor, torch.dtype, list[Place], bool]]:
    """Each floating-point tensor of the host once: the dtype that it is to have, its places, and whether it is narrow (`_Weight`)."""
    in_fp32 = [module for outer in model.modules() if isinstance(outer, KeptInFp32) for module in outer.modules()]
    narrow: set[int] = set()
    wide: set[int] = set()  # one that others share is what all of them can do with
    for module in in_fp32:
        for tensor, (_, name) in _tensors([module]):
            (narrow if name in narrow_parameters(module) else wide).add(id(tensor))
    own: set[int] = set()
    for module in model.modules():
        if isinstance(module, SparseLinearAttention) and "proj_lin" in module._modules:
            own |= {id(x) for x, _ in _tensors(module.proj_lin.modules())}
        if isinstance(module, Fp8Linear):
            own |= {id(module.weight_data), id(module.weight_scale)}
    found: dict[int, tuple[Tensor, list[Place]]] = {}
    for tensor, place in _tensors(model.modules()):
        found.setdefault(id(tensor), (tensor, []))[1].append(place)
    for key, (tensor, places) in found.items():
        if tensor.is_floating_point() and key not in own:
            yield tensor, torch.float32 if key in wide else HALF, places, key in narrow - wide


def _with_channels_side_by_side(model: nn.Module) -> set[int]:
    """Weights of convolutions in dense heads whose maps have channels side by side: cuDNN wants theirs likewise, and torch would make a
    copy in each call."""
    heads = [module for module in model.modules() if any(isinstance(value, MapKernels) for value in vars(module).values())]
    inside = (module for head in heads for module in head.modules() if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)))
    return {id(convolution.weight) for convolution in inside if max(convolution.kernel_size) > 1}


def _tensors(modules: Iterable[nn.Module]) -> Iterator[tuple[Tensor, Place]]:
    for module in modules:
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for table in tables:
            yield from ((tensor, (table, name)) for name, tensor in table.items() if tensor is not None)


def _laid_out(tensor: Tensor, strides: tuple[int, ...] | None) -> Tensor:
    """`tensor` with these strides, if any are given."""
    return tensor if strides is None else torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def _put(changes: Changes, places: Iterable[Place], tensor: Tensor) -> None:
    for table, name in places:
        changes.put(table, name, tensor)


def _exchange(changes: Changes, tensor: Tensor, data: Tensor) -> None:
    before = tensor.data
    if tensor.is_inference() != data.is_inference():  # a mixture of both can do nothing
        with torch.inference_mode(tensor.is_inference()):
            data = data.clone()
    changes.make(lambda: setattr(tensor, "data", data), lambda: setattr(tensor, "data", before))


def _in_main_memory(tensor: Tensor) -> Tensor:
    return tensor if tensor.device.type in ("cpu", "meta") else tensor.cpu()


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version
