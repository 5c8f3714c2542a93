"""One HTML file that reports measurements: plots, tables, conditions and how to repeat them; no server, no network, no script."""

from __future__ import annotations

import html
import io
from base64 import b64encode
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ....files import to_json, write_atomically
from ..reconstruction import Facts

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

TITLE, BODY = "<!--TITLE-->", "<!--BODY-->"


@dataclass(frozen=True)
class Report:
    """What a page reports.

    Attributes:
        title: One line.
        sentences: What is to be known first.
        figures: Plots by what they show.
        tables: Numbers.
        lines: Commands and programs that repeat the measurement.
        conditions: Under which it was made, as JSON-serialisable data.
    """

    title: str
    sentences: tuple[str, ...] = ()
    figures: Mapping[str, Figure] = field(default_factory=dict)
    tables: tuple[Facts, ...] = ()
    lines: str = ""
    conditions: Mapping[str, Any] = field(default_factory=dict)


def save_report(path: Path, report: Report) -> None:
    """Write a report as one page. Raises `InputError` where the file cannot be written."""
    parts = [f"<h1>{_text(report.title)}</h1>", *(f"<p>{_text(sentence)}</p>" for sentence in report.sentences)]
    parts += ['<div class="plots">', *(_figure(what, figure) for what, figure in report.figures.items()), "</div>"]
    parts += [part for table in report.tables for part in _table(table)]
    if report.lines:
        parts += ["<h2>To repeat it</h2>", f"<pre>{_text(report.lines)}</pre>"]
    if report.conditions:
        rows = [(name, value if isinstance(value, str) else " ".join(to_json(value).split())) for name, value in report.conditions.items()]
        parts += ["<h2>Conditions</h2>", _grid((), rows, "conditions")]
    page = resources.files(__name__).joinpath("report.html").read_text(encoding="utf-8")
    write_atomically(path, page.replace(TITLE, _text(report.title)).replace(BODY, "\n".join(parts)))


def facts_of_table(table: Table) -> Facts:
    """A table for the terminal as facts."""
    columns = tuple(_plain(column.header) for column in table.columns)
    rows = zip(*([_plain(cell) for cell in column.cells] for column in table.columns), strict=True)
    notes = (_plain(table.caption),) if table.caption else ()
    return Facts(_plain(table.title or ""), columns, tuple(rows), notes)


def _table(table: Facts) -> Iterable[str]:
    yield f"<h2>{_text(table.title)}</h2>"
    yield _grid(table.columns, table.rows, "numbers" if any(map(_is_number, table.rows[0][1:] if table.rows else ())) else "")
    yield from (f"<p>{_text(note)}</p>" for note in table.notes)


def _grid(columns: Iterable[str], rows: Iterable[Iterable[str]], kind: str = "") -> str:
    head = "".join(f"<th>{_text(name)}</th>" for name in columns)
    body = "".join(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="wide"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _is_number(cell: str) -> bool:
    return cell[:1].isdecimal()


def _figure(what: str, figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return f'<figure><img alt="{_text(what)}" src="data:image/svg+xml;base64,{b64encode(buffer.getvalue()).decode()}"></figure>'


def _plain(cell: Any) -> str:
    """What is printed, without the markup."""
    from rich.text import Text

    return Text.from_markup(cell, emoji=False).plain if isinstance(cell, str) else str(cell)


def _text(text: str) -> str:
    return html.escape(text, quote=True)
