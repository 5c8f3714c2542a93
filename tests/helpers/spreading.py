"""Cases of one scene on several processes: what they find, as numbers and messages, in processes of their own that run all of them."""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import torch
import torch.distributed as dist
from distilling import divide
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from lite3r_plugin import apply_lite3r, convert, hookimpl, remove_lite3r
from lite3r_plugin.apply.lookup import lite3r_modules
from lite3r_plugin.costs.views import GROUP_BYTES
from lite3r_plugin.errors import ParallelError
from lite3r_plugin.parallel import ViewParallel, parallelize_views
from lite3r_plugin.parallel.group import Group
from lite3r_plugin.runtime.values import exchanged, tensors_in
from lite3r_plugin.testbed import Testbed, TestbedConfig

SPARSE: dict[str, Any] = {"keep_ratio": 0.25, "block_q": 16, "block_k": 16, "dense_below": 0}
VIEWS = 5  # do not divide by two or three
Case = Callable[[], Any]
PROCESSES = {"two": 2, "three": 3, "packages": 2}  # by the name of the run
CASES: dict[str, dict[str, Case]] = {run: {} for run in PROCESSES}


def case(*runs: str) -> Callable[[Case], Case]:
    """Register a case under the name of its function, for these runs."""

    def registered(function: Case) -> Case:
        for run in runs:
            CASES[run][function.__name__] = function
        return function

    return registered


# What cases are made of


def testbed(**fields: Any) -> Testbed:
    """Small, with weights by which all parts matter, the reference view too; with Lite3R if there are `fields`."""
    return sparse(two_blocks(), **fields) if fields else two_blocks()


def two_blocks(heads: int = 2) -> Testbed:
    """The same without Lite3R."""
    torch.manual_seed(0)
    model = Testbed(TestbedConfig(dim=32 * heads, depth=2, head_dim=32, stem=8)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2)
        model.camera_head.first_view.normal_()
    return model


def sparse(model: Any, **fields: Any) -> Any:
    """`model` with Lite3R and linear branches that count."""
    apply_lite3r(model, **fields)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("proj_lin.weight"):
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def images(views: int = VIEWS, batch: int = 1, size: tuple[int, int] = (32, 40)) -> Tensor:
    return torch.rand(batch, views, 3, *size, generator=torch.Generator().manual_seed(1))


def difference(expected: Any, got: Any) -> float:
    """The largest of all tensors, in parts of the largest value of each; shapes must be the same."""
    pairs = list(zip(tensors_in(expected), tensors_in(got), strict=True))
    assert pairs
    assert all(a.shape == b.shape for a, b in pairs), [(a.shape, b.shape) for a, b in pairs]
    return max(float((a.double() - b.double()).abs().max() / a.double().abs().max()) for a, b in pairs)


def ran(model: nn.Module) -> dict[str, int]:
    """How often the global sites of Lite3R ran sparse and dense."""
    sites = [site for site in lite3r_modules(model).values() if site.sparse]
    return {"sparse": sum(site.calls.sparse for site in sites), "dense": sum(site.calls.dense for site in sites)}


