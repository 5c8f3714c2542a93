"""What `doctor` found, as data and as text."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

MIB, GIB = 2**20, 2**30


@dataclass(frozen=True)
class Site:
    """Modules of one pattern of names that attend alike.

    Attributes:
        pattern: Their names, numbers as ``{i}``.
        count: How many there are.
        scope: Of the adapter's sites; None where no adapter names them.
        queries: Shape ``[B, H, N, D]``.
        keys: Number of keys.
        kernel: What ran: ``flash``, ``efficient``, ``cudnn``, ``math`` (products and a softmax, which hold all scores), or
            ``its own code``, which calls no `scaled_dot_product_attention`.
        dtype: Of the output.
        masked: Whether there was a mask.
    """

    pattern: str
    count: int
    scope: str | None
    queries: tuple[int, ...]
    keys: int
    kernel: str
    dtype: str
    masked: bool


@dataclass(frozen=True)
class Leak:
    """An operator that ran in FP32 inside of a model whose products are in half precision.

    Attributes:
        pattern: The modules.
        operator: Its name.
        calls: In one forward.
        size: Bytes that it wrote.
        flops: Of products, in FP32.
    """

    pattern: str
    operator: str
    calls: int
    size: int
    flops: float


@dataclass(frozen=True)
class Unread:
    """Tensors that were made, kept, and read by nothing.

    Attributes:
        pattern: Who made them.
        shape: Of each.
        count: How many.
        size: Bytes of all.
    """

    pattern: str
    shape: tuple[int, ...]
    count: int
    size: int


@dataclass(frozen=True)
class Timing:
    """Where the time of a forward goes.

    Attributes:
        forward_ms: Of a whole forward, the median of `runs`.
        runs: How many.
        host_ms: Python's part on a GPU: until everything is launched. None on other devices.
        gpu_ms: What the GPU needs where it never waits for Python; None on other devices, and where the forward waits for the GPU.
        operators: Operators that compute something: launches at least.
        waits: Operators that wait for a GPU, by modules.
    """

    forward_ms: float
    runs: int
    host_ms: float | None
    gpu_ms: float | None
    operators: int
    waits: dict[str, int]

    @property
    def launch_bound(self) -> bool | None:
        """Whether Python takes longer than the GPU; None where that cannot be told."""
        return None if self.host_ms is None or self.gpu_ms is None else self.host_ms > self.gpu_ms


@dataclass(frozen=True)
class ViewGrowth:
    """How memory grows with views, and what follows.

    Attributes:
        measured: Peak bytes by numbers of views, weights included.
        memory: Bytes that there are.
        most: The largest number of views whose peak fits, by the growth that was measured; an estimate. 0 where not even one does.
    """

    measured: dict[int, int]
    memory: int
    most: int


@dataclass(frozen=True)
class Step:
    """A step of Lite3R.

    Attributes:
        name: What it is.
        line: What to type.
        pays: Whether it is expected to make this model faster or smaller here; None where that was not measured on this device.
        saves_ms: Of one forward, an estimate; None where there is no model of it.
        saves_bytes: At the peak, an estimate; None where there is no model of it.
        why: What that follows from, or why it does not pay.
    """

    name: str
    line: str
    pays: bool | None
    saves_ms: float | None
    saves_bytes: int | None
    why: str


@dataclass(frozen=True)
class Diagnosis:
    """What `doctor` found; print it, or take it as data with `to_dict`.

    Attributes:
        model: Class of the model.
        adapter: The adapter that knows it, or None.
        device: Where it is.
        images: Shapes of the tensors that it was given.
        products: FLOPs of products and attention by dtype.
        sites: Where it attends.
        leaks: What runs in FP32 although most products are in half precision, the largest first.
        unread: What is kept for nobody.
        timing: Where the time goes.
        weight_bytes: Of parameters and buffers, by dtype.
        parts: Bytes of parameters and buffers by part of the model.
        activations: Bytes held at the peak of a forward beside weights and inputs, by what made them.
        activation_peak: Their sum.
        peak_bytes: Most that the allocator of a GPU gave during a forward, weights included; None on other devices.
        views: How many views fit; None where that cannot be told, `notes` say why.
        steps: What would pay.
        notes: What could not be told, and why.
    """

    model: str
    adapter: str | None
    device: str
    images: tuple[tuple[int, ...], ...]
    products: dict[str, float]
    sites: tuple[Site, ...]
    leaks: tuple[Leak, ...]
    unread: tuple[Unread, ...]
    timing: Timing
    weight_bytes: dict[str, int]
    parts: dict[str, int]
    activations: dict[str, int]
    activation_peak: int
    peak_bytes: int | None
    views: ViewGrowth | None
    steps: tuple[Step, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON-serialisable data."""
        found = dataclasses.asdict(self)
        found["timing"]["launch_bound"] = self.timing.launch_bound
        return found

    def __str__(self) -> str:
        known = f"adapter {self.adapter!r}" if self.adapter else "no adapter knows it"
        lines = [f"{self.model} on {self.device} ({known}), given {', '.join(str(list(shape)) for shape in self.images)}"]
        for title, section in (
            ("Attention", self._of_sites()),
            ("Precision", self._of_precision()),
            ("Kept for nobody", self._of_unread()),
            ("Time", self._of_time()),
            ("Memory", self._of_memory()),
            ("What would pay here (estimates)", self._of_steps()),
            ("Notes", iter(self.notes)),
        ):
            found = [f"  {line}" for line in section]
            lines += ["", title, *found] if found else []
        return "\n".join(lines)

    def _of_sites(self) -> Iterator[str]:
        for s in self.sites:
            scope = f" {s.scope}" if s.scope else ""
            masked = ", masked" if s.masked else ""
            yield f"{s.count} x {s.pattern}:{scope} q {list(s.queries)}, {s.keys} keys{masked}: {s.kernel}, {s.dtype}"
        if not self.sites:
            yield "none was seen"

    def _of_precision(self) -> Iterator[str]:
        total = sum(self.products.values())
        if total:
            yield "products: " + ", ".join(f"{flops / 1e9:.1f} GFLOP in {dtype}" for dtype, flops in self.products.items())
        for leak in self.leaks:
            flops = f", {leak.flops / 1e9:.2f} GFLOP" if leak.flops else ""
            yield f"in FP32: {leak.calls} x {leak.operator} of {leak.pattern}, {leak.size / MIB:.1f} MiB written{flops}"

    def _of_unread(self) -> Iterator[str]:
        for u in self.unread:
            yield f"{u.count} tensors {list(u.shape)} of {u.pattern}: {u.size / MIB:.1f} MiB that nothing reads"

    def _of_time(self) -> Iterator[str]:
        t = self.timing
        yield f"{t.forward_ms:.1f} ms a forward (median of {t.runs}), {t.operators} operators"
        if t.host_ms is None:
            yield "launch-bound: a question for a GPU"
        elif t.gpu_ms is None:
            yield f"Python and its waits take {t.host_ms:.1f} ms; the GPU's own time cannot be told while the forward waits for it"
        else:
            words = "launch-bound: Python takes longer than the GPU" if t.launch_bound else "bound by the GPU"
            yield f"{words} (Python {t.host_ms:.1f} ms, GPU {t.gpu_ms:.1f} ms)"
        if t.waits:
            where = ", ".join(f"{count} in {part or 'the model'}" for part, count in t.waits.items())
            yield f"{'waits' if t.host_ms is not None else 'would wait'} for a GPU {sum(t.waits.values())} times: {where}"

    def _of_memory(self) -> Iterator[str]:
        total = sum(self.weight_bytes.values())
        kinds = ", ".join(f"{size / MIB:.1f} MiB {dtype}" for dtype, size in self.weight_bytes.items())
        yield f"weights {total / MIB:.1f} MiB ({kinds}): {_shares(self.parts)}"
        yield f"activations at the peak {self.activation_peak / MIB:.1f} MiB: {_shares(self.activations)}"
        if self.peak_bytes is not None:
            yield f"peak of the allocator, weights included: {self.peak_bytes / GIB:.2f} GiB"
        if self.views is not None:
            v = self.views
            at = ", ".join(f"{size / GIB:.2f} GiB at {views}" for views, size in v.measured.items())
            yield f"about {v.most} views fit into {v.memory / GIB:.1f} GiB (an estimate: {at} views)"

    def _of_steps(self) -> Iterator[str]:
        for step in self.steps:
            saved = [
                f"about {step.saves_ms:.1f} ms" if step.saves_ms else "",
                f"about {step.saves_bytes / MIB:.1f} MiB" if step.saves_bytes else "",
            ]
            verdict = {True: "yes", False: "no", None: "unknown"}[step.pays]
            amount = ", ".join(filter(None, saved))
            yield f"{verdict}: {step.name}{f', saves {amount}' if amount else ''}: {step.why}"
            if step.pays:
                yield f"     {step.line}"


def _shares(parts: dict[str, int], most: int = 6) -> str:
    """The largest parts, and the rest as one."""
    ordered = Counter(parts).most_common()
    shown = [f"{name or 'the model'} {size / MIB:.1f}" for name, size in ordered[:most]]
    rest = sum(size for _, size in ordered[most:])
    return ", ".join([*shown, *([f"others {rest / MIB:.1f}"] if rest else [])])
