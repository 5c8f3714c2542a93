"""`check_adapter`: whether an adapter describes its model rightly, by running the model in all the ways that Lite3R would."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import io
import pickle
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter.sites import AttentionSite
from ..apply.lookup import lite3r_modules
from ..apply.verbs import apply_lite3r, lite3r_disabled, remove_lite3r
from ..attention.inputs import AttentionInputs
from ..attention.module import SparseLinearAttention
from ..config import Lite3RConfig
from ..errors import AdapterError, AlreadyAppliedError
from .blocks import check_blocks
from .layouts import check_layouts
from .outputs import expect_equal, largest_difference, named_tensors

TEST_CONFIG = Lite3RConfig(keep_ratio=0.1, dense_below=0, pin="special", attention_backend="naive", block_q=16, block_k=16)
"""Blocks so small that a test image has many, everything sparse, and only special tokens exempt from it."""


@dataclasses.dataclass(frozen=True)
class AdapterReport:
    """What `check_adapter` saw.

    Attributes:
        adapter: Name of the adapter that answered.
        scopes: Number of sites that ran sparse, by scope.
        tokens: Tokens of the longest sequence at a sparse site.
        dense_error: Largest difference to the dense model at ``keep_ratio=1`` (as `check_adapter` defines it).
        sparse_change: Largest difference to the dense model at the small keep ratio.
        pickled: False when pickling was not checked, because the dense model cannot be pickled either.
        unchecked: What else could not be checked, in words.
    """

    adapter: str
    scopes: Mapping[str, int]
    tokens: int
    dense_error: float
    sparse_change: float
    pickled: bool
    unchecked: tuple[str, ...] = ()

    def __str__(self) -> str:
        sites = " + ".join(f"{count} {scope}" for scope, count in sorted(self.scopes.items()))
        return (
            f"adapter {self.adapter!r} is fine: {sites} sites of up to {self.tokens} tokens, error {self.dense_error:.1e} "
            f"at keep_ratio=1, change {self.sparse_change:.1e} when sparse"
            + ("" if self.pickled else " (the dense model cannot be pickled)")
            + "".join(f"; {note}" for note in self.unchecked)
        )


def check_adapter(
    model: nn.Module,
    example_inputs: tuple[Any, ...] | Mapping[str, Any] | Callable[[nn.Module], Any],
    *,
    atol: float = 1e-5,
    sites: Sequence[AttentionSite] | None = None,
    **apply_options: Any,
) -> AdapterReport:
    """Check that an installed adapter, or `sites`, describe `model` rightly; the model is left as it was.

    Checked: an adapter answers and its sites exist; ``keep_ratio=1`` equals the dense model; `lite3r_disabled` and
    `remove_lite3r` are bit-exact; blocks do what is said of them; a small keep ratio runs every sparse site sparse and
    changes the output; deepcopy, pickle and state dict give the same output again; the token layout fits the images: a few pixels are
    changed here and there, and the token that changes most must be the one that the layout says.

    Args:
        model: In eval mode, with FP32 (or FP64) parameters. Random weights and few, narrow layers are enough.
        example_inputs: Positional arguments as a tuple, keyword arguments as a mapping, or a function that runs the
            model it is given. Two or more views of a size that is no square find the most mistakes; of several sizes where the model
            takes them.
        atol: Largest difference to the dense model at ``keep_ratio=1``, absolute, or relative to the largest entry of
            an output tensor that has entries above 1.
        sites: What an adapter would say of the model, in its place.
        **apply_options: Fields of `Lite3RConfig` on top of `TEST_CONFIG`, such as ``scopes=("frame",)``.

    Returns:
        What was seen, printable.

    Raises:
        AdapterError: a check failed; the message says which, where and what to look at.
        Lite3RError: the package itself refused, as it would in use: `UnknownModelError` when no adapter knows the
            model, `LayoutError` when ``patch_size`` or ``special_tokens`` is wrong, and so on.
    """
    config = TEST_CONFIG.replace(**apply_options)
    _check_arguments(model, config)
    before = _snapshot(model)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            return _check(model, example_inputs, atol, config, sites)
        finally:
            if lite3r_modules(model):
                remove_lite3r(model)
            _compare_snapshots(before, _snapshot(model))


def _check(
    model: nn.Module, example_inputs: Any, atol: float, config: Lite3RConfig, given: Sequence[AttentionSite] | None
) -> AdapterReport:
    def run(model: nn.Module) -> dict[str, Tensor]:
        torch.manual_seed(0)  # for models that draw numbers
        return named_tensors(call_model(model, example_inputs))

    dense = run(model)
    if not dense:
        raise AdapterError("the model's output holds no tensor, so there is nothing to compare; pass a function that returns one")
    expect_equal(dense, run(model), "the dense model gives two different outputs for the same input: make it deterministic first")
    pickled = _can_pickle(model)

    apply_lite3r(model, config, sites=given, keep_ratio=1.0)
    sites = _sparse_sites(model)
    _expect_described(model)
    error, where = largest_difference(dense, run(model))
    _expect_calls(sites, "dense")
    if not error <= atol:
        raise AdapterError(
            f"keep_ratio=1 differs from the dense model by {error:.2e} at output{where} (atol={atol:g}): the projections do not describe "
            "the attention module. Look at num_heads, the norms, the rotary base and its positions, and what else its forward does; "
            "Routed() runs the host's own forward"
        )
    unchecked = check_layouts(model, sites, run)
    with lite3r_disabled(model):
        expect_equal(dense, run(model), "lite3r_disabled is not the dense model bit for bit")
    remove_lite3r(model)
    expect_equal(dense, run(model), "remove_lite3r did not bring the dense model back bit for bit")
    check_blocks(model, next(iter(sites.values())).state.sites, run, atol)

    apply_lite3r(model, config, sites=given)
    adapter = next(iter(lite3r_modules(model).values())).state.adapter
    sites = _sparse_sites(model)
    with _token_counts(sites) as tokens:
        sparse = run(model)
    _expect_calls(sites, "sparse")
    _expect_dropped(sites, tokens, config)
    change, _ = largest_difference(dense, sparse)
    if not change > error:
        raise AdapterError(
            f"keep_ratio={config.keep_ratio} ran {len(sites)} sites sparse but changed the output by {change:.1e} only, no more than "
            f"rounding: the model does not use what they return, or its weights are so small (layer scales, initial values) that it "
            "makes no difference. Give the example larger random weights, or return hidden states"
        )
    expect_equal(sparse, run(copy.deepcopy(model)), "a deep copy gives another output")
    if pickled:
        expect_equal(sparse, run(pickle.loads(pickle.dumps(model))), "a pickled copy gives another output")
    _check_state_dict(model, run)
    with lite3r_disabled(model):
        expect_equal(dense, run(model), "lite3r_disabled is not the dense model bit for bit")
    remove_lite3r(model)
    expect_equal(dense, run(model), "remove_lite3r did not bring the dense model back bit for bit")
    scopes = Counter(site.site.scope for site in sites.values())
    return AdapterReport(adapter, dict(scopes), max(tokens.values()), error, change, pickled, tuple(unchecked))


def _check_arguments(model: nn.Module, config: Lite3RConfig) -> None:
    if lite3r_modules(model):
        raise AlreadyAppliedError("check_adapter takes the dense model; call remove_lite3r(model) first")
    if config.keep_ratio == 1:
        raise AdapterError("keep_ratio=1 drops nothing; leave it out or pass less (equality at 1 is checked anyway)")
    if config.dense_below is None:
        raise AdapterError("dense_below=None would leave a small example dense; leave it out")
    training = [name for name, module in model.named_modules() if module.training]
    if training:
        raise AdapterError(f"{training[0] or 'the model'} is in training mode; call model.eval() first")
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype not in (torch.float32, torch.float64):
            raise AdapterError(f"the parameter {name!r} is {parameter.dtype}; rounding would hide mistakes, call model.float() first")


def _check_state_dict(model: nn.Module, run: Callable[[nn.Module], dict[str, Tensor]]) -> None:
    """Save, spoil and load: through a file in between, with a trained (random) linear branch."""
    branches = [site.proj_lin.weight for site in _sparse_sites(model).values() if hasattr(site, "proj_lin")]
    for weight in branches:
        nn.init.normal_(weight, std=0.1)
    expected = run(model)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    for weight in branches:
        nn.init.ones_(weight)
    file.seek(0)
    model.load_state_dict(torch.load(file, weights_only=True))
    expect_equal(expected, run(model), "the model gives another output after its state dict was saved and loaded")


def call_model(model: nn.Module, example_inputs: Any) -> Any:
    """What `model` returns for inputs as `check_adapter` takes them."""
    if callable(example_inputs):
        return example_inputs(model)
    inputs = copy.deepcopy(example_inputs)
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def _sparse_sites(model: nn.Module) -> dict[str, SparseLinearAttention]:
    return {fqn: module for fqn, module in lite3r_modules(model).items() if module.sparse}


def _expect_described(model: nn.Module) -> None:
    """No site failed its trial."""
    state = next(iter(lite3r_modules(model).values())).state
    for fqn, reason in state.routed.items():
        raise AdapterError(
            f"site {fqn!r}: the projections do not describe the attention module: {reason}. Look at num_heads, the norms, the rotary base "
            "and its positions, and what else its forward does; Routed() runs the host's own forward"
        )


def _expect_calls(sites: Mapping[str, SparseLinearAttention], kind: str) -> None:
    """Every site was called, and only as `kind`."""
    calls = {fqn: {name: getattr(site.calls, name) for name in ("sparse", "dense", "host", "disabled")} for fqn, site in sites.items()}
    unused = [fqn for fqn, counts in calls.items() if not any(counts.values())]
    if unused:
        raise AdapterError(
            f"{len(unused)} of {len(sites)} sites never ran, such as {unused[0]!r}: the adapter names modules that this forward "
            "does not call"
        )
    for fqn, counts in calls.items():
        if counts[kind] == 0 or sum(counts.values()) != counts[kind]:
            reason = sites[fqn].calls.reason or "look at what runs in between"
            raise AdapterError(f"site {fqn!r} was to run {kind} but ran {counts}: {reason}")


@contextlib.contextmanager
def _token_counts(sites: Mapping[str, SparseLinearAttention]) -> Iterator[dict[str, int]]:
    """Tokens in the longest sequence of each site, filled while the context is open."""
    counts: dict[str, int] = {}

    def count(fqn: str, _: SparseLinearAttention, inputs: AttentionInputs, out: Tensor) -> None:
        counts[fqn] = max(counts.get(fqn, 0), inputs.v.shape[-2])

    with contextlib.ExitStack() as stack:
        for fqn, site in sites.items():
            stack.enter_context(site.observe(functools.partial(count, fqn)))
        yield counts


def _expect_dropped(sites: Mapping[str, SparseLinearAttention], tokens: Mapping[str, int], config: Lite3RConfig) -> None:
    """Some site left key blocks out."""
    if any(site.calls.density is not None and site.calls.density < 1 for site in sites.values()):
        return
    fqn = max(tokens, key=tokens.__getitem__)
    raise AdapterError(
        f"the example is too small to drop anything: {tokens[fqn]} tokens at {fqn!r} are {-(-tokens[fqn] // config.block_k)} key blocks of "
        f"{config.block_k}, all of which are kept. Use larger images, more views or smaller blocks"
    )


def _can_pickle(model: nn.Module) -> bool:
    try:
        pickle.dumps(model)
    except (pickle.PicklingError, AttributeError, TypeError, NotImplementedError, RuntimeError):
        return False
    return True


def _snapshot(model: nn.Module) -> dict[str, Any]:
    """What `check_adapter` must leave alone, under the words of its message."""
    modules = list(model.named_modules(remove_duplicate=False))
    return {
        "modules": {name: id(module) for name, module in modules},
        "training flags": {name: module.training for name, module in modules},
        "forward hooks": {name: len(module._forward_hooks) + len(module._forward_pre_hooks) for name, module in modules},
        "parameters": {name: id(value) for name, value in model.named_parameters(remove_duplicate=False)},
        "state_dict keys": list(model.state_dict()),
    }


def _compare_snapshots(before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    for what, was in before.items():
        if was != after[what]:
            raise AdapterError(f"the {what} of the model are not the same as before")
