"""`inspect_model`: where a model attends, seen in one forward, and an adapter to start from."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..adapter.layouts import TokenSource
from ..adapter.sites import AttentionSite, FusedQKV, Projections, Routed, SeparateQKV
from ..apply.lookup import lite3r_modules
from ..apply.verbs import apply_lite3r, remove_lite3r
from ..config import Scope
from ..errors import InputError, Lite3RError, short
from ..ops.dispatch import SlowPathWarning
from .adapter import TEST_CONFIG, AdapterReport, call_model, check_adapter

SHAPES = ((1, 2, 3, 112, 224), (2, 3, 112, 224), (1, 2, 3, 224, 224), (2, 3, 224, 224))
"""Random images that are tried where none are given: two views of a size that patches of 14 and 16 divide, and the usual one."""
CHANNELS = 3


@dataclass
class Candidate:
    """A module whose forward calls attention itself.

    Attributes:
        fqn: Its fully qualified name.
        kind: Its class.
        calls: How often it called `scaled_dot_product_attention` in one forward of its own, at most.
        shape: Of the queries, ``[B, H, N, D]``.
        keys: Number of keys.
        asks: What else it asked for: a mask, causal order, dropout, a scale.
        linears: The Linears inside, with their features.
        others: What else is inside and has a say: norms, rotary embeddings, parameters.
        routed: Whether its forward does more than its Linears say, or takes other arguments.
        left: Why its own code would run although it is a site, as with cross-attention in some calls; "" where it would not.
    """

    fqn: str
    kind: str
    shape: tuple[int, ...]
    keys: int
    calls: int = 0
    asks: tuple[str, ...] = ()
    linears: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    routed: bool = False
    left: str = ""

    @property
    def refused(self) -> str | None:
        """Why it can be no site, or None."""
        if self.asks:
            return ", ".join(self.asks)
        if self.calls != 1:
            return f"{self.calls} calls of scaled_dot_product_attention in one forward"
        if len(self.shape) != 4:
            return f"queries of {len(self.shape)} dimensions"
        if self.shape[2] != self.keys:
            return f"cross-attention, {self.shape[2]} queries to {self.keys} keys"
        return self.left or None


@dataclass(frozen=True)
class Inspection:
    """What `inspect_model` saw; print it.

    Attributes:
        model: Class of the model.
        images: Shapes of the tensors that the model was given.
        candidates: The modules that attend, in the order in which they ran.
        saw_images: Modules that were given images, with the shape and, of patch convolutions, the patch size.
        eager: Modules that look like attention but called no `scaled_dot_product_attention`.
        sites: The sites of the adapter.
        adapter: Its code; "" where no module can be a site.
        report: What `check_adapter` says of it, or why it fails.
    """

    model: str
    images: tuple[str, ...]
    candidates: tuple[Candidate, ...]
    saw_images: tuple[str, ...]
    eager: tuple[str, ...]
    sites: tuple[AttentionSite, ...] = ()
    adapter: str = ""
    report: AdapterReport | str = ""

    def __str__(self) -> str:
        lines = [f"{self.model} on {', '.join(self.images)}", "", "Modules that attend (of each pattern the first):"]
        alike: dict[tuple[Any, ...], list[Candidate]] = {}
        for c in self.candidates:
            alike.setdefault((_pattern(c.fqn), c.kind, c.shape, c.refused), []).append(c)
        for (pattern, *_), found in alike.items():
            c = found[0]
            lines.append(f"  {pattern if len(found) > 1 else c.fqn}  ({len(found)} of class {c.kind})")
            lines.append(f"    q [B, H, N, D] = {list(c.shape)}, {c.keys} keys" + (f"; left out: {c.refused}" if c.refused else ""))
            lines += [f"    {'; '.join(c.linears)}"] if c.linears else []
            lines += [f"    beside them: {'; '.join(c.others)}"] if c.others else []
        lines += [] if self.candidates else ["  none"]
        if self.eager:
            lines += ["", "Look like attention, but called no scaled_dot_product_attention (switch the model to SDPA):"]
            lines += [f"  {pattern}" for pattern in dict.fromkeys(map(_pattern, self.eager))]
        lines += ["", "Modules that were given images:", *(f"  {text}" for text in self.saw_images or ("none",))]
        if self.adapter:
            lines += ["", "An adapter to start from:", "", *(f"    {line}".rstrip() for line in self.adapter.splitlines()), ""]
            lines += [f"check_adapter: {self.report}"]
        return "\n".join(lines)


def inspect_model(model: nn.Module, example_inputs: Any = None, *, shape: Sequence[int] | None = None) -> Inspection:
    """Run `model` once, see where it attends, and write an adapter for it. The model is left as it was.

    Args:
        model: On the CPU or a GPU, with FP32 parameters; it is run in evaluation mode.
        example_inputs: As of `check_adapter`; None: random images.
        shape: Of the random images; None: the first of `SHAPES` that the model takes.

    Returns:
        What was seen, printable, and the adapter, which `check_adapter` was asked about.

    Raises:
        InputError: the model takes none of the random images.
    """
    training = {module: module.training for module in model.modules()}
    try:
        model.eval()
        inputs, watch = _run(model, example_inputs, shape)
        sites, adapter, report = _adapter(model, inputs, watch)
    finally:
        for module, was in training.items():
            module.training = was
    return Inspection(
        type(model).__name__, tuple(watch.given), tuple(watch.candidates.values()), tuple(watch.saw_images.values()), watch.eager(model),
        tuple(sites), adapter, report,
    )  # fmt: skip


@dataclass
class _Watch:
    """What one forward shows."""

    given: list[str] = field(default_factory=list)
    candidates: dict[str, Candidate] = field(default_factory=dict)
    saw_images: dict[str, str] = field(default_factory=dict)
    convolutions: dict[str, tuple[tuple[int, int], tuple[int, ...]]] = field(default_factory=dict)
    sizes: list[tuple[int, ...]] = field(default_factory=list)
    stack: list[str] = field(default_factory=list)
    in_call: dict[str, int] = field(default_factory=dict)

    @contextlib.contextmanager
    def over(self, model: nn.Module) -> Iterator[None]:
        """Watch what runs inside the context."""
        handles = []
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(self._enters(name, module), with_kwargs=True))
            handles.append(module.register_forward_hook(self._leaves, always_call=True))
        try:
            with _Calls(self, dict(model.named_modules())):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _enters(self, name: str, module: nn.Module) -> Callable[..., None]:
        def enter(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.stack.append(name)
            self.in_call[name] = 0
            tensors = list(_tensors((args, kwargs)))
            if not name:
                self.given = [str(list(t.shape)) for t in tensors]
                self.sizes = [tuple(t.shape) for t in tensors if _is_image(t)]
            images = (t for t in tensors if _is_image(t) and (not self.sizes or any(t.shape[-2:] == size[-2:] for size in self.sizes)))
            if not isinstance(module, nn.Identity) and (image := next(images, None)) is not None:
                patch = (
                    f", patches of {tuple(module.stride)}" if isinstance(module, nn.Conv2d) and module.kernel_size == module.stride else ""
                )
                self.saw_images.setdefault(name, f"{name or '(the model)'}: {list(image.shape)} ({type(module).__name__}{patch})")
                if patch:
                    stride: Any = module.stride
                    self.convolutions.setdefault(name, ((stride[0], stride[1]), tuple(image.shape)))

        return enter

    def _leaves(self, *_: Any) -> None:
        self.stack.pop()

    def eager(self, model: nn.Module) -> tuple[str, ...]:
        """Modules with Linears as of attention that called none."""
        found = []
        for name, module in model.named_modules():
            linears = {n: m for n, m in module.named_children() if isinstance(m, nn.Linear)}
            fused = any(m.out_features == 3 * m.in_features for m in linears.values()) and len(linears) >= 2
            if fused and name in self.in_call and not any(c == name or c.startswith(f"{name}.") for c in self.candidates):
                found.append(name)
        return tuple(found)


class _Calls(TorchFunctionMode):
    """Takes note of calls of attention, under the module that runs."""

    def __init__(self, watch: _Watch, modules: dict[str, nn.Module]) -> None:
        super().__init__()
        self.watch, self.modules = watch, modules

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and self.watch.stack:
            self._see(*args, **kwargs)
        return func(*args, **kwargs)

    def _see(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False,
             scale: float | None = None, enable_gqa: bool = False) -> None:  # fmt: skip
        watch, name = self.watch, self.watch.stack[-1]
        watch.in_call[name] += 1
        asked = {"an attention mask": attn_mask is not None, "causal order": is_causal, "dropout of attention weights": dropout_p > 0}
        asked["grouped queries"] = query.shape[:-2] != key.shape[:-2]
        module = self.modules[name]
        found = watch.candidates.setdefault(
            name,
            Candidate(name, type(module).__name__, tuple(query.shape), key.shape[-2], linears=_linears(module), others=_others(module)),
        )
        found.calls = max(found.calls, watch.in_call[name])
        found.asks = tuple(dict.fromkeys((*found.asks, *(what for what, wanted in asked.items() if wanted))))


def _run(model: nn.Module, example_inputs: Any, shape: Sequence[int] | None) -> tuple[Any, _Watch]:
    """The inputs, and what a forward on them shows."""
    parameter = next(model.parameters(), torch.zeros((), device="cpu"))
    given = [example_inputs] if example_inputs is not None else []
    for random in () if given else [tuple(shape)] if shape is not None else SHAPES:
        images = torch.rand(random, generator=torch.Generator("cpu").manual_seed(0), device="cpu").to(parameter.device, parameter.dtype)
        given.append((images,))
    failures = []
    for inputs in given:
        watch = _Watch()
        try:
            with torch.random.fork_rng(devices=[]), torch.no_grad(), watch.over(model):
                if callable(inputs):
                    inputs(model)
                elif isinstance(inputs, dict):
                    model(**inputs)
                else:
                    model(*inputs if isinstance(inputs, tuple) else (inputs,))
        except Exception as error:  # whatever the model raises
            failures.append(f"{watch.given or 'nothing'}: {short(error, 120)}")
        else:
            return inputs, watch
    raise InputError(
        f"{type(model).__name__} does not run on {'; on '.join(failures)}. Let the factory return a pair (model, inputs), "
        "or give the shape of its images"
    )


def _adapter(model: nn.Module, inputs: Any, watch: _Watch) -> tuple[list[AttentionSite], str, AdapterReport | str]:
    """The sites, the adapter's code, and what `check_adapter` says of it: the first of several ways that passes, or the last."""
    _try(model, inputs, watch)
    usable = [c for c in watch.candidates.values() if c.refused is None]
    if not usable:
        return [], "", ""
    first: tuple[list[AttentionSite], str, AdapterReport | str] | None = None
    for described, place in itertools.product((True, False), ("special_tokens", "trailing_tokens", "sequence_tokens", "")):
        sites = [_site(model, c, watch, described, place) for c in usable]
        code = adapter_code(model, sites)
        if first is not None and code == first[1]:
            continue
        scopes: tuple[Scope, ...] = tuple(dict.fromkeys(site.scope for site in sites))
        try:
            written: dict[str, Any] = {}
            exec(compile(code, "<adapter>", "exec"), written)
            return sites, code, check_adapter(model, inputs, sites=written["lite3r_attention_sites"](model), scopes=scopes)
        except Lite3RError as error:
            found = sites, code, f"failed: {error}"
            if "too small to drop anything" in str(error):
                return found
            first = first or found
    assert first is not None
    return first


