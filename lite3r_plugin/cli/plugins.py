"""Commands that other packages add, by the hook `lite3r_commands`."""

from __future__ import annotations

import warnings
from collections.abc import Container
from typing import Any

import typer

from ..adapter.plugins import AdapterWarning, get_manager


def plugin_commands(taken: Container[str]) -> dict[str, Any]:
    """The commands of all installed plugins by name, as typer makes them for click.

    A plugin that raises or asks for a name that is `taken` is named in an `AdapterWarning`; the others are unaffected.
    """
    commands: dict[str, Any] = {}
    for implementation in get_manager().hook.lite3r_commands.get_hookimpls():
        app = typer.Typer()  # one for each, so that none changes the commands of another, or adds half of its own
        try:
            implementation.function(app=app)
            found = typer.main.get_group(app).commands
        except Exception as error:
            warnings.warn(
                f"the commands of the plugin {implementation.plugin_name!r} were skipped: {error!r}", AdapterWarning, stacklevel=2
            )
            continue
        for name, command in found.items():
            if name in taken or name in commands:
                text = f"the command {name!r} of the plugin {implementation.plugin_name!r} was skipped: there is another one of that name"
                warnings.warn(text, AdapterWarning, stacklevel=2)
            else:
                commands[name] = command
    return commands
