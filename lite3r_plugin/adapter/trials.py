"""Trials: small copies of a host's modules, and the comparison of what takes their place with what they give.

What replaces a host's arithmetic is compared with it before anything changes: in FP32, on the CPU, with random weights, so that what a
fork does in another way shows whatever its weights are, and whether they are here or not.
"""

from __future__ import annotations

import contextlib
import contextvars
import copy
import math
import types
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AdapterError, short, shown
from ..wrapper import TABLES

TOLERANCE = 1e-5  # of the largest number of an output: FP32 with room for another order of sums
POOL = 1_000_003  # random numbers that weights are cut from; a prime, lest rows of a weight repeat
READ = 4096  # elements of a buffer whose values tell modules apart; of larger ones it is the buffer itself

# What others lay on an instance to run something around its forward; a copy runs the forward of its class.
_AROUND = ("forward", "_compiled_call_impl", "_hf_hook", "_old_forward")


_running = contextvars.ContextVar("whether a trial runs", default=False)


@contextlib.contextmanager
def trial() -> Iterator[None]:
    """Where trials run: on the CPU, without gradients and autocast."""
    token = _running.set(True)
    try:
        with torch.no_grad(), torch.device("cpu"), torch.autocast("cpu", enabled=False):
            yield
    finally:
        _running.reset(token)


def in_trial() -> bool:
    """Whether a trial runs: what has a kernel for GPUs runs by its definition then, to be compared."""
    return _running.get()


def require_equal(expected: Any, found: Any, own: str) -> None:
    """Raise `AdapterError` with the reason unless two results are the same up to rounding, in shapes and dtypes too.

    Args:
        expected: What the host gives: tensors, other values, and lists, tuples and mappings of them.
        found: What its replacement gives.
        own: What the host's is called in the reason, such as ``"the host's own forward"``.
    """
    own_values, values = list(_leaves(expected)), list(_leaves(found))
    if len(own_values) != len(values):
        raise AdapterError(f"it differs from {own}, which gives {len(own_values)} values and not {len(values)}")
    for a, b in zip(own_values, values, strict=True):
        _require_equal_values(a, b, f"it differs from {own}")


def like(module: nn.Module, **children: nn.Module) -> Any:
    """A small copy of a module for a trial, in FP32 on the CPU, of the same class, with these children and none else.

    Parameters and buffers of the module itself become random numbers, other attributes copies.
    """
    copied = copy.copy(module)
    generator = torch.Generator("cpu").manual_seed(0)
    shared = {id(inside): inside for inside in module.modules()}
    for name, value in vars(module).items():
        if name in TABLES:
            vars(copied)[name] = copy.copy(value)
        elif name not in ("forward", "_compiled_call_impl"):
            vars(copied)[name] = copy.deepcopy(value, dict(shared))
    for table in TABLES:
        if "hooks" in table:
            vars(copied)[table] = type(vars(copied)[table])()
    tables: tuple[Any, ...] = (copied._parameters, copied._buffers)
    for table in tables:
        for name, tensor in table.items():
            if tensor is not None and tensor.is_floating_point():
                values = torch.rand(tensor.shape, generator=generator, device="cpu", dtype=torch.float32) + 0.5
                table[name] = nn.Parameter(values, requires_grad=False) if isinstance(tensor, nn.Parameter) else values
    copied._modules = dict(children)
    copied.training = False
    return copied


