"""`torch.compile` of the repeated blocks of a transformer, one compiled graph for all blocks of a class."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ..attention.module import SparseLinearAttention
from ..errors import short
from ..fp8.block import Fp8Block
from ..wrapper import Changes, host_of

RECOMPILE_LIMIT = 32  # for a class, over all models of the process: a teacher beside its student needed more than 16
NONE_THERE = "the model has no list of blocks that are all of one class"


def repeated_blocks(module: nn.Module) -> list[nn.Module]:
    """The transformer blocks: items of a `ModuleList` or `Sequential` that are all of one class and have parts of their own.

    What takes the place of an item counts as that: FP8 is in some blocks of a list only.
    """
    blocks: dict[int, nn.Module] = {}
    for found in module.modules():
        if isinstance(found, (nn.ModuleList, nn.Sequential)) and len(found) > 1 and len({type(host_of(x)) for x in found}) == 1:
            blocks |= {id(item): item for item in found if sum(1 for _ in item.modules()) > 4 and not isinstance(item, nn.Sequential)}
    return list(blocks.values())


class CompiledBlocks:
    """The repeated blocks of a model, compiled when they first run inside of `running`; outside they run eagerly.

    Attention that may be sparse stays eager: it is Triton already. So does a forward that is rewritten to stay so, and a fused FP8
    block around either, all of whose passes are Triton: rows in FP8 cannot cross a break of the graph. A block that somebody has
    compiled already stays as it is. Hooks of a block itself run outside of what is compiled.

    Copies, also pickled ones, start anew.

    Args:
        module: The model. Only its `repeated_blocks` change, and only inside of `running`.
        backend: As in `torch.compile`.

    Attributes:
        has_none: Whether it was looked for blocks, and there are none.
    """

    def __init__(self, module: nn.Module, backend: str | Callable[..., Any] = "inductor") -> None:
        self.module, self.backend = module, backend
        self._calls: dict[nn.Module, tuple[Any, Any]] = {}  # blocks with the forward of their own that they had, and it compiled
        self.has_none = False

    def __reduce__(self) -> tuple[Any, ...]:
        return CompiledBlocks, (self.module, self.backend)

    def anew(self) -> CompiledBlocks:
        """The same with nothing compiled yet."""
        return CompiledBlocks(self.module, self.backend)

    def __len__(self) -> int:
        """How many blocks were compiled, or would be when they run."""
        return len(self._calls)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Blocks run compiled inside the context, and in its thread. It is for one thread at a time: it changes limits of the compiler.

        Raises (inside):
            torch._dynamo.exc.FailOnRecompileLimitHit: a block is compiled for more than `RECOMPILE_LIMIT` cases.
        """
        repeated = repeated_blocks(self.module)
        wanted = [block for block in repeated if not (isinstance(block, Fp8Block) and _eager_inside(block))]
        self._calls = {block: self._compiled(block) for block in wanted}
        self.has_none = not repeated
        changes, limits = Changes(), torch._dynamo.config
        try:
            try:
                for one in _eager_inside(self.module):
                    changes.put(vars(one), "forward", torch.compiler.disable(one.forward))
                for block, (_, call) in self._calls.items():
                    if block._compiled_call_impl is None:
                        changes.put(vars(block), "forward", _in_this_thread(call, block.forward))
                for name, value in (("recompile_limit", RECOMPILE_LIMIT), ("fail_on_recompile_limit_hit", True)):
                    put = functools.partial(setattr, limits, name)
                    changes.make(functools.partial(put, value), functools.partial(put, getattr(limits, name)))
                yield
            finally:
                changes.undo()
        finally:
            changes.undo()  # an interruption may come into the first

    def _compiled(self, block: nn.Module) -> tuple[Any, Any]:
        """What was compiled before, unless the block was given another forward since."""
        own = block.__dict__.get("forward")
        known = self._calls.get(block)
        if known is not None and known[0] is own:
            return known
        return own, torch.compile(block.forward, dynamic=True, backend=self.backend)


def is_of_compiler(error: BaseException) -> bool:
    """Whether an `error` that came from inside of `CompiledBlocks.running` is one of the compiler, and none of the model."""
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    return isinstance(error, (FailOnRecompileLimitHit, TorchDynamoException))


def why_not_compiled(error: Exception) -> str:
    """What is said of an `error` that came from inside of `CompiledBlocks.running`."""
    from torch._dynamo.exc import FailOnRecompileLimitHit  # of a compiler that has run by then

    if isinstance(error, FailOnRecompileLimitHit):
        return (
            f"blocks of one class are more than {RECOMPILE_LIMIT} cases to the compiler: by shapes, hooks, or attributes that differ, "
            "those of earlier runs in this process included, which torch.compiler.reset() forgets"
        )
    return short(error)


def _in_this_thread(call: Callable[..., Any], otherwise: Callable[..., Any]) -> Callable[..., Any]:
    """`call` in this thread; in others, which may run the block meanwhile, what the block does without it."""
    own = threading.get_ident()

    def run(*args: Any, **kwargs: Any) -> Any:
        return (call if threading.get_ident() == own else otherwise)(*args, **kwargs)

    return run


def _eager_inside(module: nn.Module) -> list[nn.Module]:
    """What is inside `module` that stays eager: attention that may run sparse, and forwards that are rewritten to stay so."""
    # Under another name a module would be given twice, and its forward taken away once.
    return [one for one in module.modules() if _may_be_sparse(one) or getattr(one.__dict__.get("forward"), "stays_eager", False)]


def _may_be_sparse(module: nn.Module) -> bool:
    return isinstance(module, SparseLinearAttention) and module.sparse and module.keep_ratio < 1
