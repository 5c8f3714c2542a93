"""The grid of the running forward, read off the images that the model is given."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..adapter.sites import TokenLayout, TokenSource
from ..errors import LayoutError
from .cache import OrderCache
from .pending import NO_BACKWARD, PendingForwards, backward_pass


class GridTracker:
    """Remembers the patch grid of the running forward. One per image module of a model; its sites share it.

    `observe` is a forward pre-hook of the image module. It must stay a plain method of a plain object, so that models
    with Lite3R can be deep-copied and pickled.

    Args:
        source: How the images are found and read.

    Attributes:
        module: The image module, while it is watched.
        grid: Patch rows and columns of the last images, or None before any.
        orders: The token orders of the model's layouts.
    """

    def __init__(self, source: TokenSource) -> None:
        self.source = source
        self.grid: tuple[int, int] | None = None
        self.orders = OrderCache()
        self._pending = PendingForwards()
        self.module: nn.Module | None = None

    def attach(self, module: nn.Module) -> None:
        """Watch `module`, and no other."""
        self.detach()
        self.module = module
        module.register_forward_pre_hook(self.observe, with_kwargs=True)

    def detach(self) -> None:
        """Stop watching. The hook is looked for: where `attach` was interrupted, nobody was given a handle of it."""
        if self.module is None:
            return
        hooks = self.module._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if hook == self.observe]:
            self.module._forward_pre_hooks_with_kwargs.pop(key, None)
            del hooks[key]  # at last: what is interrupted is found again
        self.module = None

    def observe(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Read the grid off the first tensor argument, the images ``[..., H, W]``. Raises `LayoutError` when there is none."""
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor) and value.dim() >= 2:
                patch_h, patch_w = self.source.patch_size
                self.grid = (value.shape[-2] // patch_h, value.shape[-1] // patch_w)
                if not torch.compiler.is_compiling():
                    self._pending.saw_images(self.grid)
                return
        raise LayoutError(
            f"the module {self.source.image_module!r} was called without an image tensor, so the token layout is unknown; "
            "its adapter must name a module that is given the images"
        )

    def watch(self, out: Tensor) -> None:
        """Take note of `out`, the output of a site, whose gradient tells when the backward pass of this forward ends."""
        if not torch.compiler.is_compiling():
            self._pending.saw_output(out, self.grid)

    def layout(self, fqn: str, tokens: int) -> TokenLayout:
        """The layout of a sequence of `tokens` tokens at site `fqn`.

        Raises:
            LayoutError: the images do not fit, there were none, or it cannot be told which forward is recomputed.
        """
        grid, special = self.grid, self.source.special_tokens
        if not torch.compiler.is_compiling() and backward_pass() != NO_BACKWARD:
            grid = self._pending.recomputed_grid(grid, lambda grid: tokens % TokenLayout(1, special, grid).tokens_per_view == 0, fqn)
        if grid is None:
            raise LayoutError(
                f"site {fqn!r} ran before {self.source.image_module!r} saw any image; run the model on images, or "
                "apply_lite3r to the module that you call"
            )
        layout = TokenLayout(1, special, grid)
        views = tokens // layout.tokens_per_view  # not divmod, which torch.compile does not know for dynamic sizes
        if tokens % layout.tokens_per_view or not views:
            raise LayoutError(
                f"site {fqn!r} got {tokens} tokens, but a view has {layout.tokens_per_view} "
                f"({special} special + {grid[0]} x {grid[1]} patches); the adapter's "
                "patch_size or special_tokens is wrong for this model"
            )
        return TokenLayout(views, special, grid)
