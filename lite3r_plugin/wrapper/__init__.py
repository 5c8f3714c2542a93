"""Modules that take the place of a host's, and changes of a model that are all made or none."""

from .changes import Changes
from .host import TABLES, HostWrapper, host_of, replace_modules, share_hooks
from .reading import argument_names, forward_parameters, has_forward_hooks, is_plain_tensor, may_be_read, must_be_called

__all__ = [
    "TABLES",
    "Changes",
    "HostWrapper",
    "argument_names",
    "forward_parameters",
    "has_forward_hooks",
    "host_of",
    "is_plain_tensor",
    "may_be_read",
    "must_be_called",
    "replace_modules",
    "share_hooks",
]