def _try(model: nn.Module, inputs: Any, watch: _Watch) -> None:
    """Run the candidates as sites, dense and without layouts, and note which are described wrongly by their Linears or left to the host."""
    usable = {c.fqn: c for c in watch.candidates.values() if c.refused is None}
    for described in (True, False) if usable else ():
        sites = [dataclasses.replace(_site(model, c, watch, True, ""), tokens=None) for c in usable.values()]
        scopes: tuple[Scope, ...] = tuple(dict.fromkeys(site.scope for site in sites))
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.no_grad():
            warnings.simplefilter("ignore", SlowPathWarning)  # what it says is noted
            apply_lite3r(model, TEST_CONFIG, sites=sites, keep_ratio=1.0, scopes=scopes)
            try:
                call_model(model, inputs)
                modules = lite3r_modules(model)  # by all names that they have
                for fqn, module in ((fqn, modules[fqn]) for fqn in usable if fqn in modules):
                    if described:  # which does not fit where it takes other arguments, either
                        usable[fqn].routed = fqn in module.state.routed or module.calls.host > 0
                    else:
                        usable[fqn].left = (module.calls.reason or "the model's own code runs") if module.calls.host else ""
            finally:
                remove_lite3r(model)


def _site(model: nn.Module, candidate: Candidate, watch: _Watch, described: bool, place: str) -> AttentionSite:
    batch, heads, tokens, dim = candidate.shape
    projections = (described and not candidate.routed and _projections(model.get_submodule(candidate.fqn), heads, dim)) or Routed(heads)
    scope, source = _layout(batch, tokens, watch, place)
    return AttentionSite(candidate.fqn, scope, dim, projections, source)


