"""What training runs on: batches of samples, each process its share, from a place that a later run can go on from."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from ..adapter.outputs import ModelOutputs
from ..errors import ConfigError, InputError, shown
from .config import DistillConfig


@dataclass(frozen=True)
class Sample:
    """An input of the model, and what is known of it.

    Attributes:
        inputs: What the model's forward takes: a mapping is passed by keyword, a tuple or list by position, anything else alone. The
            first dimension of its tensors is the batch.
        labels: The truth, for the task loss, or None.
    """

    inputs: Any
    labels: ModelOutputs | None = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Sample:
        """The same on another device."""
        return _mapped(self, lambda tensor: tensor.to(device, non_blocking=non_blocking))


def as_sample(item: Any) -> Sample:
    """An item of data, which is an input or a `Sample`."""
    return item if isinstance(item, Sample) else Sample(item)


def join(items: Sequence[Any]) -> Sample:
    """One batch of items: their tensors, joined along the first dimension. It serves as the `collate_fn` of a `DataLoader`.

    Raises:
        InputError: they are of different forms or sizes, or hold what cannot be joined.
    """
    samples = [as_sample(item) for item in items]
    return samples[0] if len(samples) == 1 else _joined(samples, "")


def gives_items(data: Any) -> bool:
    """Whether `data` is a collection of inputs or samples, and not one of them."""
    if isinstance(data, (Mapping, str, bytes, Sample)) or hasattr(data, "__array__"):
        return False
    return isinstance(data, Iterable) or _has_numbers(data)


def share_of(data: Any, index: int, processes: int) -> Iterator[Sample]:
    """Every `processes`-th item of `data`, from the item `index` on, in order."""
    if isinstance(data, DataLoader) or not _has_numbers(data):
        items = itertools.islice(data, index, None, processes)
    else:
        items = (data[i] for i in range(index, len(data), processes))
    return map(as_sample, items)


class Feed:
    """Batches of `data` for one of several processes, over and over, with a position that can be gone back to.

    Batch i goes to process i modulo their number, so that N processes together take what one would take in N batches.

    Args:
        data: A `DataLoader`, whose batches are taken as they are; a data set with numbered items or a list, which is shuffled anew in
            each epoch; or any other iterable, also a generator, whose items come as they come. An item or batch is an input of the
            model or a `Sample`. Every process is to be given the same data, of which it takes its share.
        config: Batch size, seed, workers.
        processes, index: How many processes share the data, and which of them this one is.

    Attributes:
        items: Of a batch.
        epoch, batch: The position: epochs that are over, and batches of this process since. Numbered items have one epoch without end.

    Raises:
        InputError: `data` is no data, or empty.
        ConfigError: the configuration does not go with this kind of data.
    """

    def __init__(self, data: Any, config: DistillConfig, processes: int = 1, index: int = 0) -> None:
        from accelerate.data_loader import prepare_data_loader

        self._processes = processes
        self.epoch = self.batch = 0
        self._order: _Order | None = None
        loader = _loader(data, config)
        if isinstance(loader.batch_sampler, _Order):
            self._order = loader.batch_sampler
            self._order.processes, self._order.index = processes, index
            self.items, self._loader = config.batch_size, loader
            return
        if processes > 1 and loader.batch_size is None and (isinstance(loader.dataset, IterableDataset) or loader.batch_sampler is None):
            raise ConfigError("a DataLoader that makes no batches (batch_size=None) cannot be shared by several processes: give it a size")
        self.items = loader.batch_size or 1
        self._loader: Any = prepare_data_loader(
            loader, num_processes=processes, process_index=index, put_on_device=False, dispatch_batches=False, use_seedable_sampler=True,
            data_seed=config.seed,
        )  # fmt: skip

    def batches(self, epochs: int) -> int | None:
        """How many batches of this process so many epochs have, or None where the data does not tell."""
        if self._order is not None:
            return epochs * self._order.count // (self._order.size * self._processes)
        try:
            return epochs * len(self._loader)
        except TypeError:
            return None

    def __iter__(self) -> Iterator[Sample]:
        """Batches from the position on, without end; ends where an epoch has nothing to give, as that of a generator after the first."""
        if self._order is not None:
            self._order.start = self.batch
        while True:
            for item in self._epoch():
                self.batch += 1
                yield as_sample(item)
            if not self.batch:
                return
            self.epoch, self.batch = self.epoch + 1, 0

    def _epoch(self) -> Iterator[Any]:
        """The rest of the epoch."""
        from accelerate import skip_first_batches

        if self._order is not None:
            yield from self._loader
            return
        loader: Any = skip_first_batches(self._loader, self.batch) if self.batch else self._loader
        loader.set_epoch(self.epoch)  # after that: what accelerate 1.10 gives is at its first epoch
        try:
            yield from loader
        finally:
            loader.end()  # else it stays in a list of accelerate's


class _Order(Sampler[list[int]]):
    """Numbers of the items of the batches of one process, without end: all items in an order by chance, then all in another one.

    Batches go on over the ends of epochs, so that what one process takes in some steps is what many take together, whatever their number.

    Args:
        count: Of items.
        size: Of a batch.
        seed: Of the order.

    Attributes:
        processes, index: How many processes share the items, and which of them this one is.
        start: Batches of this process to leave out.
    """

    def __init__(self, count: int, size: int, seed: int) -> None:
        self.count, self.size, self.seed = count, size, seed
        self.processes, self.index, self.start = 1, 0, 0

    def __iter__(self) -> Iterator[list[int]]:
        shuffled: dict[int, list[int]] = {}
        for batch in itertools.count(self.start * self.processes + self.index, self.processes):
            places = [divmod(item, self.count) for item in range(batch * self.size, (batch + 1) * self.size)]
            shuffled = {epoch: shuffled.get(epoch) or self._shuffled(epoch) for epoch, _ in places}
            yield [shuffled[epoch][place] for epoch, place in places]

    def _shuffled(self, epoch: int) -> list[int]:
        numbers = list(range(self.count))
        random.Random(f"{self.seed} {epoch}").shuffle(numbers)
        return numbers


class _Items(Dataset[Any]):
    """A list as a data set."""

    def __init__(self, items: Sequence[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        return self.items[index]


class _Stream(IterableDataset[Any]):
    """An iterable as a data set."""

    def __init__(self, items: Iterable[Any]) -> None:
        self.items = items

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)


def _loader(data: Any, config: DistillConfig) -> DataLoader[Any]:
    if isinstance(data, DataLoader):
        if config.batch_size > 1 or config.workers:
            raise ConfigError("batch_size and workers belong to the DataLoader that was given: set them there")
        _refuse_empty(data)
        return data
    if not gives_items(data):
        raise InputError(
            f"data is a DataLoader, a data set, a list or a generator of inputs of the model, got {type(data).__name__}: "
            "put a single input x into a list, [x]"
        )
    options: dict[str, Any] = {"collate_fn": join, "num_workers": config.workers}
    generator = torch.Generator().manual_seed(config.seed)  # lest the loader draw from that of the process
    if _has_numbers(data):
        _refuse_empty(data)
        order = _Order(len(data), config.batch_size, config.seed)
        return DataLoader(data if isinstance(data, Dataset) else _Items(data), batch_sampler=order, generator=generator, **options)
    if config.workers:
        raise ConfigError(f"workers read data sets with numbered items, and each would run through this {type(data).__name__}: workers=0")
    return DataLoader(
        data if isinstance(data, IterableDataset) else _Stream(data), batch_size=config.batch_size, generator=generator, **options
    )


def _has_numbers(data: Any) -> bool:
    """Whether its items have numbers."""
    return hasattr(data, "__getitem__") and hasattr(data, "__len__") and not isinstance(data, IterableDataset)


def _refuse_empty(data: Any) -> None:
    try:
        count = len(data)
    except TypeError:
        return
    if not count:
        raise InputError(f"there is no data: the {type(data).__name__} is empty")


def _mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """`value` with `function` of each tensor in it."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: _mapped(part, function) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        parts = [_mapped(part, function) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changed = {field.name: _mapped(getattr(value, field.name), function) for field in dataclasses.fields(value) if field.init}
        return dataclasses.replace(value, **changed)
    return value


