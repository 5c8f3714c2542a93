"""A transformer block of a converted model: every quantisation fused into the operation before it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapter.sites import AttentionSite, PreNormBlock
from ..errors import AdapterError
from ..ops.dispatch import require_one_device
from ..ops.fp8 import Quantized, passes
from ..wrapper import HostWrapper, argument_defaults, argument_names, asked_for, by_name, has_forward_hooks, may_be_read, must_be_called
from .linear import Fp8Linear


class Fp8Block(HostWrapper):
    """Stands in for a `PreNormBlock` whose MLP is in FP8.

    A token of the residual stream is read and written once between attention and MLP: residual sum, LayerNorm and
    quantisation are one pass; so are LayerNorm and quantisation before the attention, where its site takes FP8, and
    activation and quantisation inside the MLP. With gradients, in training, when it is called with what the description does
    not cover, and while a module inside has hooks, is wrapped or has another one in its place, the host's own forward runs, on the
    same FP8 Linears. (Code compiled by `torch.compile` looks for that only at modules whose weights are read here.)

    Args:
        host: The block.
        site: The attention site inside it, with its `block`.
        attention_takes_fp8: Whether the attention's input may be in FP8 already.
        passed: Arguments of the block that go to the attention under the same names; with others the host's own forward runs.
    """

    parts: tuple[tuple[nn.Module, str, nn.Module], ...] = ()
    rows_at_once: int | None = None
    """Of the MLP, where memory is planned (`lite3r_plugin.runtime.memory`); None: all."""

    def __init__(self, host: nn.Module, site: AttentionSite, attention_takes_fp8: bool, passed: frozenset[str]) -> None:
        super().__init__(host)
        assert site.block is not None
        self.block: PreNormBlock = site.block
        self.attention = site.fqn[len(site.block.fqn) + 1 :]
        self.attention_takes_fp8 = attention_takes_fp8
        self.argument_names: tuple[str, ...] = argument_names(host) or ()
        self.argument_defaults = argument_defaults(host)
        # Whoever wraps or watches a module inside is to see it called, with tensors.
        self.parts = tuple((parent, name, child) for parent in host.modules() for name, child in parent.named_children())
        self.passed = passed
        self.inside = self._find()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the host's forward."""
        given = by_name(self.argument_names, args) | kwargs
        x = given.pop(self.argument_names[0])
        given = asked_for(given, self.argument_defaults)
        if not isinstance(x, Tensor) or self.training or not given.keys() <= self.passed:
            return self.run_host(*args, **kwargs)
        compiling = torch.compiler.is_compiling()
        inside = self._find() if compiling else self.inside  # what is in its place, as `_untouched` asks
        wants_grad = torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.parameters()))
        if wants_grad or not (compiling or self._untouched(inside.attention)) or not all(map(may_be_read, inside.owners)):
            return self.run_host(*args, **kwargs)
        return self._forward(x, inside, given)

    def _find(self) -> _Inside:
        block = self.block
        norm1, norm2, up, down = (self.get_submodule(name) for name in (block.norm1, block.norm2, block.up, block.down))
        gains: list[tuple[nn.Module, str] | None] = []
        for name in (block.gain1, block.gain2):
            owner, _, own = (name or "").rpartition(".")
            gains.append(None if name is None else (self.get_submodule(owner), own))
        owners = (norm1, norm2, *(gain[0] for gain in gains if gain is not None and gain[0] is not self))
        return _Inside(self.get_submodule(self.attention), norm1, norm2, up, down, gains[0], gains[1], owners)

    def _untouched(self, attention: nn.Module) -> bool:
        if has_forward_hooks(attention):
            return False
        for parent, name, child in self.parts:  # of every call of every block: a plain loop, and no call for what has no hooks
            if parent._modules.get(name) is not child:
                return False
            watched = child._forward_hooks or child._forward_pre_hooks or "forward" in child.__dict__
            if watched and child is not attention and must_be_called(child):
                return False
        return True

    def _forward(self, x: Tensor, inside: _Inside, given: dict[str, Any]) -> Tensor:
        norm1, norm2, up, down = inside.norm1, inside.norm2, inside.up, inside.down
        gain1, gain2 = (None if gain is None else getattr(*gain) for gain in (inside.gain1, inside.gain2))
        read = (norm1.weight, norm2.weight, gain1, gain2)
        if any(weight is not None and weight.device != x.device for weight in read):
            names = (f"{self.block.norm1}.weight", f"{self.block.norm2}.weight", "gain1", "gain2")
            require_one_device(x, **dict(zip(names, read, strict=True)))
        assert isinstance(norm2, nn.LayerNorm)
        assert isinstance(up, Fp8Linear)
        assert isinstance(down, Fp8Linear)
        if self.attention_takes_fp8:
            assert isinstance(norm1, nn.LayerNorm)
            normed = passes(x).layer_norm_quantize(x, norm1.weight, norm1.bias, norm1.eps, _counter(inside.attention))
        else:
            normed = norm1(x)
        update = inside.attention(normed, **given)
        x, rows = passes(x).residual_norm_quantize(x, update, gain1, norm2.weight, norm2.bias, norm2.eps, up.infinities)
        update = mlp(rows, up, down, self.block.activation, self.rows_at_once)
        return passes(x).residual(x, update, gain2)


