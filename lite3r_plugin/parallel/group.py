"""The processes that run one scene: what travels between them, with gradients, and how an error of one ends all of them.

They have a process group of their own, with a timeout of their own, beside that of the caller. A process whose forward fails leaves
its reason in the store that `torch.distributed` was started with and gives the group up; the others, which wait for it, see that the
connection is gone, and raise `ParallelError` with the reason. A process that dies leaves none. Where the backend does not tell that a
connection is gone, as NCCL, the timeout ends the wait.
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..errors import ParallelError, short

Value = TypeVar("Value")


class Group:
    """The processes, in the order of their views.

    Args:
        among: The process group whose processes they are. All of them make it.
        timeout: Seconds after which a process that waits for another gives up.

    Raises:
        ParallelError: a process does not make the group in time, or they cannot reach each other.

    Attributes:
        rank: The place of this process among them.
        size: How many they are.
        traffic: Bytes that this process was sent by others, since it was set to 0.
    """

    def __init__(self, among: dist.ProcessGroup, timeout: float) -> None:
        self.ranks = dist.get_process_group_ranks(among)
        self.rank, self.size = dist.get_rank(among), len(self.ranks)
        self.traffic = 0
        self.reason: str | None = None
        self._agreed: dict[Hashable, Any] = {}
        self._group: Any = None
        self._key = f"lite3r/parallel/{'-'.join(map(str, self.ranks))}"
        self._now, limit = f"{self._key}/now", datetime.timedelta(seconds=timeout)
        try:
            self._key = self._named(limit)
            self._group = _new_group(self.ranks, self._key, limit, dist.get_backend(among))
            self._wait_for_all(limit)
        except RuntimeError as error:
            self.close()
            raise ParallelError(
                f"the {self.size} processes found no way to each other: all of them call parallelize_views, as often and in the same order "
                f"(seen by rank {self.rank}: {short(error, 120)})"
            ) from error
        except BaseException:
            self.close()
            raise
        finally:
            self._forget_name()

    def _named(self, limit: datetime.timedelta) -> str:
        """The name of this group, which no other has had: the first process gives it, the others take the one that it gives now."""
        if self.rank == 0:
            _store().set(self._now, f"{self._key}/{_store().add(f'{self._key}/tried', 1)}")
        else:
            _store().wait([self._now], limit)
        return _store().get(self._now).decode()

    def _forget_name(self) -> None:
        """Let whoever comes from now on wait for the next name."""
        if self.rank == 0:
            with contextlib.suppress(Exception):  # the store may be gone with the process that holds it
                _store().delete_key(self._now)

    def _wait_for_all(self, limit: datetime.timedelta) -> None:
        """Until all processes have the group: one that closes it sooner would break the connections of those that still make it."""
        had = [f"{self._key}/had by {rank}" for rank in range(self.size)]
        if self.rank == 0 and self.size > 1:
            _store().wait(had[1:], limit)
            self._forget_name()
        _store().set(had[self.rank], "")
        _store().wait(had, limit)

    # Errors

    def close(self) -> None:
        """Give the process group up. Whoever waits for this process learns of it."""
        group, self._group = self._group, None  # connections close with the last reference
        if group is not None:
            with contextlib.suppress(ValueError):  # gone with all others, by `destroy_process_group`
                dist.destroy_process_group(group)

    def give_up(self, error: BaseException) -> None:
        """Tell the others that this process failed, and why, and leave them."""
        if self._group is None:
            return
        self.reason = f"rank {self.rank} failed: {short(error)}"
        with contextlib.suppress(Exception):  # the store may be gone with the process that holds it
            _store().set(self._key, self.reason)
        self.close()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[Any]:
        """The process group, for what waits for others. Raises `ParallelError` where one of them failed or died."""
        if self._group is None:
            raise ParallelError(
                f"this model runs on several processes no more: {self.reason or 'it was taken off them'}; take parallelize_views back by "
                "remove() and call it again"
            )
        try:
            yield self._group
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            self.reason = self._left_reason() or f"another process of {self.size} died, or did not answer in time, and left no reason"
            self.close()
            raise ParallelError(
                f"the run on {self.size} processes ends, because {self.reason} (seen by rank {self.rank}: {short(error, 120)})"
            ) from error

    def _left_reason(self) -> str | None:
        try:
            store = _store()
            return store.get(self._key).decode() if store.check([self._key]) else None
        except Exception:  # it went with the process that held it
            return None

    # What travels

    def gather(self, x: Tensor, sizes: Sequence[int], summed: bool = True) -> Tensor:
        """``[n, ...]`` of each process one after the other, ``[sum(sizes), ...]``; this one's n is ``sizes[rank]``.

        Args:
            x: Any strides.
            sizes: Of all processes.
            summed: How gradients come back: as the sum over processes, each of which does something of its own with what it gets; or,
                where all do the same, as this process's own.
        """
        return _Gather.apply(x, self, tuple(sizes), summed)  # type: ignore[no-any-return]

    def gather_pair(self, k: Tensor, v: Tensor, sizes: Sequence[int]) -> Callable[[], Tensor]:
        """Begin to gather keys and values, ``[n, ...]`` of each process; gradients come back as sums.

        Args:
            k, v: ``[n, ...]``, any strides; both travel in v's dtype.
            sizes: n of all processes.

        Returns:
            What waits for those of all, to be called once: ``[sum(sizes), 2, ...]``. In a backward pass it is the other way round: what it
            gives begins to travel back where it is called here, and is waited for where the gathering was begun.
        """
        travel = _Travel(self, tuple(sizes))
        every = _Leave.apply(k, v, travel)
        return lambda: _Arrive.apply(every, travel)  # type: ignore[no-any-return]

    def exchange(self, x: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """Rows ``[sum(sent), ...]``, ``sent[r]`` of them to each process, for ``[sum(received), ...]`` of them, by process.

        What a process would send to itself is better left out: it would go through the kernels that fill links.
        """
        return _Exchange.apply(x, self, tuple(sent), tuple(received))  # type: ignore[no-any-return]

    def sum(self, x: Tensor) -> Tensor:
        """The sum over processes."""
        return _Sum.apply(x, self)  # type: ignore[no-any-return]

    def pass_on(self, x: Tensor, received: int) -> tuple[Tensor, Callable[[], None]]:
        """What the process before this one holds, ``[received, ...]``, while `x` goes to the next; and what waits for it to be there."""
        pending = _Pending(self)
        return _PassOn.apply(x, self, received, pending), pending.wait

    def numbers(self, values: Sequence[int], device: torch.device) -> list[list[int]]:
        """The integers of all processes, by process."""
        own = torch.tensor(values, dtype=torch.int64, device=device)
        return _gathered(self, own[None], (1,) * self.size).tolist()

    def agree(self, key: Hashable, value: Callable[[], bool], device: torch.device) -> bool:
        """What the first process says, asked once for each `key`: devices that are alike may still measure unlike times."""
        if key not in self._agreed:
            self._agreed[key] = bool(self.numbers([int(value())], device)[0][0])
        return self._agreed[key]

    def add_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Let the gradient of each parameter be the sum of those of all processes; one that has none anywhere keeps none."""
        learning = [parameter for parameter in parameters if parameter.requires_grad]
        if not learning:
            return
        known = self.numbers([int(parameter.grad is not None) for parameter in learning], learning[0].device)
        for parameter, *have in zip(learning, *known, strict=True):
            if not any(have):
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            with self.waiting() as group:
                dist.all_reduce(parameter.grad, group=group)


