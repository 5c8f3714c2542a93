"""`parallelize_views`: one model, one scene, several processes."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.overrides import TorchFunctionMode

from ..adapter.layouts import TokenSource
from ..adapter.plugins import find_gathered, find_sites
from ..adapter.sites import AttentionSite
from ..apply.lookup import look_up
from ..attention.inputs import AttentionInputs
from ..attention.module import SparseLinearAttention
from ..errors import ParallelError, shown
from ..runtime.values import exchanged
from ..tokens.pending import NO_BACKWARD, backward_pass
from ..wrapper import Changes, RewrittenMethod, is_plain_tensor
from .attention import SpreadAttention
from .group import Group
from .spread import Spread, along_views, images_in, view_counts
from .trial import Verdict, one_by_one, try_views

Inputs = Literal["full", "sharded"]
Outputs = Literal["gathered", "sharded"]


def parallelize_views(
    model: nn.Module,
    mesh: DeviceMesh | dist.ProcessGroup | None = None,
    *,
    inputs: Inputs = "full",
    outputs: Outputs = "gathered",
    sites: Sequence[AttentionSite] | None = None,
    gather: Sequence[str] = (),
    timeout: float = 600.0,
) -> ViewParallel:
    """Let the processes of `mesh` run `model` on one scene, each on some of the views, in place.

    Every process calls this with the same weights, in the same state, on the device of its own, and then the model, in the same order.
    The encoder, frame attention, MLPs and heads of a view run where the view is; global attention, sparse or dense, sees the views of
    all. Outputs equal those of one process up to rounding. Put Lite3R in before (`apply_lite3r`, `load_lite3r`, `convert`); without,
    the dense model runs. On its first call, a model is run on a few small images, to see that views meet nowhere else (`trial`).

    Gradients: internally all is differentiable. With ``outputs="gathered"`` let every process compute the same loss, as one process
    would; with ``"sharded"`` each that of its own views, which add up. Either way the gradients of parameters are parts of a sum then:
    `ViewParallel.add_gradients`.

    Args:
        model: A model that an adapter knows, or whose `sites` are given, with one sequence over all views somewhere.
        mesh: A `DeviceMesh` of one dimension (``mesh["cp"]`` of several), or a process group: NCCL for GPUs, gloo for CPUs. None: all
            processes. As everywhere in `torch.distributed`, `init_process_group` comes first.
        inputs: ``"full"``: every process calls the model with the whole scene, images ``[B, S, 3, H, W]`` or ``[S, 3, H, W]``, and keeps
            its views, as `distribute_tensor` shards what is whole everywhere. ``"sharded"``: each calls it with its own, which stand one
            after the other by rank, in any numbers from 1 on; the reference view is the first one of rank 0. Whatever else
            is along views (``[B, S, ...]``) is treated alike.
        outputs: ``"gathered"``: every process gets the results of all views; ``"sharded"``: of its own.
        sites: As of `apply_lite3r`.
        gather: Names of modules that run on all views in every process, besides those that the adapter names: small ones, such as heads
            over one token a view, whose tensors are ``[B, S, ...]``.
        timeout: Seconds after which a process that waits for another gives up.

    Returns:
        What takes it back: `ViewParallel.remove`, or the end of a ``with`` over it.

    Raises:
        ParallelError: there is no process group, or no attention over views, or the model is spread already, weights differ between
            processes, or an option is wrong, or another process does not call it in time.
        ModelTypeError, UnknownModelError, AdapterError: as of `apply_lite3r`.
    """
    return ViewParallel(model, mesh, inputs, outputs, sites, gather, timeout)


class ViewParallel:
    """A model on several processes: see `parallelize_views`, which makes it.

    Attributes:
        model: The model.
        rank: The place of this process.
        size: How many processes there are.
        spread: The views of the last forward, None before the first.
    """

    def __init__(
        self, model: nn.Module, mesh: Any, inputs: Inputs, outputs: Outputs, sites: Sequence[AttentionSite] | None, gather: Sequence[str],
        timeout: float,
    ) -> None:  # fmt: skip
        for name, value, choices in (("inputs", inputs, get_args(Inputs)), ("outputs", outputs, get_args(Outputs))):
            if value not in choices:
                raise ParallelError(f"{name} is one of {choices}, got {shown(value)}")
        if not isinstance(timeout, (int, float)) or isinstance(timeout, bool) or not 0 < timeout < 1e7:
            raise ParallelError(f"timeout is a positive number of seconds, got {shown(timeout)}")
        found = look_up(model)
        if any(isinstance(vars(module).get("forward"), _Overlay) for module in found.modules.values()):
            raise ParallelError("this model is spread over processes already: take that back first (remove() of what it returned)")
        among = _group_of(mesh)
        described = [site for state in found.states for site in state.sites] or (find_sites(model)[1] if sites is None else sites)
        if missing := [site.fqn for site in described if site.fqn not in found.modules]:
            raise ParallelError(
                f"this {found.name} has no module {missing[0]!r}, where attention is to be: if Lite3R was applied to a part of it, take "
                "that out and apply it to the whole"
            )
        self._gathered = {name: _module(found.modules, name) for name in (*(find_gathered(model) or ()), *gather)}
        met = [site for site in described if site.scope in ("global", "camera") and not _inside(site.fqn, self._gathered)]
        if not any(site.scope == "global" for site in met):
            raise ParallelError(
                f"nothing in this {found.name} attends over views (no site of the scope 'global'), so its images may just be divided"
            )
        self.model, self.inputs, self.outputs = model, inputs, outputs
        self.spread: Spread | None = None
        self.inside = False
        self.trying = False
        self.given: list[tuple[Tensor, Tensor]] = []  # of the running forward: what the model is given, and what that is a part of
        self._verdicts: dict[Any, Verdict] = {}
        self._patches = tuple({site.tokens.patch_size for site in described if isinstance(site.tokens, TokenSource)})
        self._sites = {site.fqn: _module(found.modules, site.fqn) for site in met}
        self.group = Group(among, timeout)
        self.rank, self.size = self.group.rank, self.group.size
        self.attention = SpreadAttention(self.group)
        self._require_same_weights()
        self._changes = Changes()
        with self._changes:
            for site in met:
                _Site(self._sites[site.fqn], self, site).put_in(self._changes)
            for module in self._gathered.values():
                _Gathered(module, self).put_in(self._changes)
            _Forward(model, self).put_in(self._changes)
            register = functools.partial(model.register_forward_pre_hook, self._begin, with_kwargs=True, prepend=True)
            self._changes.make(register, self._unhook)

    def __enter__(self) -> ViewParallel:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, Exception) and not isinstance(error, ParallelError):
            self.group.give_up(error)
        self.remove()

    def remove(self) -> None:
        """Let the model be as it was, in this process. Twice does no harm."""
        self._changes.undo()
        self.group.close()

    def _require_same_weights(self) -> None:
        """Raise `ParallelError` in all processes where their weights differ."""
        read = [p.detach() for p in self.model.parameters() if p.is_floating_point() and not p.is_meta and is_plain_tensor(p)]
        device = read[0].device if read else torch.device("cpu")
        total = (
            torch.stack([p.double().sum().to(device) for p in read]).sum() if read else torch.zeros((), dtype=torch.float64, device=device)
        )
        told = self.group.numbers([int(total.view(torch.int64))], device)
        if odd := [rank for rank, one in enumerate(told) if one != told[0]]:
            self.group.close()
            raise ParallelError(
                f"the weights of rank {odd[0]} are others than those of rank 0: load the same ones in all processes, or make them random "
                "after the same torch.manual_seed"
            )

    def _unhook(self) -> None:
        hooks, flags = self.model._forward_pre_hooks, self.model._forward_pre_hooks_with_kwargs
        for key in [key for key, hook in hooks.items() if hook == self._begin]:
            flags.pop(key, None)
            del hooks[key]

    def add_gradients(self) -> None:
        """Let the gradients of all parameters be the sums over processes. All of them call it, after each backward pass."""
        self.group.add_gradients(list(self.model.parameters()))

    def own(self, x: Tensor, dim: int = 1) -> Tensor:
        """The views of this process in the last forward, of a tensor of the views of the scene along `dim`."""
        spread = self._spread()
        return x.narrow(dim, spread.first, spread.counts[spread.rank])

    # A forward

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        """Keep the views of this process."""
        if self.trying:
            return None
        if torch.compiler.is_compiling():
            raise ParallelError("a model that is spread over processes cannot be compiled as a whole")
        images, spread = self._agreed(args, kwargs)
        views = images.shape[-4]

        self.given = []

        def keep(x: Tensor, dim: int) -> Tensor:
            if self.inputs == "sharded":
                return spread.with_stand_in(x, dim)
            self.given.append((spread.own(x, dim), x))
            return self.given[-1][0]

        given = along_views((args, kwargs), spread.batch, views, spread.bare, keep)
        self.spread, self.inside = spread, True
        return given

    def _agreed(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Spread]:
        """The images and the views of all processes; all raise where one has no images, or others than these."""
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        try:
            for fqn, module in {**self._sites, **self._gathered}.items():
                if self.model.get_submodule(fqn) is not module:
                    raise ParallelError(f"{fqn} was exchanged since parallelize_views: remove() it and call it again")
            images = images_in(args, kwargs)
            if images.shape[-4] == 0 or images.numel() == 0:
                raise ParallelError(f"there is nothing in images {list(images.shape)}")
            if self.inputs == "full":
                view_counts(images.shape[-4], self.size, False)
        except Exception:
            self.group.numbers([0] * 9, device)
            raise
        bare = images.dim() == 4
        shape = (1, *images.shape) if bare else tuple(images.shape)
        content = 0
        if self.inputs == "full":
            content = int(images.detach().sum(dtype=torch.float64).view(torch.int64))
        learns = torch.is_grad_enabled()
        told = self.group.numbers([1, bare, *shape, content, learns], device)
        if refused := [rank for rank, (well, *_) in enumerate(told) if not well]:
            raise ParallelError(f"rank {refused[0]} refused what it was given, and said there why")
        counts = tuple(one[3] for one in told)
        same = [[*one[1:3], *(one[3:4] if self.inputs == "full" else ()), *one[4:]] for one in told]
        if odd := [rank for rank, one in enumerate(same) if one != same[0]]:
            what = "the same images" if self.inputs == "full" else "images of one size, in batches of one size"
            shapes = [one[2:7] for one in (told[0], told[odd[0]])]
            raise ParallelError(
                f"inputs={self.inputs!r} means that all processes give {what}, and all or none want gradients, but rank {odd[0]} gives "
                f"[B, S, C, H, W] = {shapes[1]}, rank 0 {shapes[0]}{' with other values' if shapes[0] == shapes[1] else ''}"
            )
        stand_in = self._verdict(args, kwargs, images, device).reference or learns
        if self.inputs == "full":
            counts = view_counts(images.shape[-4], self.size, stand_in)
        return images, Spread(counts, self.rank, stand_in, shape[0], bare)

    def _verdict(self, args: tuple[Any, ...], kwargs: dict[str, Any], images: Tensor, device: torch.device) -> Verdict:
        """What a trial says of such calls."""
        key = (images.dim(), shown(exchanged((args, kwargs), lambda x: x.dim()), 10_000))
        if key in self._verdicts:
            return self._verdicts[key]
        wrong: Exception | None = None
        verdict = Verdict(False, frozenset())
        half = any(p.dtype in (torch.float16, torch.bfloat16) for p in self.model.parameters())
        rough = half or torch.is_autocast_enabled(device.type)
        try:
            with self._on_trial():
                verdict = try_views(lambda args, kwargs: self.model(*args, **kwargs), args, kwargs, images, self._patches, rough)
        except Exception as error:
            wrong = error
        told = [one for (one,) in self.group.numbers([-1 if wrong is not None else int(verdict.reference)], device)]
        if wrong is not None:
            raise wrong
        if -1 in told:
            raise ParallelError(f"rank {told.index(-1)} found that its model cannot be spread, and said there why")
        self._verdicts[key] = verdict = Verdict(bool(max(told)), verdict.common)
        return verdict

    @contextlib.contextmanager
    def _on_trial(self) -> Iterator[None]:
        training = [(module, module.training) for module in self.model.modules()]
        self.trying = True
        try:
            self.model.eval()
            with torch.no_grad(), contextlib.ExitStack() as stack:
                for site in self._sites.values():
                    if isinstance(site, SparseLinearAttention):  # nothing is compiled, and no kernel chosen, for such small images
                        stack.enter_context(site.observe(lambda *_: None))
                yield
        finally:
            self.trying = False
            for module, was in training:
                module.training = was

    def _finish(self, out: Any) -> Any:
        """What the model returns, of all views or of those of this process."""
        spread = self._spread()
        common = {place for verdict in self._verdicts.values() for place in verdict.common}
        place = -1

        def finished(x: Tensor) -> Tensor:
            nonlocal place
            place += 1
            dim = spread.dim(x, spread.held)
            if dim is None or place in common:
                return x
            whole = [full for own, full in self.given if own is x and not x.requires_grad]
            if whole and self.outputs == "gathered":
                return whole[0]  # a model that returns its images
            own = spread.without_stand_in(x, dim)
            return own if self.outputs == "sharded" else _gathered(self.group, own, dim, spread.counts, summed=False)

        def opaque(value: Any) -> Any:
            raise ParallelError(f"it returns a {type(value).__name__}, in which results of views cannot be found")

        return exchanged(out, finished, opaque)

    def _spread(self) -> Spread:
        if self.spread is None:
            raise ParallelError("no forward has run yet")
        return self.spread


class _Overlay(RewrittenMethod):
    """Lies on the forward of a module, over what lay there."""

    def __init__(self, module: nn.Module, parallel: ViewParallel) -> None:
        super().__init__(module, "forward")
        self.parallel = parallel
        self._below = vars(module).get("forward")

    def put_in(self, changes: Changes) -> None:
        """Lie on the module."""
        changes.make(lambda: vars(self.module).__setitem__(self.name, self), self._off)

    def run_host(self, *args: Any, **kwargs: Any) -> Any:
        """What lay there."""
        return super().run_host(*args, **kwargs) if self._below is None else self._below(*args, **kwargs)

    def _off(self) -> None:
        if vars(self.module).get(self.name) is not self:
            self.enabled = False  # somebody has wrapped it since
        elif self._below is None:
            vars(self.module).pop(self.name, None)
        else:
            vars(self.module)[self.name] = self._below

    def _running(self) -> Spread:
        """The views of the forward that runs, or is recomputed in a backward pass."""
        if not self.parallel.inside and backward_pass() == NO_BACKWARD:
            raise ParallelError(
                "a part of a model that is spread over processes was called by itself: call the model, model(images), or take "
                "parallelize_views back by remove()"
            )
        return self.parallel._spread()


class _Forward(_Overlay):
    """On the model: ends the run of all processes where this one's fails."""

    def rewritten(self, *args: Any, **kwargs: Any) -> Any:
        parallel = self.parallel
        if parallel.trying:
            return self.run_host(*args, **kwargs)
        if not parallel.inside:
            raise ParallelError("call the model, model(images), and not its forward: views are kept where a call begins")
        try:
            return parallel._finish(self.run_host(*args, **kwargs))
        except BaseException as error:
            parallel.group.give_up(error)
            raise
        finally:
            parallel.inside, parallel.given = False, []


