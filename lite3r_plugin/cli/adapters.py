"""`lite3r adapters`: what is installed."""

from __future__ import annotations


def adapters() -> None:
    """List the installed model adapters, and the models that the other commands can build."""
    from rich.table import Table
    from rich.text import Text

    from ..adapter.plugins import list_adapters, model_entries
    from .show import console

    table = Table(title="Model adapters: what apply_lite3r recognises", title_justify="left", title_style="bold")
    for header in ("adapter", "about", "from"):
        table.add_column(header, overflow="fold")
    for info in list_adapters():
        table.add_row(Text(info.name), Text(info.summary), Text(f"{info.distribution} {info.version}".strip()))
    console.print(table)

    table = Table(title="Models: what other commands take as --model", title_justify="left", title_style="bold")
    for header in ("model", "about", "weights", "library"):
        table.add_column(header, overflow="fold")
    for name, entry in model_entries().items():
        library = "installed" if entry.available else f"missing: {entry.install}"
        table.add_row(Text(name), Text(entry.summary), Text(entry.default_weights or ""), Text(library))
    console.print(table)
