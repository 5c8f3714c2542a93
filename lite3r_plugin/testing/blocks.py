"""What an adapter says about a transformer block, in plain torch, and whether the block does just that."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapter.sites import AttentionSite
from ..errors import AdapterError


def forward(host: nn.Module, site: AttentionSite, x: Tensor, **given: Any) -> Tensor:
    """The definition of `PreNormBlock`: the parts of `host` put together as `site.block` says.

    Args:
        host: The block.
        site: The site inside it.
        x: ``[B, N, C]``.
        **given: Further arguments of the block, which go to the attention.
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


def check(model: nn.Module, sites: Iterable[AttentionSite], run: Callable[[nn.Module], object], atol: float) -> None:
    """Run the dense `model` and raise `AdapterError` unless its blocks are as the sites describe them."""
    wrong: list[str] = []

    def watch(site: AttentionSite) -> Callable[..., None]:
        def compare(host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            given = dict(zip(inspect.signature(host.forward).parameters, args, strict=False)) | kwargs
            x = given.pop(next(iter(given)))
            expected = forward(host, site, x, **{name: value for name, value in given.items() if value is not None})
            error = (output - expected).abs().max().item() if isinstance(output, Tensor) else torch.inf
            if not error <= atol * max(1.0, expected.abs().max().item()):
                wrong.append(f"site {site.fqn!r}: the block {site.block.fqn!r} gives something else than described, by {error:.2e}")  # pyright: ignore[reportOptionalMemberAccess]

        return compare

    described = [site for site in sites if site.block is not None]
    hooks = [model.get_submodule(s.block.fqn).register_forward_hook(watch(s), with_kwargs=True) for s in described if s.block is not None]
    try:
        run(model)
    finally:
        for hook in hooks:
            hook.remove()
    if wrong:
        raise AdapterError(f"{wrong[0]} (atol={atol:g}). Look at its activation, gains and order, or leave `block` out")
