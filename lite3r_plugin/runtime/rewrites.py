"""Exact rewrites of a model: compared with the host's own methods, and those that agree put in and taken out again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ..adapter.plugins import find_rewrites
from ..adapter.rewrites import ExactRewrite, Trial
from ..adapter.trials import require_equal, trial
from ..errors import AdapterError, Lite3RError, short
from ..wrapper import Changes, RewrittenMethod, RewrittenModule, replace_modules

Rewritten = RewrittenModule | RewrittenMethod


@dataclass(frozen=True, repr=False)
class Rewrites:
    """What is rewritten in a model, and what is not.

    Attributes:
        made: What each rewrite puts in, by its description.
        refused: Why a rewrite is left out, by its description.
    """

    made: Mapping[ExactRewrite, Rewritten]
    refused: Mapping[ExactRewrite, str]

    def put_in(self, changes: Changes, modules: dict[str, nn.Module]) -> None:
        """Put in what was made, into a model with these `modules`, which are kept up to date."""
        stand_ins = [made for made in self.made.values() if isinstance(made, RewrittenModule)]
        for made in self.made.values():
            if isinstance(made, RewrittenMethod):
                made.put_in(changes)
        replace_modules(changes, modules, {made.host: made for made in stand_ins})

    @property
    def done(self) -> tuple[str, ...]:
        """What is rewritten, in words."""
        return tuple(_words(self.made))

    @property
    def left(self) -> dict[str, str]:
        """What is left as it is, in words, with the reason."""
        reasons = dict.fromkeys(self.refused.values())
        return {words: why for why in reasons for words in _words(r for r, reason in self.refused.items() if reason == why)}


NO_REWRITES = Rewrites({}, {})


def plan_rewrites(
    model: nn.Module, modules: Mapping[str, nn.Module], wanted: Callable[[ExactRewrite], bool] = lambda rewrite: rewrite.keeps_dtype
) -> Rewrites | None:
    """Make the exact rewrites of `model` and compare each with the host's own method. Nothing in the model changes.

    What is rewritten already, is left as it is.

    Args:
        model: The model, to be asked for at the adapters.
        modules: Its modules by all their names.
        wanted: Which of them; by default those whose results have the host's dtypes.

    Returns:
        What can be put in; None where no adapter has rewrites for this model.
    """
    found = find_rewrites(model)
    if found is None:
        return None
    places = {(rewrite.fqn, rewrite.method, rewrite.kernels): rewrite for rewrite in filter(wanted, found)}
    made: dict[ExactRewrite, Rewritten] = {}
    refused: dict[ExactRewrite, str] = {}
    for rewrite in places.values():
        module = modules.get(rewrite.fqn)
        if isinstance(module, RewrittenModule):
            if rewrite.method == "forward" and not rewrite.kernels:
                continue
            module = module.host  # which calls the method
        if module is not None and isinstance(vars(module).get(rewrite.method), RewrittenMethod):
            continue
        try:
            made[rewrite] = _make(rewrite, module)
        except Exception as error:  # whatever a fork's own code raises
            refused[rewrite] = str(error) if isinstance(error, Lite3RError) else short(error)
    for rewrite in list(made):
        running = {other.fqn for other in made if other.method == "forward" and not other.kernels}
        if missing := next((fqn for fqn in rewrite.needs if fqn not in running), None):
            del made[rewrite]
            refused[rewrite] = f"the forward of {missing} is the host's own"
    return Rewrites(made, refused)


def take_out(changes: Changes, modules: dict[str, nn.Module], made: Sequence[Rewritten]) -> None:
    """Take out as much of what `Rewrites.put_in` put in as is there."""
    inside = set(modules.values())
    stand_ins = [item for item in made if isinstance(item, RewrittenModule) and item in inside]
    replace_modules(changes, modules, {item: item.release() for item in stand_ins})
    for item in reversed(made):  # what was put in last lies on what was put in before
        if isinstance(item, RewrittenMethod):
            item.take_out(changes)


def lies_outside(item: Rewritten, modules: Mapping[str, nn.Module]) -> bool:
    """Whether what was put in lies outside of these modules of a part of a model, or is that part: it cannot be taken out there."""
    if isinstance(item, RewrittenMethod):
        return all(module is not item.module and getattr(module, "host", None) is not item.module for module in modules.values())
    return modules[""] is item or not {item, item.host} & set(modules.values())


def _words(rewrites: Iterable[ExactRewrite]) -> Iterator[str]:
    """What each of them does, and of more than three that do the same, how many there are."""
    places: dict[str, list[str]] = {}
    for rewrite in rewrites:
        places.setdefault(rewrite.sentence, []).append(rewrite.fqn or "the model")
    for sentence, names in places.items():
        shown = names if len(names) <= 3 else [f"{names[0]} and {len(names) - 1} more"]
        yield from (f"{name}: {sentence}" for name in shown)


def _make(rewrite: ExactRewrite, module: nn.Module | None) -> Rewritten:
    """What is put in for `rewrite`. Raises, whatever the adapter's and the host's code may, where it cannot be."""
    if module is None:
        raise AdapterError("the model has no such module")
    if rewrite.method in vars(module):
        raise AdapterError(f"its {rewrite.method} was exchanged by somebody else, such as for CPU offload")
    made = rewrite.make(module)
    fits = isinstance(made, RewrittenMethod) and made.name == rewrite.method
    if not fits and not (isinstance(made, RewrittenModule) and rewrite.method == "forward" and rewrite.fqn):
        raise AdapterError(f"its adapter made a {type(made).__name__}, which cannot take the place of {rewrite.method}")
    if rewrite.trial is not None:
        with trial():
            _compare(rewrite, rewrite.trial(module))
    return made


def _compare(rewrite: ExactRewrite, trial: Trial) -> None:
    """Raise `AdapterError` with the reason unless the rewrite gives what the host's own method does."""
    rewritten = rewrite.make(trial.module)
    host = getattr(trial.module, rewrite.method)
    for inputs, named in zip(trial.inputs, trial.named or ({},) * len(trial.inputs), strict=True):
        own, copies = ([x.clone() if isinstance(x, Tensor) else x for x in inputs] for _ in range(2))
        require_equal(host(*own, **named), rewritten(*copies, **named), f"the host's own {rewrite.method}")
