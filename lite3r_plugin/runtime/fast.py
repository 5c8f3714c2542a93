"""The forward of a model as its preset has it: weights in BF16, compiled blocks, the fastest dense attention, a CUDA graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..attention.module import REPLACED, SparseLinearAttention
from ..attention.state import ModelState
from ..config import WholeModel
from ..errors import plural
from ..wrapper import Changes, RewrittenMethod, calls_are_seen
from .compile import NONE_THERE, CompiledBlocks, is_of_compiler, why_not_compiled
from .graphs import IN_TURN, Graphs
from .half import HALF, HalfWeights, weight_dtype, why_not_half
from .modes import functions_are_seen
from .sdpa import LargestDense, fastest_sdpa, sdpa_backend
from .values import exchanged, tensors_in

WATCHED = "a mode of torch sees all operators"


class FastForward(RewrittenMethod):
    """Lies over the forward of a model, and over whatever lay on it before.

    In training, and where gradients are wanted, weights in BF16 are all that is left of it. Outputs have the dtypes that they have
    without it, and images are given as without it.

    Args:
        module: The model.
        state: What the sites in it share.
        sites: They themselves.
        parts: What is wanted.
        half: Its weights in BF16; None where they stay as they are.

    Attributes:
        parts: The same.
        half: The same.
        blocks: Its compiled blocks; None where they are not to be compiled.
        graphs: Its recorded forwards; None where none is to be made.
        not_compiled: Why blocks are not compiled although they were to be.
        choice: The backend of dense attention that comes first, and in words what it was chosen by; None before the first forward.
    """

    def __init__(
        self, module: nn.Module, state: ModelState, sites: Iterable[SparseLinearAttention], parts: WholeModel, half: HalfWeights | None
    ) -> None:
        super().__init__(module, "forward")
        self.state, self.sites, self.parts, self.half = state, tuple(sites), parts, half
        self.blocks = CompiledBlocks(module) if parts.compile_blocks else None
        self.graphs = Graphs(state.config.graph_shapes) if parts.cuda_graphs else None
        self.not_compiled: str | None = None
        self.choice: tuple[str, str] | None = None if parts.dense_attention == "fastest" else ("default", "")
        self._below: Any = None
        self._host_dtype = weight_dtype(module)

    # In and out

    def put_in(self, changes: Changes) -> None:
        """Lie on the model, over what lies there."""
        self._below = vars(self.module).get(self.name)
        if self.half is not None:
            self.half.put_in(changes)
        super().put_in(changes)

    def take_out(self, changes: Changes) -> None:
        """Let what lay there be seen again, and weights be what they were."""
        self.forget()
        if self._below is not None and vars(self.module).get(self.name) is self:
            changes.put(vars(self.module), self.name, self._below)
        else:
            super().take_out(changes)
        if self.half is not None:
            self.half.put_back(changes)

    def forget(self) -> None:
        """Drop all recordings and their memory."""
        if self.graphs is not None:
            self.graphs.forget()

    def run_host(self, *args: Any, **kwargs: Any) -> Any:
        """What lay on the model before."""
        return super().run_host(*args, **kwargs) if self._below is None else self._below(*args, **kwargs)

    # A forward

    def rewritten(self, *args: Any, **kwargs: Any) -> Any:
        """As the host's forward."""
        if torch.compiler.is_compiling() or self._is_plain(args, kwargs):
            return self._run(*args, **kwargs)
        if self.graphs is None:
            return self._tuned(*args, **kwargs)
        if self._is_substituted:
            self.graphs.pass_by(REPLACED, warn=False)
            return self._tuned(*args, **kwargs)
        if self.state.phase == "fp8_qat":
            self.graphs.pass_by("Linears are rounded to FP8 anew when their weights change: call convert(model) when they have learned")
            return self._tuned(*args, **kwargs)
        hooks = [hook for tracker in self.state.trackers.values() for hook in tracker.hooks]
        return self.graphs.call(self.module, self._tuned, hooks, args, kwargs)

    def _is_plain(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether this forward runs as without a preset, but for the dtype of the weights; why is noted."""
        warn, reason = False, None
        if self.module.training:
            reason = "the model is in training mode"
        elif torch.is_grad_enabled() and _wants_gradients(self.module, args, kwargs):
            warn, reason = True, "gradients are wanted: call the model under torch.inference_mode() or torch.no_grad()"
        elif torch._C._len_torch_dispatch_stack() or functions_are_seen():
            reason = WATCHED
        elif calls_are_seen():
            reason = "a hook for all modules sees each call"
        elif any(site.is_watched for site in self.sites):
            reason = "attention is observed, as in calibration"
        elif torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            reason = "the caller captures a graph himself"
        if reason is not None and self.graphs is not None:
            self.graphs.pass_by(reason, warn=warn)
        return reason is not None

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        """The forward in the dtype of the weights."""
        if self.half is None:
            return self.run_host(*args, **kwargs)
        dtype, given = self.half.dtype, dict[int, Tensor]()
        args, kwargs = _with_images(args, kwargs, dtype, given)

        def finished(x: Tensor) -> Tensor:
            if id(x) in given:
                return given[id(x)]
            return x.to(self._host_dtype) if x.dtype == dtype else x

        device = next(self.module.parameters()).device.type
        with torch.autocast(device if device != "meta" else "cpu", enabled=False):
            return exchanged(self.run_host(*args, **kwargs), finished)

    def _tuned(self, *args: Any, **kwargs: Any) -> Any:
        """The forward with compiled blocks and the fastest dense attention."""
        with IN_TURN:
            capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
            if self.choice is None:
                self.choice, ran = self._choose(args, kwargs)
                if ran and self._is_substituted:
                    return ran[0]
            with sdpa_backend(self.choice[0]):
                if self.blocks is None or self.not_compiled is not None:
                    return self._run(*args, **kwargs)
                try:
                    with self.blocks.running():
                        return self._run(*args, **kwargs)
                except torch.cuda.OutOfMemoryError:
                    raise
                except Exception as error:  # whatever a compiler raises, or the model itself
                    if capturing:
                        raise
                    if self._is_substituted:  # by what may wait for other processes: they do not run twice
                        if is_of_compiler(error):
                            self.not_compiled = why_not_compiled(error)
                        raise
                    outputs = self._run(*args, **kwargs)
                    self.not_compiled = why_not_compiled(error)
                    return outputs

    @property
    def _is_substituted(self) -> bool:
        return any(site.is_substituted for site in self.sites)

    def _choose(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[str, str], tuple[Any, ...]]:
        """The fastest backend for the dense attention of a forward with these arguments, and what that returned, if it ran for this."""
        if not any(x.is_cuda for x in tensors_in((args, kwargs))):
            return ("default", ""), ()
        with LargestDense() as seen:
            outputs = self._run(*args, **kwargs)
        if seen.queries is None:
            return ("default", ""), (outputs,)
        shape, dtype, device = seen.queries
        backend, times = fastest_sdpa(torch.randn(shape, dtype=dtype, device=device))
        said = ", ".join(f"{name} {t:.3f} ms" if isinstance(t, float) else f"{name}: {t}" for name, t in times.items())
        return (backend, said), (outputs,)

    # What it says of itself

    @property
    def ran(self) -> str:
        """How forwards ran: ``"compiled graph"``, of which either may be missing, or ``"eager"``."""
        compiled = bool(self.blocks) and self.not_compiled is None
        return " ".join(["compiled"] * compiled + ["graph"] * bool(self.graphs)) or "eager"

    def report(self) -> list[str]:
        """What each part does, and why something is left out, in lines."""
        lines = []
        if self.half is not None:
            kept = f"{self.half.original_bytes / 2**20:.1f} MiB of originals in main memory, for remove_lite3r"
            gone = "no originals are kept: remove_lite3r is refused"
            changed = f"; {self.half.changed} were changed since, and stay so" if self.half.changed else ""
            wide = f", {self.half.narrow} of which are computed with in FP32" if self.half.narrow else ""
            dtype = str(self.half.dtype).removeprefix("torch.")
            half = "weights in BF16" if self.half.dtype == HALF else f"weights that became BF16, and are in {dtype} now"
            lines.append(f"{half}: {len(self.half)} of them{wide}; {kept if self.half.kept else gone}{changed}")
        if self.blocks is not None:
            count = plural(len(self.blocks), "block") if self.blocks else "transformer blocks"
            why = NONE_THERE if self.blocks.has_none else self.not_compiled
            lines.append(f"{count} compiled" if why is None else f"blocks not compiled: {why}")
        if self.parts.dense_attention == "fastest":
            chosen = "chosen in the first forward" if self.choice is None else " by ".join(filter(None, self.choice))
            lines.append(f"dense attention: {chosen}")
        if (graphs := self.graphs) is not None:
            forgotten = f"; dropped {graphs.forgotten} times, since the model had changed" if graphs.forgotten else ""
            lines.append(
                f"CUDA graphs: {len(graphs)} layouts of inputs, at most {graphs.most}; {graphs.replays} replays; "
                f"{graphs.held_bytes / 2**20:.1f} MiB{forgotten}"
            )
            lines += [f"no CUDA graph in {count} forwards: {reason}" for reason, count in list(graphs.passed.items())]
        return lines


@dataclass(frozen=True)
class FastPlan:
    """What a `FastForward` is going to be.

    Attributes:
        module: The model that it is to lie on.
        parts: What it does.
        left: Of what was wanted, what is left out, with the reason.
    """

    module: nn.Module
    parts: WholeModel
    left: Mapping[str, str]

    def without(self, what: str, reason: str, **fields: Any) -> FastPlan:
        """The same with other `fields` of its parts."""
        return FastPlan(self.module, dataclasses.replace(self.parts, **fields), {**self.left, what: reason})


def plan_fast(module: nn.Module, parts: WholeModel) -> FastPlan:
    """What of `parts` a `FastForward` on `module` can do, but for what the rewrites of the model say. Nothing changes."""
    plan = FastPlan(module, parts, {})
    if parts != WholeModel() and not isinstance(vars(module).get("forward"), (RewrittenMethod, type(None))):
        reason = "the forward of the model was exchanged by somebody else, such as for CPU offload: call apply_lite3r first"
        return FastPlan(module, WholeModel(), {"all of it": reason})
    if parts.weights != "host" and (reason := why_not_half(module)) is not None:
        return plan.without("weights in BF16", reason, weights="host")
    return plan


def _with_images(
    args: tuple[Any, ...], kwargs: dict[str, Any], dtype: torch.dtype, given: dict[int, Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with the images, the first tensor among them, in `dtype`. What they were is put into `given`, by what they become."""
    for key, value in (*enumerate(args), *kwargs.items()):
        if isinstance(value, Tensor) and value.dim() > 2 and value.is_floating_point():
            if value.dtype == dtype:
                return args, kwargs
            made = value.to(dtype)
            given[id(made)] = value
            if isinstance(key, int):
                return (*args[:key], made, *args[key + 1 :]), kwargs
            return args, {**kwargs, key: made}
    return args, kwargs


def _wants_gradients(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    return any(p.requires_grad for p in module.parameters()) or any(x.requires_grad for x in tensors_in((args, kwargs)))
