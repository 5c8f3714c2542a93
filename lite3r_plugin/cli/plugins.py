"""Commands that other packages add, by the hook `lite3r_commands`."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import typer
from rich.markup import render

from ..adapter.plugins import call, describe_adapter, implementations, skipping, warn


def plugin_commands(taken: Container[str]) -> dict[str, Any]:
    """The commands of all installed plugins by name, as typer makes them for click.

    A plugin that raises, exits, adds what cannot be shown, or asks for a name that is `taken` is named in an `AdapterWarning` and
    skipped; the others are unaffected.
    """
    commands: dict[str, Any] = {}
    for implementation in reversed(implementations("lite3r_commands")):
        found: dict[str, Any] = {}
        with skipping(implementation):
            found = _commands(implementation)
        for name, command in found.items():
            if name in taken or name in commands:
                plugin = describe_adapter(implementation.plugin_name)
                warn(f"the command {name!r} of the plugin {plugin} was skipped: there is another one of that name")
            else:
                commands[name] = command
    return commands


def _commands(implementation: Any) -> dict[str, Any]:
    app = typer.Typer()  # one for each plugin, so that none changes the commands of another, or adds half of its own
    call(implementation, app=app)
    if not app.registered_commands and not app.registered_groups:
        return {}
    commands = typer.main.get_group(app).commands
    for command in commands.values():
        render(command.help or "")  # the help of all commands would fail with it
    return dict(commands)