class RandomCopies:
    """Whole copies of modules with random weights of the same shapes. Making one costs little more than writing its weights."""

    def __init__(self) -> None:
        self._generator = torch.Generator("cpu").manual_seed(0)
        self._pool = torch.empty(0)
        self._next = 0
        self._linears: dict[tuple[int, int, bool, int], nn.Linear] = {}

    def of(self, module: nn.Module, instead: Mapping[nn.Module, nn.Module]) -> Any:
        """A copy in FP32 on the CPU, in eval mode, with other modules in the place of some inside.

        Parameters become random numbers; buffers and other attributes keep their values, as far as they have any. Nobody's hooks are in
        it, nor what was laid around a forward.

        Raises:
            AdapterError: something in it cannot be copied, such as a process group or a lock.
        """
        memo: dict[int, Any] = {id(old): new for old, new in instead.items()}
        kept: list[Any] = []  # whose ids are in `memo`
        for inside in _modules_but(module, instead).values():
            for name, value in vars(inside).items():
                if name in _AROUND:
                    memo[id(value)] = None
                elif "hooks" in name and name in TABLES:
                    memo[id(value)] = type(value)()
                elif name == "_parameters":
                    for parameter in filter(_is_float, value.values()):
                        memo.setdefault(id(parameter), nn.Parameter(self.numbers(parameter.shape), requires_grad=False))
                elif name not in TABLES or name == "_buffers":
                    for leaf in _leaves(value):
                        if isinstance(leaf, Tensor):
                            kept.append(leaf)
                            memo.setdefault(id(leaf), self._of_tensor(leaf))
                        elif isinstance(leaf, types.ModuleType):  # there is one of it
                            memo[id(leaf)] = leaf
        try:
            copied = copy.deepcopy(module, memo)
        except Exception as error:  # whatever an attribute raises
            raise AdapterError(f"it cannot be copied to be tried ({short(error)})") from error
        for inside in copied.modules():
            for name in _AROUND:
                vars(inside).pop(name, None)
        return copied.eval()

    def linears(self, hosts: Iterable[Any]) -> dict[nn.Module, nn.Module]:
        """A plain Linear of the size of each of `hosts`, whatever classes those are of: quantised, or with LoRA around them.

        They are different ones, but serve again in the next trial.
        """
        used: Counter[tuple[int, int, bool]] = Counter()
        made: dict[nn.Module, nn.Module] = {}
        for host in hosts:
            size = (host.in_features, host.out_features, host.bias is not None)
            if (key := (*size, used[size])) not in self._linears:
                self._linears[key] = self._linear(*size)
            used[size] += 1
            made[host] = self._linears[key]
        return made

    def numbers(self, shape: Any) -> Tensor:
        """Random numbers for a parameter of `shape`: of a matrix so large that it keeps the size of what it maps; of a vector about 1."""
        count = math.prod(shape)
        if not len(self._pool):
            self._pool = torch.randn(POOL, generator=self._generator, device="cpu", dtype=torch.float32)
        self._next = (self._next + 7919) % POOL
        repeats = -(-(self._next + count) // POOL)
        drawn = self._pool.repeat(repeats)[self._next : self._next + count].reshape(shape)
        return drawn * math.prod(shape[1:]) ** -0.5 if len(shape) > 1 else drawn * 0.25 + 1

    def tokens(self, *shape: int) -> Tensor:
        """Random numbers around 0 of size 1."""
        return torch.randn(shape, generator=self._generator, device="cpu", dtype=torch.float32)

    def positions(self, *shape: int) -> Tensor:
        """Random coordinates, int64, of a small image."""
        return torch.randint(0, 12, shape, generator=self._generator, device="cpu")

    def _linear(self, inputs: int, outputs: int, bias: bool) -> nn.Linear:
        made: Any = nn.utils.skip_init(nn.Linear, inputs, outputs, bias=bias, dtype=torch.float32)
        for parameter in made.parameters():
            parameter.data = self.numbers(parameter.shape)
        return made.requires_grad_(False)

    def _of_tensor(self, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return torch.zeros_like(tensor, device="cpu") if tensor.is_meta else tensor.detach().to("cpu", copy=True)
        return self.numbers(tensor.shape) if tensor.is_meta else tensor.detach().to("cpu", torch.float32, copy=True)


def structure(module: nn.Module, but: Mapping[nn.Module, nn.Module]) -> Hashable:
    """All that a forward of `module` may depend on, but for the values of its parameters: modules of equal structure pass the same trials.

    These are classes, attributes by value (objects that have none by identity), shapes of parameters, buffers, and which children are
    the same module. Nothing is said of modules in `but`.
    """
    numbers: dict[nn.Module, int] = {}
    inside = _modules_but(module, but, remove_duplicate=False)
    return tuple((name, numbers.setdefault(m, len(numbers)), None if m in but else _own(m)) for name, m in inside.items())


def _own(module: nn.Module) -> Hashable:
    attributes = tuple((name, _frozen(value)) for name, value in vars(module).items() if name not in TABLES and name not in _AROUND)
    parameters = tuple((name, None if p is None else (tuple(p.shape), p.is_floating_point())) for name, p in module._parameters.items())
    return type(module), attributes, parameters, _frozen(module._buffers)


def _modules_but(module: nn.Module, but: Mapping[nn.Module, nn.Module], remove_duplicate: bool = True) -> dict[str, nn.Module]:
    """`module` and those inside it by name, without what is inside of `but`; those themselves only with duplicates."""
    hidden: list[str] = []
    found: dict[str, nn.Module] = {}
    for name, inside in module.named_modules(remove_duplicate=remove_duplicate):
        if name.startswith(tuple(f"{outer}." for outer in hidden)):
            continue
        if inside in but:
            hidden.append(name)
            if remove_duplicate:
                continue
        found[name] = inside
    return found


def _frozen(value: Any) -> Hashable:
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, torch.dtype, torch.device, type)):
        return type(value), value
    if isinstance(value, (tuple, list)):
        return type(value), tuple(map(_frozen, value))
    if isinstance(value, Mapping):
        return type(value), tuple((_frozen(key), _frozen(item)) for key, item in value.items())
    if isinstance(value, Tensor) and not value.is_meta and value.numel() <= READ and type(value) in (Tensor, nn.Parameter):
        return tuple(value.shape), value.dtype, tuple(value.detach().flatten().tolist())
    return type(value), id(value)


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _require_equal_values(expected: Any, found: Any, differs: str) -> None:
    if not isinstance(expected, Tensor) or not isinstance(found, Tensor):
        if type(expected) is not type(found) or expected != found:
            raise AdapterError(f"{differs}, which gives {_said(expected)} and not {_said(found)}")
        return
    if (expected.shape, expected.dtype) != (found.shape, found.dtype):
        raise AdapterError(f"{differs}, which gives {_kind(expected)} and not {_kind(found)}")
    difference = (expected.double() - found.double()).abs().max().item() if expected.numel() else 0.0
    largest = expected.double().abs().max().item() if expected.numel() else 0.0
    if not difference <= TOLERANCE * max(largest, 1e-30):
        raise AdapterError(f"{differs} by {difference:.2g}, where the largest number is {largest:.2g}")


def _leaves(value: Any) -> Iterator[Any]:
    """What is inside of lists, tuples and mappings, in order."""
    if isinstance(value, Mapping):
        value = [item for pair in value.items() for item in pair]
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _said(value: Any) -> str:
    return f"a tensor, {_kind(value)}," if isinstance(value, Tensor) else shown(value)


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