def _store() -> Any:
    """What `torch.distributed` was started with."""
    return dist.distributed_c10d._get_default_store()


def _new_group(ranks: list[int], name: str, timeout: datetime.timedelta, backend: str) -> Any:
    """As `torch.distributed.new_group` makes one, of a name of ours: under it the processes leave in the store where they can be reached.

    Torch's own are made of counts of each process by itself. Processes that were in unlike groups would give this one unlike names, and
    wait for each other; and before 2.14 the name of a group that is gone comes again, and with it addresses at which nobody is.
    """
    c10d: Any = dist.distributed_c10d
    group, _ = c10d._new_process_group_helper(
        len(ranks), ranks.index(dist.get_rank()), ranks, c10d.Backend(backend), _store(), name, timeout=timeout,
        device_id=c10d._get_default_group().bound_device_id,
    )  # fmt: skip
    c10d._world.pg_group_ranks[group] = {rank: place for place, rank in enumerate(ranks)}
    return group


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, sizes: tuple[int, ...], summed: bool) -> Tensor:
        ctx.group, ctx.sizes, ctx.summed = group, sizes, summed
        return _gathered(group, x, sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad,) = grad_outputs
        group, sizes = ctx.group, ctx.sizes
        if not ctx.summed:
            return grad.split(sizes)[group.rank], None, None, None
        own, work = _begin_sum(group, grad, sizes)
        with group.waiting():
            work.wait()
        return own, None, None, None


