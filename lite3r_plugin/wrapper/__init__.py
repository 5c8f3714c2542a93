"""Modules that take the place of a host's, and changes of a model that are all made or none."""

from .changes import Changes
from .holding import hold, switch_off
from .host import TABLES, HostWrapper, host_of, put_module, replace_modules, share_hooks
from .reading import (
    argument_defaults,
    argument_names,
    asked_for,
    by_name,
    calls_are_seen,
    forward_parameters,
    has_forward_hooks,
    is_plain_tensor,
    may_be_read,
    must_be_called,
)
from .rewritten import RewrittenMethod, RewrittenModule, was_exchanged
from .tuners import active_copy, around_and_itself, belongs_to_tuner, configs_of_tuners, is_lora, is_tuner_layer, keeps_copies, tuner_around

__all__ = [
    "TABLES",
    "Changes",
    "HostWrapper",
    "RewrittenMethod",
    "RewrittenModule",
    "active_copy",
    "argument_defaults",
    "argument_names",
    "around_and_itself",
    "asked_for",
    "belongs_to_tuner",
    "by_name",
    "calls_are_seen",
    "configs_of_tuners",
    "forward_parameters",
    "has_forward_hooks",
    "hold",
    "host_of",
    "is_lora",
    "is_plain_tensor",
    "is_tuner_layer",
    "keeps_copies",
    "may_be_read",
    "must_be_called",
    "put_module",
    "replace_modules",
    "share_hooks",
    "switch_off",
    "tuner_around",
    "was_exchanged",
]
