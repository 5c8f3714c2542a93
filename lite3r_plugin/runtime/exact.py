"""Exact rewrites that families of models share: the same numbers up to rounding, fewer launches, no waits for the GPU.

Adapters describe them in their hook `lite3r_exact_rewrites`. What is computed once is kept as long as the model lives, since CUDA graphs
may read it; nothing is kept of a call that is compiled or captured.
"""

from __future__ import annotations

import contextlib
import contextvars
import copy
import functools
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapter.rewrites import ExactRewrite, Trial
from ..adapter.trials import like
from ..errors import AdapterError, InputError
from ..ops import skinny_linear
from ..ops.dispatch import without_autocast
from ..wrapper import TABLES, RewrittenMethod, RewrittenModule, has_forward_hooks, host_of, is_plain_tensor
from .maps import add_embedding, upsample_with_embedding
from .modes import operators_are_seen
from .values import exchanged

MAX_POSITIONS = 4096  # rows and columns of the rotary tables; token coordinates are below it
MOST_SIZES = 512  # of features whose position embeddings are kept
LEAST_WEIGHTS = 1 << 20  # of a Linear that runs by another kernel where it has few rows

Key = TypeVar("Key", bound=Hashable)


def keep(cache: dict[Key, tuple[Tensor, ...]], key: Key, make: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """What `make` gives, from `cache` where it is there, and kept there where it may be."""
    found = cache.get(key)
    if found is not None:
        return found
    with torch.no_grad():
        if torch.compiler.is_compiling():
            return make()
        with torch.inference_mode(False):
            found = make()
    capturing = any(x.is_cuda for x in found) and torch.cuda.is_current_stream_capturing()
    if all(is_plain_tensor(x) and not x.is_meta for x in found) and not capturing:
        cache[key] = found
    return found


# Rotary embedding and positions


class TableRope(RewrittenModule):
    """Axial rotary embedding from precomputed tables; `lite3r_plugin.adapter.Rope2D` says what it computes.

    It takes the place of a module with a `base_frequency`, or a `base`, that looks up ``positions.max()`` on the device in every call,
    which waits for the GPU and forbids CUDA graphs. The angles are computed in FP32, whatever the dtype of the tokens.
    """

    def __init__(self, host: nn.Module) -> None:
        super().__init__(host)
        self.base = float(getattr(host, "base_frequency", None) or host.base)  # pyright: ignore[reportArgumentType]
        self._tables: dict[tuple[int, torch.device, torch.dtype], tuple[Tensor, ...]] = {}

    def rewritten(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Rotate ``[B, H, N, D]``, in its own dtype, by integer positions ``[B, N, 2]`` from 0 to below `MAX_POSITIONS`."""
        dim, device, dtype = tokens.shape[-1], tokens.device, tokens.dtype
        cos, sin = (
            table[positions][:, None]  # [B, 1, N, 2, D/4]
            for table in keep(self._tables, (dim, device, dtype), lambda: rotary_tables(dim, self.base, device, dtype))
        )
        first, second = tokens.unflatten(-1, (2, 2, -1)).unbind(-2)  # [B, H, N, 2, D/4]
        return torch.stack((first * cos - second * sin, second * cos + first * sin), -2).flatten(-3)


def rotary_tables(dim: int, base: float, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[MAX_POSITIONS, dim / 4]``."""
    quarter = dim // 4
    frequencies = 1.0 / base ** (torch.arange(0, 2 * quarter, 2, device=device).float() / (2 * quarter))
    angles = torch.arange(MAX_POSITIONS, device=device).float()[:, None] * frequencies
    return angles.cos().to(dtype), angles.sin().to(dtype)


def table_rope(fqn: str, head_dim: int) -> ExactRewrite:
    """`TableRope` for the module `fqn`, whose tokens are ``[B, H, N, head_dim]``."""

    def trial(rope: nn.Module) -> Trial:
        generator = torch.Generator("cpu").manual_seed(0)
        tokens = torch.randn(2, 2, 9, head_dim, generator=generator, device="cpu")
        positions = torch.randint(0, 64, (2, 9, 2), generator=generator, device="cpu")
        return Trial(like(rope), [(tokens, positions), (tokens[:1], positions[:1] * 0)])

    return ExactRewrite(fqn, "rotary embedding from tables, no wait for the GPU", TableRope, trial)


_positions: dict[tuple[int, int, int, torch.device], tuple[Tensor, ...]] = {}


def token_positions(views: int, rows: int, columns: int, special: int, device: torch.device) -> Tensor:
    """Coordinates of the tokens, int64 ``[views, P, 2]`` with P = special + rows * columns, on `device`. Those of a view are kept.

    Special tokens come first, at (0, 0); the patches follow row by row, at (row, column) counted from 1.

    Raises:
        InputError: an image has so many patches that the rotary tables do not reach.
    """
    if max(rows, columns) >= MAX_POSITIONS:
        raise InputError(
            f"images of {rows} x {columns} patches are too large; the rotary tables have {MAX_POSITIONS} positions: apply Lite3R with "
            "exact_rewrites=False"
        )

    def make() -> tuple[Tensor, ...]:
        axes = (torch.arange(1, size + 1, device="cpu") for size in (rows, columns))
        grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 1)
        return (torch.cat((grid.new_zeros(special, 2), grid)).to(device),)

    (positions,) = keep(_positions, (rows, columns, special, device), make)
    return positions.expand(views, -1, -1).contiguous()


# Heads


class KeptEmbedding(RewrittenMethod):
    """The method ``(features [B, C, h, w], width, height, ratio)`` of a DPT head that adds a position embedding, which is kept.

    The host computes it in FP64 in every call. Its first C / 2 channels depend on the column and the others on the row, so a row and a
    column of it are made and kept for each size of the features and of the image, dtype and device, with channels side by side.

    Args:
        module: The head.
        name: The method.
        keeps_dtype: Whether FP32 embeddings promote BF16 features, as the host's do.
    """

    def __init__(self, module: nn.Module, name: str, keeps_dtype: bool = True) -> None:
        super().__init__(module, name)
        self.keeps_dtype = keeps_dtype
        self._kept: dict[Any, tuple[Tensor, ...]] = {}

    def rewritten(self, x: Tensor, width: int, height: int, ratio: float = 0.1) -> Tensor:
        """As the host's method."""
        parts = self._parts(x, (x.shape[2], x.shape[3]), width, height, ratio)
        if parts is None:
            out = self.run_host(x, width, height, ratio)
            return out if self.keeps_dtype else out.to(x.dtype)
        return add_embedding(x, *parts)

    def upsampled(self, x: Tensor, size: tuple[int, int], width: int, height: int, ratio: float = 0.1) -> Tensor | None:
        """As the host's method, of `x` ``[B, C, h, w]`` at another `size` by bilinear interpolation with aligned corners.

        Returns:
            ``[B, C, *size]`` where one kernel does both (`upsample_with_embedding`), else None.
        """
        parts = self._parts(x, size, width, height, ratio) if self.enabled else None
        return None if parts is None else upsample_with_embedding(x, size, *parts)

    def _parts(self, x: Tensor, size: tuple[int, int], width: int, height: int, ratio: float) -> tuple[Tensor, ...] | None:
        """Of features as `x` of this size ``[w, C / 2]`` and ``[h, C / 2]``; None where they are not kept."""
        channels = x.shape[1]
        key = (channels, *size, width, height, ratio, x.dtype, x.device)
        if torch.compiler.is_compiling() or (key not in self._kept and len(self._kept) >= MOST_SIZES):
            return None

        def make() -> tuple[Tensor, ...]:
            dtype = x.dtype if self.keeps_dtype else torch.promote_types(x.dtype, torch.float32)
            row, column = (
                self.run_host(torch.zeros((1, channels, *shape), dtype=dtype, device=x.device), width, height, ratio)[0].flatten(1).T
                for shape in ((1, size[1]), (size[0], 1))
            )
            kept = row[:, : channels // 2], column[:, channels // 2 :]
            return tuple(part.contiguous() if self.keeps_dtype else part.to(x.dtype).contiguous() for part in kept)

        return keep(self._kept, key, make)


def kept_embedding(fqn: str, method: str, channels: int) -> list[ExactRewrite]:
    """`KeptEmbedding` of the head `fqn`, one that keeps dtypes and one that does not. Its features have so many `channels`."""

    def trial(head: nn.Module) -> Trial:
        generator = torch.Generator("cpu").manual_seed(0)
        sizes = [(2, channels, 3, 5, 70, 42), (1, channels, 3, 5, 70, 42), (1, 2 * channels, 4, 2, 30, 64)]
        inputs = [(torch.randn(*size[:4], generator=generator, device="cpu"), *size[4:]) for size in sizes]
        return Trial(like(head), [*inputs, (*inputs[0], 0.3)])

    def made(keeps_dtype: bool) -> Callable[[nn.Module], KeptEmbedding]:
        return lambda head: KeptEmbedding(head, method, keeps_dtype)

    words = "position embedding of the head kept"
    return [
        ExactRewrite(fqn, words, made(True), trial, method),
        ExactRewrite(fqn, f"{words}, in the dtype of the features", made(False), trial, method, keeps_dtype=False),
    ]


class FewRows(RewrittenMethod):
    """The forward of a Linear that is often given few rows in FP32, such as one token for each view: a GPU then reads its weight once.

    Its weight may be in BF16: half the bytes to hold and to read. What computes is FP32 all the same.

    Torch's own product runs for what `skinny_linear.takes` leaves to it, in code that is compiled, traced or transformed (`torch.func`),
    where a mode of torch sees all operators, and on tensors of other classes. For a weight in BF16 it is given a copy in FP32, which lasts
    as long as the call, or as gradients need it; compiled code without gradients has an operator instead.

    Raises:
        AdapterError: the module is no `torch.nn.Linear`.
    """

    narrow = ("weight",)

    def __init__(self, module: nn.Module) -> None:
        if type(module) is not nn.Linear:
            raise AdapterError(f"it is a {type(module).__name__}, not a torch.nn.Linear")
        super().__init__(module, "forward")

    def rewritten(self, input: Tensor) -> Tensor:
        """As the host's forward."""
        module: Any = self.module
        compiling = torch.compiler.is_compiling()
        if type(module) is nn.Linear and (compiling or not operators_are_seen()):
            weight, bias = module.weight, module.bias
            plain = is_plain_tensor(input) and is_plain_tensor(weight) and (bias is None or is_plain_tensor(bias))
            if plain and compiling and skinny_linear.is_narrow(input, weight) and skinny_linear.fits(input, weight, bias):
                return skinny_linear.linear_in_compiled(input, weight, bias)  # a compiler would make a copy of the weight
            if plain and not compiling and skinny_linear.takes(input, weight, bias):
                return skinny_linear.linear(input, weight, bias)
        return self.run_host(input)

    def run_host(self, *args: Any, **kwargs: Any) -> Any:
        """The method of the class; of a Linear whose weight is narrower than its input, in the dtype of the input."""
        module: Any = self.module
        if type(module).forward is nn.Linear.forward and self.takes(args, kwargs):
            (input,) = (*args, *kwargs.values())
            weight, bias = module.weight, module.bias
            if skinny_linear.is_narrow(input, weight):
                return F.linear(input, weight.to(input.dtype), None if bias is None else bias.to(input.dtype))
        return super().run_host(*args, **kwargs)


def few_rows(fqn: str, module: nn.Module) -> list[ExactRewrite]:
    """`FewRows` of the Linears in the module `fqn` that are so large that reading their weight takes longer than a launch."""

    def trial(linear: nn.Module) -> Trial:
        generator = torch.Generator("cpu").manual_seed(0)
        small = nn.Linear(24, 10, bias=getattr(linear, "bias", None) is not None)  # of the host's class, as `FewRows` asked
        return Trial(small, [(torch.randn(1, rows, 24, generator=generator, device="cpu"),) for rows in (1, skinny_linear.MAX_ROWS, 40)])

    words = "few rows in FP32 by a kernel that reads the weight once"
    return [
        ExactRewrite(f"{fqn}.{name}" if fqn else name, words, FewRows, trial, kernels=True)
        for name, inside in module.named_modules()
        if isinstance(inside, nn.Linear) and inside.in_features * inside.out_features >= LEAST_WEIGHTS
    ]


class OutputInFp32(RewrittenModule):
    """Gives the output of a module, a tensor or a list of them, in FP32: the activations that follow it need the precision."""

    def rewritten(self, *args: Any, **kwargs: Any) -> Any:
        """As the host's forward, in FP32."""
        output = self.run_host(*args, **kwargs)
        return output.float() if isinstance(output, Tensor) else [x.float() for x in output]


def output_in_fp32(fqn: str) -> ExactRewrite:
    """`OutputInFp32` of the module `fqn`."""
    return ExactRewrite(fqn, "output in FP32 whatever the weights are", OutputInFp32, None, keeps_dtype=False)


class KeptInFp32(RewrittenModule):
    """Computes in FP32 where the rest of the model becomes BF16; what it is given is somebody else's matter.

    Its weights stay in FP32, but for those that are only read by what widens them (`narrow_parameters`).
    """

    def rewritten(self, *args: Any, **kwargs: Any) -> Any:
        """As the host's forward."""
        return self.run_host(*args, **kwargs)


class InFp32(KeptInFp32):
    """Runs a module in FP32 where the rest of the model becomes BF16: its inputs become so."""

    def rewritten(self, *args: Any, **kwargs: Any) -> Any:
        """As the host's forward, in FP32."""
        parameters = ((module, *item) for module in self.modules() for item in module._parameters.items())
        own = (p.dtype for module, name, p in parameters if p is not None and name not in narrow_parameters(module))
        dtype = next(own, torch.float32)  # FP64 where somebody has made it that since
        args, kwargs = exchanged((args, kwargs), lambda x: x.to(dtype) if x.is_floating_point() else x)
        return self.run_host(*args, **kwargs)


def narrow_parameters(module: nn.Module) -> tuple[str, ...]:
    """Names of parameters of `module` itself that may be in BF16 although it computes in FP32 (`RewrittenMethod.narrow`)."""
    forward = vars(module).get("forward")
    return forward.narrow if isinstance(forward, RewrittenMethod) else ()


def in_fp32(fqn: str, entry: str = "", *, for_precision: bool = False) -> list[ExactRewrite]:
    """The module `fqn` computes in FP32.

    Args:
        fqn: Its name.
        entry: Its child through which all inputs come that count, by name; by default its own inputs become FP32, all of them.
        for_precision: Whether it would run in BF16 as well.
    """
    words = "arithmetic in FP32 whatever the other weights are"
    whole = ExactRewrite(fqn, words, KeptInFp32 if entry else InFp32, None, keeps_dtype=False, for_precision=for_precision)
    if not entry:
        return [whole]
    inside = f"{fqn}.{entry}" if fqn else entry
    return [whole, ExactRewrite(inside, "given FP32", InFp32, None, keeps_dtype=False, for_precision=for_precision)]


def not_in_bf16(fqn: str, reason: str) -> ExactRewrite:
    """Says that the module `fqn` does not run with weights in BF16, so that those of its model stay as they are, for this `reason`."""

    def make(module: nn.Module) -> RewrittenModule:
        raise AdapterError(reason)

    return ExactRewrite(fqn, "weights in BF16", make, None, keeps_dtype=False)


# Layers that nobody reads


class StartingMethod(RewrittenMethod):
    """A method of a head that can take its first steps from a layer as soon as the backbone has made it: their result is smaller."""

    def may_start(self) -> bool:
        """Whether the head may be run before it is called: nobody watches it, or runs something else instead."""
        raise NotImplementedError

    def start(self, layer: int, tokens: Tensor, special: int, height: int, width: int) -> Tensor | None:
        """What the head needs of `tokens` ``[B, S, P, C]``, one entry for each view ``[B, S, ...]``; None: it needs the layer itself.

        Args:
            layer: Which one it is.
            tokens: The layer.
            special: How many tokens of each view come before those of patches.
            height: Of the images, in pixels.
            width: As well.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class LayersRead:
    """What becomes of the layers of a backbone during one call of its model.

    Attributes:
        layers: Those that anybody reads.
        starting: Of those that only heads read which can start from them, what starts.
        plain_on: Types of devices on which the model switches autocast off for its heads.
    """

    layers: frozenset[int]
    starting: Mapping[int, tuple[StartingMethod, ...]] = field(default_factory=dict)
    plain_on: frozenset[str] = frozenset()

    def kept(self, layer: int, tokens: Tensor, special: int, height: int, width: int) -> Any:
        """`tokens` of a layer that is read, or what stands for it where each head that reads it has started (`StartingMethod.start`)."""
        methods = self.starting.get(layer)
        if not methods:
            return tokens
        started: dict[int, Tensor] = {}
        with without_autocast(tokens) if tokens.device.type in self.plain_on else contextlib.nullcontext():
            for method in methods:
                if (found := method.start(layer, tokens, special, height, width)) is None:
                    return tokens
                started[id(method)] = found
        return Started(layer, started)


_read: contextvars.ContextVar[dict[int, LayersRead]] = contextvars.ContextVar("layers that are read, by the backbone that gives them")


class ReadLayers(RewrittenMethod):
    """The forward of a model that reads some of the layers that its backbone gives: the others need not be kept during a call.

    A backbone that is called on its own gives all of its layers. Where images are all that a forward is given, no weight is trained
    and nobody watches the modules that are given the layers, those that only heads read are not kept either: the heads start at once
    (`StartingMethod`).

    Args:
        module: The model.
        backbone: Name of its child that gives the layers, and asks `layers_read` which.
        layers: Those that its forward reads.
        heads: Of layers that only heads read in a forward of images: names of these heads.
        method: By which they read them.
        plain_on: As in `LayersRead`.
        given: Names of all modules that are given the layers.
    """

    def __init__(
        self, module: nn.Module, backbone: str, layers: frozenset[int], heads: Mapping[int, tuple[str, ...]] | None = None,
        method: str = "", plain_on: frozenset[str] = frozenset(), given: Iterable[str] = (),
    ) -> None:  # fmt: skip
        super().__init__(module, "forward")
        self.backbone, self.layers, self.heads, self.method = backbone, layers, dict(heads or {}), method
        self.plain_on, self.given = plain_on, tuple(given)

    def rewritten(self, *args: Any, **kwargs: Any) -> Any:
        """As the host's forward."""
        if torch.compiler.is_compiling():  # the compiler drops what nobody reads
            return self.run_host(*args, **kwargs)
        images_alone = sum(value is not None for value in (*args, *kwargs.values())) == 1
        trained = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.module.parameters())
        starts = images_alone and not trained  # gradients may be wanted of some layers alone, or of heads that are still to run
        read = LayersRead(self.layers, self._starting() if starts else {}, self.plain_on)
        token = _read.set({**_read.get({}), id(host_of(getattr(self.module, self.backbone))): read})
        try:
            return self.run_host(*args, **kwargs)
        finally:
            _read.reset(token)

    def _starting(self) -> dict[int, tuple[StartingMethod, ...]]:
        """What can start, by layers of which all that is read can."""
        if any(has_forward_hooks(module) for module in self._modules(self.given)):
            return {}  # a hook may read any
        starts: dict[str, list[Any]] = {}  # what each head starts by; one that was taken out of the model since has nothing
        able: set[str] = set()
        for name in {name for names in self.heads.values() for name in names}:
            starts[name] = methods = [vars(head).get(self.method) for head in self._modules([name])]
            if all(isinstance(method, StartingMethod) and method.enabled and method.may_start() for method in methods):
                able.add(name)
        return {layer: tuple(m for name in names for m in starts[name]) for layer, names in self.heads.items() if able.issuperset(names)}

    def _modules(self, names: Iterable[str]) -> list[nn.Module]:
        """Those of these names that were not taken out of the model since."""
        found = [functools.reduce(lambda owner, part: getattr(owner, part, None), name.split("."), self.module) for name in names]
        return [module for module in found if isinstance(module, nn.Module)]


def layers_read(backbone: RewrittenModule) -> LayersRead | None:
    """What becomes of the layers that this call of `backbone` gives; None: all of them may be read."""
    if torch.compiler.is_compiling() or has_forward_hooks(backbone):  # a hook may read any
        return None
    return _read.get({}).get(id(backbone.host))


class NotKept:
    """Stands for a layer that was not kept, and says so when it is used."""

    reason = "nothing read it in a trial"

    def __init__(self, layer: int) -> None:
        self.layer = layer

    def __getitem__(self, key: Any) -> Any:
        raise AdapterError(
            f"layer {self.layer} was not kept, since {self.reason}: call the model with apply_lite3r(model, exact_rewrites=False)"
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self[name]

    def to(self, *args: Any, **kwargs: Any) -> NotKept:
        """Itself: accelerate moves all that a module is given, read or not."""
        return self


class Started(NotKept):
    """Stands for a layer from which all heads that read it have started."""

    reason = "only heads that start from it at once read it in a trial"

    def __init__(self, layer: int, started: Mapping[int, Tensor]) -> None:
        super().__init__(layer)
        self.started = started

    def of(self, method: StartingMethod) -> Tensor:
        """What `method` has made of the layer."""
        found = self.started.get(id(method))
        return self[:] if found is None else found


# Copies for trials


def without_weights(module: nn.Module, instead: Mapping[nn.Module, nn.Module]) -> Any:
    """A copy of a module in FP32 on the CPU, with other modules in the place of some, to see what its forward does with its inputs.

    It takes next to no memory and time: its weights are zeros, its Linears and convolutions give zeros of the right shapes. Nobody's
    hooks are in it.
    """
    memo: dict[int, Any] = {id(old): new for old, new in instead.items()}
    skipped = {inside for old in instead for inside in old.modules()}
    for inside in module.modules():
        if inside in skipped or id(inside) in memo:
            continue
        if type(inside) in (nn.Linear, nn.Conv2d, nn.ConvTranspose2d):
            memo[id(inside)] = _ZeroLinear(inside.out_features) if isinstance(inside, nn.Linear) else _ZeroConvolution(inside)
            continue
        for table in TABLES:
            if "hooks" in table:
                memo[id(vars(inside)[table])] = type(vars(inside)[table])()
        for tensor in (*inside._parameters.values(), *inside._buffers.values()):
            if tensor is not None:
                dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
                zeros = torch.zeros((), dtype=dtype, device="cpu").expand(tensor.shape)
                memo[id(tensor)] = nn.Parameter(zeros, requires_grad=False) if isinstance(tensor, nn.Parameter) else zeros
    return copy.deepcopy(module, memo).eval()


class _ZeroLinear(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], self.size)


class _ZeroConvolution(nn.Module):
    def __init__(self, host: Any) -> None:
        super().__init__()
        self.like = {name: getattr(host, name) for name in ("stride", "padding", "dilation")}
        self.weight = torch.zeros((), device="cpu", dtype=torch.float32).expand(host.out_channels, 1, *host.kernel_size)
        self.groups, self.transposed, self.extra = host.out_channels, host.transposed, host.output_padding

    def forward(self, x: Tensor) -> Tensor:
        one = x[:, :1].expand(-1, self.groups, -1, -1) * 0
        if self.transposed:
            return F.conv_transpose2d(one, self.weight, output_padding=self.extra, groups=self.groups, **self.like)
        return F.conv2d(one, self.weight, groups=self.groups, **self.like)