class _Gathered(_Overlay):
    """On a module that runs on all views in every process."""

    stays_eager = True

    def rewritten(self, *args: Any, **kwargs: Any) -> Any:
        parallel = self.parallel
        if parallel.trying:
            views = _views_in(args, kwargs)
            return self.run_host(*args, **kwargs) if views is None else one_by_one(self.run_host, args, kwargs, views, False)
        spread = self._running()
        found = False

        def whole(x: Tensor) -> Tensor:
            nonlocal found
            dim = spread.dim(x, spread.held)
            if dim is None:
                return x
            found = True
            return _gathered(parallel.group, spread.without_stand_in(x, dim), dim, spread.counts)

        given, named = exchanged((args, kwargs), whole)
        if not found:
            raise ParallelError(
                f"a module that is to run on all views got no tensor [B, S, ...] with the {spread.held} views of this process: take it out "
                "of gather"
            )
        return along_views(self.run_host(*given, **named), spread.batch, spread.views, spread.bare, spread.own)


class _Site(_Overlay):
    """On an attention module that sees all views."""

    stays_eager = True

    def __init__(self, module: nn.Module, parallel: ViewParallel, site: AttentionSite) -> None:
        super().__init__(module, parallel)
        self.site = site
        self._ours = False
        self._substitute = contextlib.ExitStack()

    def put_in(self, changes: Changes) -> None:
        """Lie on the module, and take the place of the attention of what Lite3R has put there."""
        super().put_in(changes)
        if isinstance(self.module, SparseLinearAttention):
            substituted = self.module.substitute(self.attend, watches=False)
            changes.make(functools.partial(self._substitute.enter_context, substituted), self._substitute.close)

    def rewritten(self, *args: Any, **kwargs: Any) -> Any:
        with _Redirect(self):
            return self.run_host(*args, **kwargs)

    def attend(self, module: SparseLinearAttention, inputs: AttentionInputs) -> Tensor:
        """In the place of the attention of Lite3R."""
        if self.parallel.trying:
            return inputs.v
        with self._computing():
            return self.parallel.attention.at_site(module, inputs, self._running())

    def attend_as_host(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False,
        scale: float | None = None, enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        """In the place of a call of `scaled_dot_product_attention`."""
        refused = None
        if attn_mask is not None or is_causal:
            refused = "with a mask"
        elif dropout_p:
            refused = "with dropout"
        elif query.dim() != 4 or not query.shape == key.shape == value.shape:
            refused = f"of queries {list(query.shape)} to keys {list(key.shape)} and values {list(value.shape)}"
        if refused is not None:
            raise ParallelError(f"site {self.site.fqn!r} asks for attention {refused}, which cannot be spread over processes")
        if self.parallel.trying:
            return value
        device = value.device.type
        if torch.is_autocast_enabled(device):
            query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
        with self._computing():
            return self.parallel.attention.of_host(query, key, value, scale, self._running(), self.site.scope == "camera")

    @property
    def redirects(self) -> bool:
        """Whether calls of the host are to be sent here, and not those of our own operators."""
        return not self._ours

    @contextlib.contextmanager
    def _computing(self) -> Iterator[None]:
        self._ours = True
        try:
            yield
        finally:
            self._ours = False


class _Redirect(TorchFunctionMode):
    """Sends what a host calls of `scaled_dot_product_attention` to `site`."""

    def __init__(self, site: _Site) -> None:
        super().__init__()
        self.site = site

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and self.site.redirects:
            return self.site.attend_as_host(*args, **kwargs)
        return func(*args, **kwargs)


def _gathered(group: Group, x: Tensor, dim: int, counts: tuple[int, ...], summed: bool = True) -> Tensor:
    """`x`, of the views of this process along `dim`, of the views of all."""
    return group.gather(x.movedim(dim, 0), counts, summed).movedim(0, dim)


def _group_of(mesh: Any) -> dist.ProcessGroup:
    if not dist.is_initialized():
        raise ParallelError(
            "there are no other processes: start with torchrun --nproc-per-node=N, and call torch.distributed.init_process_group before"
        )
    if mesh is None:
        return dist.distributed_c10d._get_default_group()
    if isinstance(mesh, DeviceMesh):
        if mesh.ndim != 1:
            raise ParallelError(f"a mesh of one dimension is needed, got {mesh.mesh_dim_names or mesh.ndim}: pass a part of it, mesh[name]")
        return mesh.get_group()
    if isinstance(mesh, dist.ProcessGroup):
        return mesh
    raise ParallelError(f"mesh is a DeviceMesh, a process group that this process is in, or None, got {shown(mesh)}")


def _module(modules: Mapping[str, nn.Module], name: str) -> nn.Module:
    if not isinstance(name, str) or name not in modules:
        raise ParallelError(f"this model has no module {shown(name)}, which is to run on all views")
    return modules[name]


def _inside(fqn: str, around: Mapping[str, Any]) -> bool:
    return any(fqn == name or fqn.startswith(f"{name}.") for name in around)


def _views_in(args: Any, kwargs: Any) -> int | None:
    """How many views the first tensor of a module that is tried has: the second dimension, behind a batch of one."""
    found: list[int] = []

    def take(x: Tensor) -> Tensor:
        if x.dim() >= 3 and x.shape[0] == 1:
            found.append(x.shape[1])
        return x

    exchanged((args, kwargs), take)
    return found[0] if found else None