@torch.no_grad()
def compared(model: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """One forward in one process, one on all."""
    expected = model(x, *args, **kwargs)
    before = ran(model)
    with parallelize_views(model) as parallel:
        got = model(x, *args, **kwargs)
        assert parallel.spread is not None
        counts, stand_in = parallel.spread.counts, parallel.spread.stand_in
    calls = {kind: count - before[kind] for kind, count in ran(model).items()}
    return {"difference": difference(expected, got), "counts": counts, "stand_in": stand_in, **calls}


@contextlib.contextmanager
def refused() -> Iterator[list[str]]:
    """The message of the `ParallelError` that the context ends with."""
    said: list[str] = []
    try:
        yield said
    except ParallelError as error:
        said.append(str(error))


# Outputs


@case("two", "three")
def sparse_with_marginal_branch() -> Any:
    return compared(testbed(**SPARSE), images(batch=2))


@case("two")
def sparse_without_branch_or_means() -> Any:
    return compared(testbed(**SPARSE, linear_branch="none", block_means=False, pin="special"), images())


@case("two")
def sparse_with_branch_over_all() -> Any:
    return compared(testbed(**SPARSE, linear_branch="all", pin="none", negligible_ratio=0.2), images(batch=2))


@case("two", "three")
def sparse_with_the_reference_as_keys() -> Any:
    return compared(testbed(**SPARSE, pin="reference_keys"), images())


@case("two", "three")
def dense_with_branch_over_all() -> Any:
    return compared(testbed(**{**SPARSE, "keep_ratio": 1.0}, linear_branch="all"), images(batch=2))


@case("two")
def dense_without_lite3r() -> Any:
    return compared(testbed(), images())


@case("two")
def fp8_emulated() -> Any:
    return compared(convert(testbed(**SPARSE), fp8_backend="emulated"), images())


@case("two", "three")
def heads_in_groups() -> Any:
    """Against all heads at once; when keys of a group leave and are waited for; how many that have come are held when others leave."""
    model, x, found = sparse(two_blocks(heads=4), **SPARSE), images(batch=2), []
    with torch.no_grad(), parallelize_views(model) as parallel:
        steps, held = watched_keys(parallel)
        for least in (GROUP_BYTES, 1):
            parallel.attention.least = least
            steps.clear()
            found.append(tensors_in(model(x)))
    return {"same": all(map(torch.equal, *found)), "steps": steps, "held": held, **ran(model)}


def watched_keys(parallel: ViewParallel) -> tuple[list[str], list[int]]:
    """Lists in which each gathering of keys and values notes that it begins, and that it is waited for; and how many others are held.

    Gradients note the same: that those of a group begin to go back, and that those of its own are waited for.
    """
    steps, held, gather_pair = list[str](), list[int](), parallel.group.gather_pair
    here: list[StorageWeakRef] = []

    def watched(*args: Any) -> Callable[[], Tensor]:
        steps.append("leave")
        held.append(sum(not one.expired() for one in here))
        arrive = gather_pair(*args)

        def arrived() -> Tensor:
            steps.append("arrive")
            every = arrive()
            here.append(StorageWeakRef(every.untyped_storage()))
            if (arriving := every.grad_fn) is not None:
                leaving, number = arriving.next_functions[0][0], len(here)
                assert leaving is not None
                arriving.register_prehook(lambda _: steps.append(f"back {number}"))
                leaving.register_prehook(lambda _: steps.append(f"home {number}"))
            return every

        return arrived

    parallel.group.gather_pair = watched  # type: ignore[method-assign]
    return steps, held


@case("two")
def compiled_blocks() -> Any:
    """Compiled for one process before; what compiled code runs while the model is spread, and what is compiled anew a second time."""
    model, x = testbed(**COMPILED), images()
    made, runs = list[int](), list[int]()

    def backend(graph: Any, inputs: Any) -> Callable[..., Any]:
        made.append(len(made))

        def run(*args: Any) -> Any:
            runs.append(1)
            return graph(*args)

        return run

    fast_of(model).blocks.backend = backend
    found = compared(model, x)
    with torch.no_grad():
        runs.clear()
        model(x)
        alone = len(runs)
        with parallelize_views(model):
            model(x)
            before = len(made)
            runs.clear()
            model(x)
    return {**found, "alone": alone, "spread": len(runs), "anew": len(made) - before, "report": fast_of(model).report()}


@case("two")
def compiled_blocks_that_fail() -> Any:
    """A forward that fails runs once, and one that the compiler fails in runs eagerly the next time."""
    model, x, calls, own = testbed(**COMPILED), images(), list[int](), ""
    fast_of(model).blocks.backend = "eager"
    with torch.no_grad(), parallelize_views(model) as parallel:
        model(x)

        def count_and_fail(module: nn.Module, args: Any) -> None:
            calls.append(1)
            fail(module, args)

        model.depth_head.register_forward_pre_hook(count_and_fail)
        try:
            model(x)
        except OSError as error:
            own = str(error)
        later = parallel.group.reason
    model = testbed(**COMPILED)
    fast_of(model).blocks.backend = broken
    failed = ""
    try:
        with torch.no_grad(), parallelize_views(model):
            model(x)
    except Exception as error:
        failed = str(error)
    return {**compared(model, x), "own": own, "calls": calls, "later": later, "failed": failed, "report": fast_of(model).report()}


COMPILED: dict[str, Any] = {**SPARSE, "keep_ratio": {"*global_blocks.0.*": 1.0, "*": 0.25}, "compile_blocks": True}


def fast_of(model: nn.Module) -> Any:
    """What compiles its blocks."""
    return next(iter(lite3r_modules(model).values())).state.fast


def broken(graph: Any, inputs: Any) -> Any:
    raise RuntimeError("no compiler today")


class WithoutBatch(nn.Module):
    """A testbed that takes images ``[S, 3, H, W]``."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = testbed()

    def forward(self, x: Tensor) -> list[Tensor]:
        return [value[0] for value in self.inner(x[None]).values()]


@case("two")
def images_without_a_batch() -> Any:
    return compared(sparse(WithoutBatch().eval(), **SPARSE), images()[0])


class Returning(nn.Module):
    """A testbed that returns its images, too."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = testbed()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {**self.inner(x), "images": x}


@case("two")
def images_that_are_returned() -> Any:
    """They need not travel: every process has them all."""
    model, x = Returning().eval(), images()
    with torch.no_grad():
        expected = model(x)
        with parallelize_views(model) as parallel:
            got, held = model(x), parallel.given
        with parallelize_views(model, outputs="sharded") as parallel:
            own = model(x)["images"]
            kept = parallel.own(x)
    wanting = x.clone().requires_grad_()
    with parallelize_views(model) as parallel:
        model(wanting)["images"].sum().backward()
    assert wanting.grad is not None
    dist.all_reduce(wanting.grad)
    return {
        "difference": difference(expected, got), "same": got["images"] is x, "held": len(held), "own": torch.equal(own, kept),
        "gradient": torch.equal(wanting.grad, torch.ones_like(x)),
    }  # fmt: skip


@case("two")
def hosts_that_make_their_own_attention() -> Any:
    """One site is left to the host, which attends densely, at the other its call is redirected."""
    return compared(testbed(**{**SPARSE, "keep_ratio": {"*global_blocks.0.*": 1.0, "*": 0.25}}, fuse=False), images())


@case("two")
def camera_head_of_vggt() -> Any:
    from official import SmallVGGT

    torch.manual_seed(0)
    return compared(sparse(SmallVGGT(2, 2).eval(), **SPARSE), images(size=(56, 70)))


@case("packages")
def depth_anything_3() -> Any:
    model = sparse(real_da3(), **SPARSE)
    x = images(3, size=(56, 70))
    found = compared(model, x, ref_view_strategy="first")
    with refused() as said, parallelize_views(model), torch.no_grad():
        model(x)
    return {**found, "refused": said}


@functools.cache
def real_da3() -> Any:
    """The real package, which takes its time for the first forward; once for all processes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from real_models import small_da3

        torch.manual_seed(0)
        model: Any = small_da3()
        model.backbone.pretrained.blocks = model.backbone.pretrained.blocks[:6]
        model.backbone.out_layers = [2, 3, 4, 5]
        with torch.no_grad():
            model(images(2, size=(56, 70)))
    return model


@case("two", "three")
def sharded() -> Any:
    """Rank 0 has one view, the next two, the next three; each keeps the results of its own."""
    model, rank = testbed(**SPARSE), dist.get_rank()
    views = [number + 1 for number in range(dist.get_world_size())]
    x = images(sum(views))
    own = slice(sum(views[:rank]), sum(views[: rank + 1]))
    with torch.no_grad():
        expected = exchanged(model(x), lambda value: value[:, own])
        with parallelize_views(model, inputs="sharded", outputs="sharded") as parallel:
            got = model(x[:, own])
            again = model(x[:, own])
            kept = parallel.own(x)
    return {"difference": difference(expected, got), "again": difference(got, again), "own": torch.equal(kept, x[:, own])}


@case("two")
def other_weights() -> Any:
    model = testbed()
    with torch.no_grad():
        model.depth_head.norm.weight.add_(dist.get_rank())
    with refused() as said:
        parallelize_views(model)
    return said


# Commands


def register() -> None:
    """A small model by the name ``small``."""
    import dataclasses

    from lite3r_adapters.testbed.model import ENTRIES
    from lite3r_plugin.adapter import plugins

    class Plugin:
        @hookimpl
        def lite3r_models(self) -> Any:
            return {"small": dataclasses.replace(ENTRIES["testbed"], name="small", create=testbed, default_weights=None)}

    plugins.get_manager().register(Plugin(), name="small")


def reconstruct(folder: Path, name: str, *options: str) -> None:
    """``lite3r reconstruct`` in this process, of photographs of `folder`, which are made where there are none."""
    from PIL import Image

    from lite3r_plugin.cli.app import app

    photos = folder / "photos"
    if not photos.exists():
        photos.mkdir()
        for number, picture in enumerate(images(3, size=(96, 128))[0]):
            Image.fromarray((picture.permute(1, 2, 0) * 255).byte().numpy()).save(photos / f"{number}.png")
    what = ("reconstruct", str(photos), "--model", "small", "--weights", "random", "--device", "cpu", "--config", "dense_below=0")
    app([*what, "--out", str(folder / name), *options], standalone_mode=False)


def command(folder: Path) -> Any:
    """In all processes, before any of them has a process group."""
    import contextlib as contexts
    import io

    said = io.StringIO()
    with contexts.redirect_stdout(said), contexts.redirect_stderr(io.StringIO()):
        reconstruct(folder, "several.npz", "--parallel", "views")
    return {"initialized": dist.is_initialized(), "said": said.getvalue()}


def benchmark(folder: Path) -> Any:
    """benchmarks/parallel/views.py in all processes."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "parallel"))
    import views

    fields = [word for name, value in SPARSE.items() for word in ("--config", f"{name}={value}")]
    small = ("--resolution", "64x96", "--repeats", "1", "--link-megabytes", "1", "--device", "cpu")
    return views.main(["--model", "small", "--views", "4", *small, *fields, "--json", str(folder / "views.json")])


# Gradients


def gradients(model: nn.Module, x: Tensor, outputs: Any, checkpointed: bool = False, least: int = GROUP_BYTES) -> dict[str, Any]:
    """Of all parameters, in one process and of all, in FP64; what is zero but for rounding counts as zero.

    `least`: Bytes of a group of heads.
    """
    model, x = model.double(), x.double()

    def loss(result: Any) -> Tensor:
        return torch.stack([(value * torch.linspace(0.5, 1.5, value.shape[-1])).square().sum() for value in tensors_in(result)]).sum()

    def backward() -> dict[str, Tensor]:
        found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
        model.zero_grad()
        return found

    if checkpointed:
        for block in model.aggregator.global_blocks:  # type: ignore[union-attr]
            vars(block)["forward"] = Checkpointed(block)
    loss(model(x)).backward()
    expected = backward()
    with parallelize_views(model, outputs=outputs) as parallel:
        parallel.attention.least = least
        steps, _ = watched_keys(parallel)
        result = loss(model(x))
        steps.clear()
        result.backward()
        parallel.add_gradients()
    got = backward()
    assert expected.keys() == got.keys()
    largest = max(float(value.abs().max()) for value in expected.values())
    known = [name for name, value in expected.items() if value.abs().max() > 1e-12 * largest]
    return {
        "difference": max(difference(expected[name], got[name]) for name in known), "known": len(known), "count": len(expected),
        "others": max((float(got[name].abs().max()) / largest for name in expected.keys() - known), default=0.0), "steps": steps,
    }  # fmt: skip


class Checkpointed:
    """The forward of a block, run again in the backward pass."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward = type(self.block).forward
        return checkpoint(forward, self.block, *args, use_reentrant=False, **kwargs)


@case("two", "three")
def gradients_of_gathered_outputs() -> Any:
    return gradients(testbed(**SPARSE), images(batch=2), "gathered")


@case("two", "three")
def gradients_of_sharded_outputs() -> Any:
    return gradients(testbed(**{**SPARSE, "keep_ratio": 1.0}, linear_branch="all"), images(), "sharded")


@case("two", "three")
def gradients_by_groups_of_heads() -> Any:
    return gradients(sparse(two_blocks(heads=4), **SPARSE), images(batch=2), "gathered", least=1)


@case("two")
def gradients_with_checkpointing() -> Any:
    return gradients(testbed(**SPARSE), images(), "gathered", checkpointed=True, least=1)


# What is put back, and what is refused


@case("two")
def groups_one_after_the_other() -> Any:
    """Names of groups of all processes, then of a part of them: what is in the store under one must not be found under the next."""
    part = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    names = []
    for among in (dist.group.WORLD, part):
        for _ in range(3):
            group = Group(among, timeout=60)
            names.append(group._group.group_name)
            group.close()
    dist.destroy_process_group(part)
    return names


@case("two", "three")
def groups_that_overlap() -> Any:
    """Of the last process alone, of the first two, of the last two and of all: each process is in as many groups as no other."""
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    told = []
    for ranks in ([last], [0, 1], [last - 1, last], list(range(last + 1))):
        among = dist.new_group(ranks)
        if rank in ranks:
            group = Group(among, timeout=20)
            told.append([one[0] for one in group.numbers([rank], torch.device("cpu"))] == ranks)
            group.close()
    return {"told": told}


@case("two")
def a_group_that_one_makes_too_late() -> Any:
    """And another by all."""
    said: list[str] = []
    if dist.get_rank() == 0:
        with refused() as said:
            Group(dist.group.WORLD, timeout=0.5)
    dist.barrier()
    group = Group(dist.group.WORLD, timeout=60)
    numbers = group.numbers([1], torch.device("cpu"))
    group.close()
    return {"said": said, "numbers": numbers}


@case("two")
def a_group_that_one_has_too_late() -> Any:
    """Then one of them has it alone, one and the other; and then another by all."""
    make, found = dist.distributed_c10d._new_process_group_helper, []

    def late(*args: Any, **kwargs: Any) -> Any:
        made = make(*args, **kwargs)
        time.sleep(1)
        return made

    for slow in range(2):
        with (
            contextlib.suppress(ParallelError),
            mock.patch.object(dist.distributed_c10d, "_new_process_group_helper", late if dist.get_rank() == slow else make),
        ):
            Group(dist.group.WORLD, timeout=0.3).close()
        dist.barrier()
        group = Group(dist.group.WORLD, timeout=20)
        found.append(group.numbers([1], torch.device("cpu")))
        group.close()
    return {"numbers": found}


@case("two")
def a_group_that_one_makes_late() -> Any:
    """How long each process takes for a group that rank 0 has half a second after its connections."""
    start, make = time.monotonic(), dist.distributed_c10d._new_process_group_helper

    def late(*args: Any, **kwargs: Any) -> Any:
        made = make(*args, **kwargs)
        time.sleep(0.5)
        return made

    with mock.patch.object(dist.distributed_c10d, "_new_process_group_helper", late if dist.get_rank() == 0 else make):
        group = Group(dist.group.WORLD, timeout=60)
    taken = time.monotonic() - start
    group.close()
    return {"seconds": taken}


@case("two")
def undone() -> Any:
    model = testbed(**SPARSE)
    x = images()
    with torch.no_grad():
        expected, before = model(x), {name: set(vars(module)) for name, module in model.named_modules()}
        hooks = len(model._forward_pre_hooks)
        parallel = parallelize_views(model)
        keys = list(model.state_dict())
        model(x)
        with refused() as twice:
            parallelize_views(model)
        with refused() as part:
            model.aggregator(x)
        parallel.remove()
        parallel.remove()
        after = {name: set(vars(module)) for name, module in model.named_modules()}
        same = all(torch.equal(a, b) for a, b in zip(tensors_in(expected), tensors_in(model(x)), strict=True))
        remove_lite3r(model)
    return {
        "same": same, "tables": before == after, "hooks": len(model._forward_pre_hooks) <= hooks, "twice": twice, "part": part,
        "keys": keys == list(testbed(**SPARSE).state_dict()),
    }  # fmt: skip


class Mixing(nn.Module):
    """A testbed whose depth is divided by its mean over all views."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = testbed()

    def forward(self, x: Tensor) -> Tensor:
        depth = self.inner(x)["depth"]
        return depth / depth.mean()


@case("two")
def views_that_meet() -> Any:
    model = Mixing().eval()
    said: dict[str, Any] = {}
    with torch.no_grad():
        with refused() as said["mean"], parallelize_views(model):
            model(images())
        model = testbed()
        with refused() as said["few"], parallelize_views(model):
            model(images(1))
        with refused() as said["module"]:
            parallelize_views(model, gather=("head",))
        with refused() as said["single"]:
            parallelize_views(model.aggregator.patch_embed, sites=[])
    return said


@case("two")
def one_rank_has_other_images() -> Any:
    model, rank = testbed(), dist.get_rank()
    with torch.no_grad(), parallelize_views(model) as parallel:
        with refused() as other:
            model(images() + rank)
        with refused() as wrong:
            model(images() if rank else torch.zeros(3))
        well = model(images())
        size = parallel.size
    return {"other": other, "wrong": wrong, "views": well["depth"].shape[1], "size": size}


@case("two", "three")
def one_rank_fails() -> Any:
    model, rank = testbed(), dist.get_rank()
    start, other = time.monotonic(), ""
    with torch.no_grad():
        parallel = parallelize_views(model)
        model(images())
        if rank == 1:
            model.depth_head.register_forward_pre_hook(fail)
        with refused() as said:
            try:
                model(images())
            except OSError as error:
                other = str(error)
        with refused() as later:
            model(images())
        parallel.remove()
    return {"said": said, "own": other, "later": later, "seconds": time.monotonic() - start}


def fail(module: nn.Module, args: Any) -> None:
    raise OSError("the disk is full")


def one_rank_dies(parallel: ViewParallel, model: nn.Module) -> Any:
    """The last: afterwards there is one less."""
    if dist.get_rank() == 1:
        model.depth_head.register_forward_pre_hook(lambda *_: os._exit(9))  # type: ignore[union-attr]
    start = time.monotonic()
    with refused() as said, torch.no_grad():
        model(images())
        model(images())
    seconds = time.monotonic() - start
    parallel.remove()
    with refused() as alone:
        parallelize_views(model, timeout=1)
    return {"said": said, "seconds": seconds, "alone": alone}


# Processes


def start(folder: Path, *runs: str) -> subprocess.Popen[str]:
    """Run all cases of these runs in processes of their own; what they find goes to ``<run>.json`` of `folder`."""
    slow_guards = "ignore:Guards may run slower on Python 3.13.0:RuntimeWarning"  # the compiler's, as in pyproject.toml
    command = [sys.executable, "-W", "error", "-W", slow_guards, __file__, str(folder), *runs]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def run_cases(folder: Path, run: str) -> NoReturn:
    """All cases of a run in its processes, this one among them."""
    processes = PROCESSES[run]
    others, _kept = divide(processes)
    cases: dict[str, Case] = dict(CASES[run])
    found: dict[str, Any] = {}
    if run == "packages":
        result = command(folder)
        cases = {**cases, "command": lambda: result, "benchmark": lambda: {"exit": benchmark(folder)}}
    # Names of its own in the store: the command has had a group there, too.
    met = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), processes, is_master=False)
    store = dist.PrefixStore("cases", met)
    dist.init_process_group("gloo", store=store, rank=int(os.environ["RANK"]), world_size=processes)
    for name, one_case in cases.items():
        try:
            one: Any = one_case()
        except Exception as error:
            one = {"error": repr(error)}
        found[name] = [None] * processes
        dist.all_gather_object(found[name], one)
    model = testbed()
    parallel = parallelize_views(model)
    with torch.no_grad():
        model(images())
    found["one_rank_dies"] = [one_rank_dies(parallel, model)]
    if dist.get_rank() == 0:
        (folder / f"{run}.json").write_text(json.dumps(found))
        for other in others:
            os.waitpid(other, 0)
    os._exit(0)  # destroying a group that has lost a process would wait for it


def main(folder: Path, *runs: str) -> None:
    """As `start` says."""
    torch.set_num_threads(1)  # threads do not come along into a fork
    importlib.import_module("torch._dynamo")  # as gradient checkpointing does; what is imported here is imported once
    with torch.no_grad():  # whose threads do not come along either
        testbed(**SPARSE)(images())
    children = []
    for run in sorted(runs, key="packages".__eq__):  # whose libraries the others need not have
        if run == "packages":
            real_da3()
            register()
            reconstruct(folder, "one.npz")
        if (child := os.fork()) == 0:
            run_cases(folder, run)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
