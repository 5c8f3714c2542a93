"""What styles have in common that run the whole path themselves: Linears, norms, rotary embedding, attention, output Linear."""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...adapter.sites import AttentionSite, FusedQKV, KeyValueCache, SeparateQKV
from ...errors import AdapterError
from ...fp8.linear import Fp8Linear
from ...ops.qk_norm_rope import HeadNorm
from ...wrapper import asked_for, by_name, may_be_read
from ..inputs import AttentionInputs
from .base import ProjectionStyle, SiteModule, child_of
from .parts import splits

PARTS = ("positions", "mask", "key", "value", "key_positions")
"""What a site may name of what its forward is given, as `Given` calls it."""


@dataclasses.dataclass(frozen=True)
class Past:
    """What a call that wants a cache is given of the tokens before: k and v, or None at the beginning; and whether in a list."""

    tensors: tuple[Tensor, Tensor] | None
    in_list: bool

    @classmethod
    def of(cls, past: Any) -> Past:
        k, v = (None, None) if past is None else past
        return cls(None if k is None or v is None else (k, v), isinstance(past, list))

    def packed(self, cached: Sequence[Tensor]) -> Any:
        """k and v as they came."""
        return list(cached) if self.in_list else tuple(cached)


@dataclasses.dataclass(frozen=True)
class Given:
    """What the forward of a site is given.

    Attributes:
        x: Hidden states that queries are made of, ``[B, N, C]``.
        key, value: Those that keys and values are made of, ``[B, M, C]``.
        positions, key_positions: Coordinates of the tokens.
        mask: A mask ``[N, N]``.
        cached: The tokens before, where a cache is wanted.
    """

    x: Tensor
    key: Tensor
    value: Tensor
    positions: Tensor | None
    key_positions: Tensor | None
    mask: Tensor | None
    cached: Past | None


