"""Whether the blocks of a model do what their sites say of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter.sites import AttentionSite, PreNormBlock
from ..errors import AdapterError
from ..fp8.block import block_forward
from ..wrapper import argument_names, by_name


def check_blocks(model: nn.Module, sites: Iterable[AttentionSite], run: Callable[[nn.Module], object], atol: float) -> None:
    """Run the dense `model` and compare its blocks with what the sites say of them; sites without a block pass.

    Args:
        model: The model, in eval mode.
        sites: Its sites.
        run: Runs the model that it is given, so that every block is called.
        atol: Largest difference of a block's output, absolute, or relative to its largest entry where that is above 1.

    Raises:
        AdapterError: a block gives something else.
    """
    wrong: list[str] = []

    def watch(site: AttentionSite, block: PreNormBlock) -> Callable[..., None]:
        def compare(host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            given = by_name(argument_names(host) or (), args) | kwargs
            x = given.pop(next(iter(given)))
            expected = block_forward(host, site, x, **{name: value for name, value in given.items() if value is not None})
            error = (output - expected).abs().max().item() if isinstance(output, Tensor) else torch.inf
            if not error <= atol * max(1.0, expected.abs().max().item()):
                wrong.append(f"site {site.fqn!r}: the block {block.fqn!r} gives something else than described, by {error:.2e}")

        return compare

    described = [(site, site.block) for site in sites if site.block is not None]
    hooks = [model.get_submodule(b.fqn).register_forward_hook(watch(site, b), with_kwargs=True) for site, b in described]
    try:
        run(model)
    finally:
        for hook in hooks:
            hook.remove()
    if wrong:
        raise AdapterError(f"{wrong[0]} (atol={atol:g}). Look at its activation, gains and order, or leave `block` out")