class _Travel:
    """Keys and values that were begun to be gathered, or their gradients on the way back."""

    def __init__(self, group: Group, sizes: tuple[int, ...]) -> None:
        self.group, self.sizes = group, sizes
        self.work: Any = None
        self.own: Tensor | None = None  # gradients of this process's own

    def wait(self) -> None:
        """Until what was received may be read."""
        with self.group.waiting():
            self.work.wait()
        self.work = None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, k: Tensor, v: Tensor, travel: _Travel) -> Tensor:
        ctx.travel = travel
        slots = _slots(travel.group, v, travel.sizes, 2)
        own = slots[travel.group.rank, : len(v)]
        own[:, 0], own[:, 1] = k, v
        travel.work = _begin_gather(travel.group, slots)
        return slots

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        travel = ctx.travel
        travel.wait()
        own, travel.own = travel.own, None
        return *own.unbind(1), None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, slots: Tensor, travel: _Travel) -> Tensor:
        ctx.travel = travel
        travel.wait()
        return _from_slots(slots, travel.sizes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad,) = grad_outputs
        travel = ctx.travel
        travel.own, travel.work = _begin_sum(travel.group, grad, travel.sizes)
        most = max(travel.sizes)
        return grad.new_zeros(()).expand(travel.group.size, most, *grad.shape[1:]), None  # `_Leave` takes `own`


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, sent: tuple[int, ...], received: tuple[int, ...]) -> Tensor:
        ctx.group, ctx.sent, ctx.received = group, sent, received
        return _exchanged(group, x, sent, received)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad,) = grad_outputs
        return _exchanged(ctx.group, grad, ctx.received, ctx.sent), None, None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _summed(group, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad,) = grad_outputs
        return _summed(ctx.group, grad), None


class _Pending:
    """Sends and receipts that were begun."""

    def __init__(self, group: Group) -> None:
        self.group, self.works, self.held = group, (), ()

    def begin(self, x: Tensor, received: Tensor, forwards: bool) -> None:
        """Send `x` to the next process and receive from the one before; the other way round if not `forwards`."""
        group = self.group
        step = 1 if forwards else -1
        to, of = (group.ranks[(group.rank + way) % group.size] for way in (step, -step))
        with group.waiting() as where:
            operations = [dist.P2POp(dist.isend, x, to, where), dist.P2POp(dist.irecv, received, of, where)]
            self.works, self.held = tuple(dist.batch_isend_irecv(operations)), (x, received)
        group.traffic += received.numel() * received.element_size()

    def wait(self) -> None:
        """Until what was received may be read."""
        with self.group.waiting():
            for work in self.works:
                work.wait()
        self.works = self.held = ()


class _PassOn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, received: int, pending: _Pending) -> Tensor:
        ctx.group, ctx.size = group, len(x)
        out = x.new_empty(received, *x.shape[1:])
        pending.begin(x.contiguous(), out, forwards=True)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad,) = grad_outputs
        out = grad.new_empty(ctx.size, *grad.shape[1:])
        pending = _Pending(ctx.group)
        pending.begin(grad.contiguous(), out, forwards=False)
        pending.wait()
        return out, None, None, None


def _gathered(group: Group, x: Tensor, sizes: Sequence[int]) -> Tensor:
    slots = _slots(group, x, sizes)
    slots[group.rank, : len(x)] = x
    work = _begin_gather(group, slots)
    with group.waiting():
        work.wait()
    return _from_slots(slots, sizes)


def _slots(group: Group, x: Tensor, sizes: Sequence[int], *inner: int) -> Tensor:
    """Room for ``[n, *inner, ...]`` of each process, as long as the largest: ``[processes, max(sizes), *inner, ...]``."""
    return x.new_empty(group.size, max(sizes), *inner, *x.shape[1:])


def _begin_gather(group: Group, slots: Tensor) -> Any:
    """Begin to fill the slots of all other processes; that of this one is filled."""
    own = slots[group.rank]
    with group.waiting() as where:
        work = _gather_into(slots.flatten(0, 1), own, group=where, async_op=True)
    group.traffic += (group.size - 1) * own.nbytes
    return work


def _from_slots(slots: Tensor, sizes: Sequence[int]) -> Tensor:
    if all(size == slots.shape[1] for size in sizes):
        return slots.flatten(0, 1)
    return torch.cat([slot[:size] for slot, size in zip(slots, sizes, strict=True)])


def _begin_sum(group: Group, grad: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Any]:
    """Begin to sum ``[sum(sizes), ...]`` over processes: this one's own rows, which are there once the work is waited for."""
    slots = _slots(group, grad, sizes)
    for slot, part in zip(slots, grad.split(list(sizes)), strict=True):
        slot[: len(part)] = part
        slot[len(part) :] = 0
    own = torch.empty_like(slots[0])
    with group.waiting() as where:
        work = _scatter_sum(own, slots.flatten(0, 1), group=where, async_op=True)
    return own[: sizes[group.rank]], work


def _exchanged(group: Group, x: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
    out = x.new_empty(sum(received), *x.shape[1:])
    with group.waiting() as where:
        dist.all_to_all_single(out, x.contiguous(), list(received), list(sent), group=where)
    row = out.element_size() * out[:1].numel() if len(out) else 0
    group.traffic += row * (sum(received) - received[group.rank])
    return out


def _summed(group: Group, x: Tensor) -> Tensor:
    out = x.clone(memory_format=torch.contiguous_format)
    with group.waiting() as where:
        dist.all_reduce(out, group=where)
    group.traffic += out.numel() * out.element_size()
    return out


# torch 2.14 gave them shorter names and warns of the longer ones.
_gather_into: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_scatter_sum: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