class _Inside(NamedTuple):
    """Modules inside of a block; each gain as who has it and its name there, and all modules whose parameters are read."""

    attention: nn.Module
    norm1: Any
    norm2: Any
    up: nn.Module
    down: nn.Module
    gain1: tuple[nn.Module, str] | None
    gain2: tuple[nn.Module, str] | None
    owners: tuple[nn.Module, ...]


def block_forward(host: nn.Module, site: AttentionSite, x: Tensor, **given: Any) -> Tensor:
    """The definition of `PreNormBlock`: the parts of `host` put together as `site.block` says.

    Args:
        host: The block.
        site: The site inside it; its `block` is not None.
        x: ``[B, N, C]``.
        **given: Further arguments of the block, which go to the attention.

    Returns:
        ``[B, N, C]``.
    """
    block = site.block
    assert block is not None
    gains = [1.0 if name is None else host.get_parameter(name) for name in (block.gain1, block.gain2)]
    norm1, norm2, up, down = (host.get_submodule(name) for name in (block.norm1, block.norm2, block.up, block.down))
    x = x + gains[0] * host.get_submodule(site.fqn[len(block.fqn) + 1 :])(norm1(x), **given)
    hidden = up(norm2(x))
    if block.activation == "swiglu":
        gate, value = hidden.chunk(2, -1)
        hidden = F.silu(gate) * value
    else:
        hidden = F.gelu(hidden, approximate="tanh" if block.activation == "gelu_tanh" else "none")
    return x + gains[1] * down(hidden)


def mlp(x: Quantized, up: Fp8Linear, down: Fp8Linear, activation: str, rows_at_once: int | None = None) -> Tensor:
    """``down(activation(up(x)))`` with `activation` as in `PreNormBlock`, of rows ``[..., C]`` in FP8, so many of them at once.

    Making what `up` gives in parts that stay in the L2 cache of an H100 was slower at every size (benchmarks/results/h100_fp8.json).
    """
    if rows_at_once is not None and x.scale.numel() > rows_at_once:
        flat = Quantized(x.data.flatten(0, -2), x.scale.flatten(0, -2), x.dtype)
        out: Tensor | None = None
        for start in range(0, len(flat.scale), rows_at_once):
            here = slice(start, start + rows_at_once)
            part = mlp(Quantized(flat.data[here], flat.scale[here], x.dtype), up, down, activation)
            out = part.new_empty(len(flat.scale), part.shape[-1]) if out is None else out
            out[here] = part
        assert out is not None
        return out.unflatten(0, x.scale.shape[:-1])
    wide = up(x)
    if activation == "swiglu":
        rows = passes(wide).swiglu_quantize(wide, infinities=down.infinities)
    else:
        approximate = "tanh" if activation == "gelu_tanh" else "none"
        rows = passes(wide).gelu_quantize(wide, approximate, infinities=down.infinities)
    del wide  # four times as large as the result, which comes next
    return down(rows)


def check_block(modules: Mapping[str, nn.Module], site: AttentionSite) -> None:
    """Raise `AdapterError` unless the block that `site` describes, if it describes one, is there with all its parts.

    Args:
        modules: All modules of the model by name.
        site: The site.
    """
    block = site.block
    if block is None:
        return
    try:
        if not site.fqn.startswith(f"{block.fqn}."):
            raise AttributeError("the site is not inside")
        if block.fqn not in modules:
            raise AttributeError("the model has no such module")
        host = modules[block.fqn]
        for name in (block.norm1, block.norm2, block.up, block.down):
            host.get_submodule(name)
        for name in (block.gain1, block.gain2):
            if name is not None:
                host.get_parameter(name)
    except AttributeError as error:
        raise AdapterError(f"site {site.fqn!r}: the block {block.fqn!r} is not as described: {error}; correct the adapter") from error


def why_not_fused(host: nn.Module, block: PreNormBlock) -> str | None:
    """The reason why `Fp8Block` cannot stand in for `host`, or None when it can."""
    if not argument_names(host):
        return "the arguments of its forward cannot be read"
    for name in (block.norm1, block.norm2):
        norm = host.get_submodule(name)
        if type(norm) is not nn.LayerNorm or len(norm.normalized_shape) != 1:
            return f"{name} is {type(norm).__name__}, not a LayerNorm over the channels"
    for name in (block.up, block.down):
        linear = host.get_submodule(name)
        if not isinstance(linear, Fp8Linear):
            return f"{name} is not in FP8"
        if not linear.takes_fp8:
            return f'{name}, run by "{linear.backend}", takes no input in FP8 or has hooks'
    return None


def _counter(attention: nn.Module) -> Tensor | None:
    return next((m.infinities for m in attention.children() if isinstance(m, Fp8Linear)), None)