def _joined(values: Sequence[Any], path: str) -> Any:
    first = values[0]
    if any(type(value) is not type(first) for value in values):
        kinds = sorted({type(value).__name__ for value in values})
        raise InputError(f"the items of a batch are of different forms, {' and '.join(kinds)} at {path}: use batch_size=1")
    if isinstance(first, Tensor):
        try:
            return torch.cat(list(values))
        except RuntimeError as error:
            sizes = ", ".join(str(list(value.shape)) for value in values)
            raise InputError(
                f"the items of a batch cannot be joined along the first dimension at {path}, {sizes}: use batch_size=1"
            ) from error
    if isinstance(first, Mapping):
        if any(value.keys() != first.keys() for value in values):
            raise InputError(f"the items of a batch have different keys at {path}: use batch_size=1")
        return {key: _joined([value[key] for value in values], f"{path}[{key!r}]") for key in first}
    if isinstance(first, (list, tuple)):
        if any(len(value) != len(first) for value in values):
            raise InputError(f"the items of a batch are of different lengths at {path}: use batch_size=1")
        parts = [_joined(column, f"{path}[{i}]") for i, column in enumerate(zip(*values, strict=True))]
        return type(first)(*parts) if hasattr(first, "_fields") else type(first)(parts)
    if dataclasses.is_dataclass(first) and not isinstance(first, type):
        names = [field.name for field in dataclasses.fields(first) if field.init]
        return type(first)(**{name: _joined([getattr(value, name) for value in values], f"{path}.{name}".strip(".")) for name in names})
    if any(value is not first and value != first for value in values):
        raise InputError(
            f"the items of a batch have {shown(first)} and others at {path}, which cannot be joined: use batch_size=1, and leave labels of "
            "classes out, which are no input"
        )
    return first