def _projections(module: nn.Module, heads: int, dim: int) -> Projections | None:
    """`FusedQKV` or `SeparateQKV` where the Linears inside are those, by their features; whether it is right, a forward tells."""
    children = dict(module.named_children())
    linears = {name: child for name, child in children.items() if isinstance(child, nn.Linear)}
    norms = {key: key for key in ("q_norm", "k_norm") if key in children}
    drops = {
        key: name for key, name in (("attn_drop", "attn_drop"), ("out_drop", "proj_drop")) if isinstance(children.get(name), nn.Dropout)
    }
    options: dict[str, Any] = {**norms, **drops}
    width = heads * dim
    if next(module.parameters(recurse=False), None) is not None:
        return None
    if [linear.out_features for linear in linears.values()][:1] == [3 * width] and len(linears) == 2:
        qkv, out = linears
        return FusedQKV(heads, qkv, out, **options)
    if len(linears) == 4 and all(linear.out_features == width for linear in list(linears.values())[:3]):
        q, k, v, out = linears
        return SeparateQKV(heads, q, k, v, out, **options)
    return None


def _layout(batch: int, tokens: int, watch: _Watch, place: str) -> tuple[Scope, TokenSource | None]:
    """The scope, and the layout with the tokens that are no patches at a place, if images tell how many patches there are."""
    if not watch.convolutions:
        return "global", None
    name, (patch, shape) = next(iter(watch.convolutions.items()))
    patches = (shape[-2] // patch[0]) * (shape[-1] // patch[1])
    images = shape[0] if len(shape) > 3 else 1
    views = max(1, images // batch)
    scope: Scope = "global" if views > 1 else "frame"
    rest = tokens - views * patches
    if rest < 0 or not place:
        return scope, None
    if place == "sequence_tokens":
        return scope, TokenSource(name, patch, sequence_tokens=rest)
    if rest % views:
        return scope, None
    given: dict[str, Any] = {place: rest // views}
    return scope, TokenSource(name, patch, **given)


def adapter_code(model: nn.Module, sites: Sequence[AttentionSite]) -> str:
    """An adapter that names `sites` of `model`, as code: modules of one pattern in one loop."""
    sources = list(dict.fromkeys(site.tokens for site in sites if isinstance(site.tokens, TokenSource)))
    names = sorted({type(site.projections).__name__ for site in sites} | ({"TokenSource"} if sources else set()) | {"AttentionSite"})
    needed = list(dict.fromkeys(name.partition(".")[0] for name in (*(s.fqn for s in sites), *(s.image_module for s in sources))))
    lines = [f"from lite3r_plugin import {', '.join(names)}, hookimpl", "", "", "@hookimpl", "def lite3r_attention_sites(model):"]
    lines += [f'    """Sites of {type(model).__name__}."""', "    sites = []", "    for name, module in model.named_modules():"]
    lines += [
        f"        if all(hasattr(module, part) for part in ({', '.join(map(_text, needed))},)):",
        '            dot = f"{name}." if name else ""',
    ]
    for i, source in enumerate(sources):
        module_name = f'f"{{dot}}{source.image_module}"'
        lines.append(f"            {_variable(i, sources)} = {_call(source, module_name)}")
    for pattern, numbers, site in _loops(model, sites):
        tokens = f", {_variable(sources.index(site.tokens), sources)}" if isinstance(site.tokens, TokenSource) else ""
        rest = f'"{site.scope}", {site.head_dim}, {_call(site.projections)}{tokens}'
        if numbers is None:
            lines.append(f'            sites.append(AttentionSite(f"{{dot}}{pattern}", {rest}))')
        else:
            lines.append(f"            for i in {numbers}:")
            lines.append(f'                sites.append(AttentionSite(f"{{dot}}{pattern}", {rest}))')
    return "\n".join((*lines, "    return sites or None", ""))


def _variable(index: int, sources: Sequence[TokenSource]) -> str:
    return "tokens" if len(sources) == 1 else f"tokens_{index + 1}"


def _call(value: Any, first: str | None = None) -> str:
    """A dataclass as code, without fields that have their defaults; `first` is the code of its first field."""
    said = []
    for place, item in enumerate(dataclasses.fields(value)):
        given = getattr(value, item.name)
        if place == 0 and (first is not None or given != item.default):
            said.append(first or _text(given))
        elif given != item.default:
            said.append(f"{item.name}={_text(given)}")
    return f"{type(value).__name__}({', '.join(said)})"


def _text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, str) else repr(value)


def _loops(model: nn.Module, sites: Sequence[AttentionSite]) -> Iterator[tuple[str, str | None, AttentionSite]]:
    """Sites that differ in one number of their name alone: the pattern, the numbers as code (None where there is one), one of them."""
    groups: dict[Any, list[tuple[int, AttentionSite]]] = {}
    for site in sites:
        parts = re.split(r"(?<=\.)(\d+)(?=\.|$)", site.fqn)
        numbered = len(parts) == 3
        key = (parts[0], parts[2]) if numbered else (site.fqn, None)
        groups.setdefault((key, site.scope, site.head_dim, site.projections, site.tokens), []).append(
            (int(parts[1]) if numbered else 0, site)
        )
    for (key, *_), found in groups.items():
        if key[1] is None:
            yield key[0], None, found[0][1]
            continue
        numbers = [number for number, _ in found]
        steps = {b - a for a, b in itertools.pairwise(numbers)}
        step = steps.pop() if len(steps) == 1 else 0
        code = repr(tuple(numbers))
        around = key[0].rstrip(".")
        if isinstance(blocks := model.get_submodule(around), (nn.ModuleList, nn.Sequential)) and numbers == list(range(len(blocks))):
            code = f"range(len(module.{around}))" if around.isidentifier() else f"range({len(blocks)})"
        elif step > 0:
            code = f"range({numbers[0]}, {numbers[-1] + 1}" + (f", {step})" if step > 1 else ")")
        yield f"{key[0]}{{i}}{key[1]}", code, found[0][1]


def _pattern(name: str) -> str:
    """A name with its numbers left open."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)", "{i}", name)


def _linears(module: nn.Module) -> tuple[str, ...]:
    return tuple(f"{name}: {m.in_features} to {m.out_features}" for name, m in module.named_modules() if isinstance(m, nn.Linear))


def _others(module: nn.Module) -> tuple[str, ...]:
    kinds = [
        f"{name} ({type(m).__name__})"
        for name, m in module.named_children()
        if not isinstance(m, (nn.Linear, nn.Identity)) and not (isinstance(m, nn.Dropout) and not m.p)
    ]
    return (*kinds, *(f"{name} {list(p.shape)}" for name, p in module.named_parameters(recurse=False)))


def _is_image(value: Tensor) -> bool:
    return value.is_floating_point() and value.dim() >= 3 and value.shape[-3] == CHANNELS and min(value.shape[-2:]) > CHANNELS


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
