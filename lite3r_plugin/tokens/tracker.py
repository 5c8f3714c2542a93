"""The layout of the running forward, from what one module of the model is given."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter.layouts import LayoutFunction, TokenLayout, TokenSource
from ..errors import LayoutError, Lite3RError, short
from .pending import NO_BACKWARD, PendingForwards, Seen, backward_pass

Source = TokenSource | LayoutFunction
MAX_SEEN = 64


class _Running:
    """The forward that runs in a thread.

    Attributes:
        seen: What was seen in it, the last one at the end; the same twice in a row once.
        inside: Whether it is a call of the module around everything.
        forward: Another object in each such call; None outside, and where a compiler runs.
        count: How many were seen outside of such calls.
        asked: Of these, how many when a site last ran.
    """

    def __init__(self) -> None:
        self.seen: tuple[Seen, ...] = ()
        self.inside = False
        self.forward: object | None = None
        self.count = 0
        self.asked: dict[str, int] = {}


class LayoutTracker:
    """Remembers what the watched module of a source was given in the running forward: the grid of images, or a layout.

    A forward is a call of the module around everything: of the watched module itself where it has the sites inside, else of the model.
    Outside of one, where a user calls methods of a model, a site has what was seen since it last ran. What differs within a forward
    raises, unless the source says that it may.

    One per source of a model; its sites share it, and threads may, each in a forward of its own. Its hooks must stay plain methods of a
    plain object, so that models with Lite3R can be deep-copied and pickled.

    Args:
        source: What is read, and how.
        around: Whether the watched module has sites of this source inside.

    Attributes:
        last: What was seen last, in whatever forward and thread; None where nothing was.
        module: The watched module, while it is.
        model: The whole model, while it is watched.
    """

    reads_arguments_only = True
    """What its hooks look at: whoever asks for hooks that may read results can pass over them (`wrapper.has_forward_hooks`)."""

    def __init__(self, source: Source, around: bool = False) -> None:
        self.source = source
        self.around = around
        self.last: Seen = None
        self.module: nn.Module | None = None
        self.model: nn.Module | None = None
        self._threads = threading.local()  # itself, for what compilers trace: Dynamo loses what is written to a class made from it
        self._latest: tuple[Seen, ...] = ()  # of all threads, the last one: backward passes on a GPU run in threads of their own
        self._pending = PendingForwards()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_threads"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._threads = threading.local()  # nothing runs in a copy

    @property
    def _running(self) -> _Running:
        if not hasattr(self._threads, "running"):
            self._threads.running = _Running()
        return self._threads.running

    @property
    def forward(self) -> object | None:
        """What tells the running forward of this thread from all others; None where none runs, or it is compiled."""
        return self._running.forward

    @property
    def hooks(self) -> tuple[Any, ...]:
        """All that `attach` registers."""
        return self.begin, self.observe, self.end

    def attach(self, module: nn.Module, model: nn.Module) -> None:
        """Watch `module`, and no other, a part of `model` or that itself."""
        self.detach()
        self.module, self.model = module, model
        scope = module if self.around else model
        scope.register_forward_pre_hook(self.begin, with_kwargs=True)
        scope.register_forward_hook(self.end, always_call=True)  # after an error, too
        module.register_forward_pre_hook(self.observe, with_kwargs=True)

    def detach(self) -> None:
        """Stop watching. The hooks are looked for: where `attach` was interrupted, nobody was given handles of them."""
        for module in (self.module, self.model):
            if module is None:
                continue
            for hooks, flags, ours in (
                (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs, (self.begin, self.observe)),
                (module._forward_hooks, module._forward_hooks_always_called, (self.end,)),
            ):
                for key in [key for key, hook in hooks.items() if hook in ours]:
                    flags.pop(key, None)
                    del hooks[key]  # at last: what is interrupted is found again
        self.module = self.model = None

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward begins."""
        self._running.seen, self._running.inside = (), True
        self._running.forward = None if torch.compiler.is_compiling() else object()

    def end(self, module: nn.Module, *_: Any) -> None:
        """A forward is over. Torch before 2.14 compiles hooks one by one, again for each size of a tensor that is a parameter by itself."""
        self._running.inside, self._running.forward = False, None
        if self.around:
            self._running.seen = self._latest = ()

    def observe(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Read the arguments of the watched module. Raises `LayoutError` when they tell nothing."""
        seen = _grid(self.source, args, kwargs) if isinstance(self.source, TokenSource) else call(self.source, args, kwargs)
        compiling = torch.compiler.is_compiling()
        running = self._running
        self.last, self._latest = seen, (seen,)
        if running.inside or not compiling:
            if not running.seen or running.seen[-1] != seen:
                running.seen = (*running.seen[1 - MAX_SEEN :], seen)
                if not running.inside:
                    running.count += 1
        else:  # what was seen before is of another graph
            running.seen = (seen,)
        if not compiling:
            self._pending.saw_images(seen)

    def watch(self, out: Tensor) -> None:
        """Take note of `out`, the output of a site, whose gradient tells when the backward pass of this forward ends."""
        if not torch.compiler.is_compiling() and self._running.seen:
            self._pending.saw_output(out, self._running.seen[-1])

    def ran(self, fqn: str) -> None:
        """Take note that site `fqn` runs, which it may without a layout, as the dense model does."""
        if not torch.compiler.is_compiling():
            self._running.asked[fqn] = self._running.count

    def layout(self, fqn: str, tokens: int) -> TokenLayout | None:
        """The layout of a sequence of `tokens` tokens at site `fqn`; None where its tokens have none.

        Raises:
            LayoutError: the sequence is another one than what was seen says, nothing was seen, what was seen differs, or it cannot be
                told which forward is recomputed.
        """
        if not torch.compiler.is_compiling() and backward_pass() != NO_BACKWARD:
            recent = self._pending.recomputed(self._running.seen[-1:] or self._latest, lambda seen: self._fits(seen, tokens), fqn)
        else:
            recent = self._recent(fqn)
        if not recent:
            raise LayoutError(self._unseen(fqn))
        *others, seen = recent
        if any(other != seen for other in others):
            self._running.seen, self._running.asked = (), {}
            raise LayoutError(_differs(fqn, self.source.module or "the model", recent))
        if isinstance(self.source, TokenSource):
            if (layout := self.source.layout(seen, tokens)) is None:
                raise LayoutError(_misfit(self.source, fqn, tokens, seen))
            return layout
        return checked(seen, fqn, tokens)

    def _recent(self, fqn: str) -> tuple[Seen, ...]:
        """What this site may be about."""
        running = self._running
        if self.around or self.source.changes or (torch.compiler.is_compiling() and not running.inside):
            return running.seen[-1:]
        if running.inside:
            return running.seen
        since = running.count - running.asked.get(fqn, 0)
        self.ran(fqn)
        return running.seen[-max(since, 1) :]

    def _fits(self, seen: Seen, tokens: int) -> bool:
        if isinstance(self.source, TokenSource):
            return self.source.layout(seen, tokens) is not None
        return seen is None or seen.num_tokens == tokens

    def _unseen(self, fqn: str) -> str:
        name = self.source.module
        if isinstance(self.source, LayoutFunction):
            where = f"outside of a call of {name or 'the model'!r}" if self.around else f"before {name!r} was called"
            return (
                f"site {fqn!r} ran {where}, from whose arguments its adapter's LayoutFunction reads the token layout: call that module "
                "and not methods of it, or let the function read the arguments of the site itself (module=None)"
            )
        return (
            f"site {fqn!r} ran before {name!r} saw any image; run the model on images, or apply_lite3r to the module that you call. If "
            "images go past that module (methods called on it, a convolution inside of it), the adapter must name one that is called "
            "with them, or use a LayoutFunction"
        )


def call(source: LayoutFunction, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> TokenLayout | None:
    """What the function of an adapter gives for the arguments of a forward.

    Raises:
        LayoutError: it raised, or gave something else than a layout.
    """
    name = getattr(source.function, "__qualname__", repr(source.function))
    try:
        layout = source.function(*args, **kwargs)
    except Lite3RError:
        raise
    except Exception as error:
        raise LayoutError(
            f"the adapter's LayoutFunction {name} failed on the arguments of "
            f"{'a site' if source.module is None else repr(source.module or 'the model')}: {short(error)}"
        ) from error
    if layout is not None and not isinstance(layout, TokenLayout):
        raise LayoutError(f"the adapter's LayoutFunction {name} gave {type(layout).__name__}, not a TokenLayout or None")
    return layout


def checked(layout: TokenLayout | None, fqn: str, tokens: int) -> TokenLayout | None:
    """`layout`; raises `LayoutError` unless it is that of a sequence of `tokens` tokens."""
    if layout is not None and layout.num_tokens != tokens:
        raise LayoutError(
            f"site {fqn!r} got {tokens} tokens, but the adapter's LayoutFunction says {layout}, which are {layout.num_tokens}: let it give "
            "what this site attends over, or None where the tokens have no layout (merged, dropped or packed ones)"
        )
    return layout


def _grid(source: TokenSource, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, int]:
    """Patch rows and columns of the first tensor argument, the images ``[..., H, W]``."""
    if torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]  # sizes are tensors then
        raise LayoutError(
            "torch.jit.trace would write down the token layout of this input for all others: use torch.compile or torch.export, or trace "
            "the model after remove_lite3r"
        )
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.dim() >= 2:
            patch_h, patch_w = source.patch_size
            return value.shape[-2] // patch_h, value.shape[-1] // patch_w
    raise LayoutError(
        f"the module {source.image_module!r} was called without an image tensor, so the token layout is unknown; "
        "its adapter must name a module that is given the images, or use a LayoutFunction"
    )


def _misfit(source: TokenSource, fqn: str, tokens: int, grid: tuple[int, int]) -> str:
    rows, columns = grid
    view = source.special_tokens + rows * columns + source.trailing_tokens
    parts = [f"{source.special_tokens} special", f"{rows} x {columns} patches"]
    parts += [f"{source.trailing_tokens} trailing"] if source.trailing_tokens else []
    ends = f", and the sequence ends in {source.sequence_tokens}" if source.sequence_tokens else ""
    return (
        f"site {fqn!r} got {tokens} tokens, but a view has {view} ({' + '.join(parts)}){ends}; the adapter's "
        "patch_size, special_tokens, trailing_tokens or sequence_tokens is wrong for this model, or its views are not alike, its tokens "
        "windows, packed or merged, which a LayoutFunction can say"
    )


def _differs(fqn: str, module: str, recent: tuple[Seen, ...]) -> str:
    seen = dict.fromkeys(recent)
    if all(isinstance(x, tuple) for x in seen):
        grids = ", ".join("{} x {}".format(*grid) for grid in seen)
        return (
            f"{module!r} was given images of {grids} patches in one forward, so that site {fqn!r} cannot tell which are its own: run views "
            "of one size, or let the adapter say which view has which grid: LayoutFunction, or changes=True of TokenSource where "
            "a site always has the tokens of the last images"
        )
    return (
        f"{module!r} was called with {len(seen)} layouts in one forward, so that site {fqn!r} cannot tell which is its own: let the "
        "LayoutFunction read the arguments of a module around the sites, or of the sites themselves (module=None), or say changes=True "
        "where a site always has the tokens of the last call"
    )
