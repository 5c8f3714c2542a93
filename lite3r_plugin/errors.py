"""Every error that the package raises on purpose. All derive from `Lite3RError`; each message says what to do."""


class Lite3RError(Exception):
    """Base of all errors of this package.

    Examples:
        >>> try:
        ...     apply_lite3r(torch.nn.Linear(2, 2))
        ... except Lite3RError as error:
        ...     reason = str(error)  # what is wrong, and what to do
    """


class ConfigError(Lite3RError, ValueError):
    """A field of `Lite3RConfig` has a value that it does not take."""


class ModelTypeError(Lite3RError, TypeError):
    """What was given as the model is no `torch.nn.Module`."""


class WeightsError(Lite3RError):
    """Weights cannot be used as they are: not finite, made of others, without values, sharded, quantised or replicated."""


class UnknownModelError(Lite3RError):
    """No installed model adapter recognises the model."""


class NoSitesError(Lite3RError):
    """The model is known, but nothing in it would change with this configuration."""


class AdapterError(Lite3RError):
    """A model adapter described a module that does not exist or does not fit its description."""


class AlreadyAppliedError(Lite3RError):
    """`apply_lite3r` was called on a model that carries Lite3R already."""


class NotAppliedError(Lite3RError):
    """The model does not carry Lite3R."""


class ConvertedError(Lite3RError):
    """The model holds FP8 weights: what was asked needs the original ones, which are gone."""


class UnsupportedAttentionError(Lite3RError):
    """The host asked for attention that has no sparse-linear form: a mask, causal order, dropout."""


class LayoutError(Lite3RError):
    """The tokens at an attention site are not laid out as its adapter says, or it cannot be told how they are."""


class BackendError(Lite3RError):
    """The requested backend cannot run these tensors."""


class CheckpointError(Lite3RError):
    """A Lite3R checkpoint is damaged, of another version, or belongs to another model."""


class MemoryLimitError(Lite3RError):
    """A forward would hold more memory than `max_memory` allows, however it is cut."""


class TrainingError(Lite3RError):
    """Training cannot go on: the loss is not finite, or what is to learn gets no gradient."""


class ParallelError(Lite3RError):
    """Several processes cannot run this model on one scene, or one of them failed while they did."""


class InputError(Lite3RError, ValueError):
    """User input outside the model, such as an image folder or a weights file, cannot be used."""


class HubError(InputError):
    """The Hugging Face Hub does not give, or does not take, what was asked for."""


def plural(count: int, one: str, many: str | None = None) -> str:
    """``1 site``, ``2 sites``: `count` and the word in its number; `many` where that is not `one` with an s."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def short(error: BaseException, limit: int = 300) -> str:
    """The type and the first `limit` characters of the message of `error`, in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:limit]}{'...' if len(text) > limit else ''}"


def shown(value: object, limit: int = 100) -> str:
    """What was given, for a message: its `repr`, of at most `limit` characters and in one line; its type where it has none."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # an integer of thousands of digits, a foreign class
        return f"{type(value).__name__} that cannot be printed"
    return text if len(text) <= limit else f"{text[:limit]}..."