class ProjectedStyle(ProjectionStyle):
    """Projects, attends and projects out. A subclass says which Linears there are and what they make.

    Attributes:
        shape: ``(H, D)``.
        names: The arguments of the forward that the site knows, by what they are in `Given`.
        drops: Names of what drops by chance inside of the host.
        crossed: Whether keys and values are of other tokens than queries.
        cache: How what came before is given and returned, or None.
    """

    replaces = True

    def __init__(self, site: AttentionSite, host: nn.Module, spec: FusedQKV | SeparateQKV) -> None:
        super().__init__(site, host)
        self.spec = spec
        self.shape = (spec.num_heads, site.head_dim)
        self.fuses = spec.rope is not None
        self.names = {part: name for part in PARTS if (name := getattr(spec, part, None)) is not None}
        self.crossed = "key" in self.names
        self.cache: KeyValueCache | None = getattr(spec, "cache", None)
        self.drops = tuple(name for name, module in host.named_modules() if isinstance(module, nn.modules.dropout._DropoutNd))

    @property
    @abc.abstractmethod
    def input_linears(self) -> dict[str, int]:
        """The Linears that read the hidden states, with their output features as multiples of ``H * D``."""

    @abc.abstractmethod
    def project(self, module: SiteModule, x: Tensor, heads: slice | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v ``[B, H, N, D]`` of hidden states ``[B, N, C]``, of some `heads` or of all."""

    def project_across(self, module: SiteModule, x: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same where keys and values are of other tokens, which only some styles know."""
        return self.project(module, x)

    def returned(self, out: Tensor) -> Any:
        """What the host's forward returns where its output is `out`, ``[B, N, C]``."""
        return out

    def compared(self, result: Any) -> Any:
        """What a trial compares of what a forward returns."""
        return result

    def check(self, host: nn.Module) -> None:
        """Raise `AdapterError` unless `host` has the children that the site names, in the right sizes."""
        spec, fqn, width = self.spec, self.site.fqn, self.shape[0] * self.shape[1]
        for name, multiple in self.input_linears.items():
            self._check_size(host, name, "out_features", multiple * width)
        self._check_size(host, spec.out, "in_features", width)
        for name in (spec.q_norm, spec.k_norm, spec.out_drop, spec.attn_drop):
            if name is not None:
                child_of(host, name, fqn)
        names = [*self.names.values(), *([] if self.cache is None else (self.cache.past, self.cache.wanted))]
        if unknown := [name for name in names if name is not None and name not in self.argument_names]:
            raise AdapterError(f"site {fqn!r}: the host's forward has no argument {unknown[0]!r}")
        if spec.rope is not None and self.shape[1] % 4:
            raise AdapterError(f"site {fqn!r}: an axial rotary embedding needs a head_dim that is a multiple of 4, not {self.shape[1]}")

    def takes_fp8(self, child: Callable[[str], Any]) -> bool:
        if self.crossed:
            return False  # which it is given in full precision
        linears = [child(name) for name in self.input_linears]
        return all(isinstance(linear, Fp8Linear) and linear.takes_fp8 for linear in linears)

    def run(self, module: SiteModule, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        spec = self.spec
        given, refused = self._arguments(args, kwargs)
        if refused is None and module.training:
            refused = self._drops(module)
        if refused is not None:
            if module.sparse:
                module.note(refused)
            return module.run_host(*args, **kwargs)
        if module.heads_at_once is not None and self._splits(module, given):
            parts = self._by_heads(module, given, module.heads_at_once)
            return self.returned(self._out(module, module.attend_by_heads(parts, self.shape[0], args, kwargs)))
        q, k, v = self.project_across(module, given.x, given.key, given.value)
        q, q_norm = _norm(module, spec.q_norm, q)
        as_made = k
        k, k_norm = _norm(module, spec.k_norm, k)
        if given.cached is not None and k is not as_made and self.cache is not None and not self.cache.finished:
            module.note("its keys are cached before a norm that is not known")
            return module.run_host(*args, **kwargs)
        inputs = AttentionInputs(
            q, k, v, q_norm, k_norm, given.positions, self._rope_base(given), crossed=self.crossed, key_positions=given.key_positions,
            mask=given.mask,
        )  # fmt: skip
        cached = None
        if given.cached is None:
            out = module.attend(inputs, args, kwargs)
        else:
            assert self.cache is not None
            out, *cached = module.attend_to_past(inputs, given.cached.tensors, self.cache, args, kwargs)
        out = self._out(module, out)
        if given.cached is not None and cached is not None:
            return out, given.cached.packed(cached)
        return self.returned(out)

    def _drops(self, module: SiteModule) -> str | None:
        """What is dropped by chance in training that the site cannot drop, or None."""
        if self.spec.attn_drop is not None and module.child(self.spec.attn_drop).p > 0:
            return "it drops attention weights by chance"
        known = {*self.input_linears, self.spec.out, self.spec.out_drop, self.spec.attn_drop, self.spec.q_norm, self.spec.k_norm}
        for name in self.drops:
            outer, *inner = name.split(".")
            # Whatever came in its place since may have no such part.
            drop = functools.reduce(lambda x, part: getattr(x, part, None), inner, getattr(module, outer, None))
            if outer not in known and getattr(drop, "p", 0) > 0:
                return f"it has {name!r}, which drops by chance and is not named"
        return None

    def _out(self, module: SiteModule, out: Tensor) -> Tensor:
        """The output ``[B, N, C]`` of the host from that of attention ``[B, H, N, D]``."""
        linear = module.child(self.spec.out)
        out = linear.of_heads(out) if isinstance(linear, Fp8Linear) else linear(out.transpose(1, 2).flatten(2))
        return out if self.spec.out_drop is None else module.child(self.spec.out_drop)(out)

    def _rope_base(self, given: Given) -> float | None:
        rotated = given.positions is not None or given.key_positions is not None
        return self.spec.rope.base if self.spec.rope is not None and rotated else None

    def _splits(self, module: SiteModule, given: Given) -> bool:
        """Whether q, k and v of this call can be made and attended to by some heads at a time."""
        if self.crossed or given.cached is not None or given.mask is not None or module.is_seen_whole:
            return False
        norms = [module.child(name) for name in (self.spec.q_norm, self.spec.k_norm) if name is not None]
        linears = {module.child(name): multiple * self.shape[1] for name, multiple in self.input_linears.items()}
        known = all(type(norm) is nn.Identity or (may_be_read(norm) and head_norm(norm, self.shape[1])) for norm in norms)
        read_alike = len({linear.takes_fp8 if isinstance(linear, Fp8Linear) else None for linear in linears}) == 1
        return known and read_alike and all(splits(linear, outputs) for linear, outputs in linears.items())

    def _by_heads(self, module: SiteModule, given: Given, size: int) -> Iterator[AttentionInputs]:
        """The inputs, `size` heads at a time, each made when it is asked for; nothing of those before is held."""
        x: Any = given.x  # a `Quantized` where its Linears take it, as everywhere here
        (count, dim), spec = self.shape, self.spec
        linear = module.child(next(iter(self.input_linears)))
        if isinstance(linear, Fp8Linear):  # rounded once, and what saturates is counted once
            x = linear.as_input(x)
        q_norm, k_norm = (None if name is None else head_norm(module.child(name), dim) for name in (spec.q_norm, spec.k_norm))
        for first in range(0, count, size):
            yield AttentionInputs(
                *self.project(module, x, slice(first, min(first + size, count))),
                q_norm, k_norm, given.positions, self._rope_base(given), num_heads=count,
            )  # fmt: skip

    def _arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Given, str | None]:
        """What the site is given, and why sparse attention cannot honour it (or None)."""
        names = self.argument_names
        given = by_name(names, args) | kwargs
        if names[0] not in given:
            raise AdapterError(f"site {self.site.fqn!r} was called without {names[0]!r}, its first argument: describe it as Routed()")
        x = given.pop(names[0])
        given |= {f"number {i + 1}": value for i, value in enumerate(args) if i >= len(names)}  # of a host with *args
        named = {part: given.pop(name, None) for part, name in self.names.items()}
        cached = None
        if self.cache is not None:
            past, wanted = given.pop(self.cache.past, None), given.pop(self.cache.wanted or "", None)
            if bool(wanted) if self.cache.wanted is not None else past is not None:
                cached = Past.of(past)
        refused = list(asked_for(given, self.argument_defaults))
        if cached is not None and named.get("mask") is not None:
            refused.append(f"a cache and {self.names['mask']}")
        key, value = named.get("key"), named.get("value")
        result = Given(
            x,
            x if key is None else key,
            x if value is None else value,
            named.get("positions"),
            named.get("key_positions"),
            named.get("mask"),
            cached,
        )
        if self.crossed and (key is None or value is None):
            refused.append("no keys or values")
        return result, f"it is given {', '.join(refused)}" if refused else None

    def _check_size(self, host: nn.Module, name: str, what: str, expected: int) -> None:
        found = getattr(child_of(host, name, self.site.fqn), what, None)
        if found is not None and found != expected:
            raise AdapterError(
                f"site {self.site.fqn!r}: {name}.{what} is {found}, but {self.shape[0]} heads of {self.shape[1]} need {expected}; "
                "correct num_heads or head_dim in the adapter"
            )


def head_norm(norm: nn.Module, dim: int) -> HeadNorm | None:
    """`norm` as data for the fused kernel; None when it is not a LayerNorm or RMSNorm over exactly `dim` features."""
    if type(norm) is nn.LayerNorm and norm.normalized_shape == (dim,):
        return HeadNorm("layer", norm.weight, norm.bias, norm.eps)
    if type(norm) is nn.RMSNorm and norm.normalized_shape == (dim,):
        return HeadNorm("rms", norm.weight, None, torch.finfo(torch.float32).eps if norm.eps is None else norm.eps)
    return None


def _norm(module: SiteModule, name: str | None, x: Tensor) -> tuple[Tensor, HeadNorm | None]:
    """`x` and the norm left to the kernel; one that the kernel does not know, or may not read, is applied here."""
    norm = module.child(name) if name is not None else None
    if norm is None or type(norm) is nn.Identity:
        return x, None
    known = head_norm(norm, x.shape[-1]) if may_be_read(norm) else None
    return (x, known) if known is not None else (norm(x), None)
