"""Writes the README's tables from stored reports: ``python benchmarks/readme_table.py``.

A table stands between ``<!-- table: FILE -->`` and ``<!-- end of table -->``, where FILE is a report of `lite3r bench`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
TABLE = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
HEADER = (
    "views",
    "stock",
    "Lite3R on stock",
    "gain",
    "strong dense",
    "Lite3R on strong",
    "gain",
    "gain on stock",
    "peak memory",
    "density",
)
FP8_HEADER = ("dense in FP8", "Lite3R in FP8", "gain", "gain on stock", "peak memory in FP8")  # where the report has them


def render(report: dict[str, Any]) -> str:
    """The table of a report, in Markdown, with its conditions."""
    cells = {(cell["views"], cell["variant"]): cell for cell in report["cells"]}
    measured = {variant for (_, variant), cell in cells.items() if _measured(cell) is not None}
    dense_fp8, fp8 = "strong-fp8" in measured, "lite3r-fp8" in measured
    header = HEADER + FP8_HEADER[not dense_fp8 :] if fp8 else HEADER
    lines = ["| " + " | ".join(header) + " |", "|" + " ---: |" * len(header)]
    for views in sorted({views for views, _ in cells}):
        stock, one_line, strong, both = (cells.get((views, name)) for name in ("stock", "lite3r", "strong", "lite3r-strong"))
        row = (
            str(views), _time(stock), _time(one_line), _ratio(one_line, "stock"),
            _time(strong), _time(both), _ratio(both, "strong"), _ratio(both, "stock"),
            f"{_memory(stock)} → {_memory(both)}", _density(both),
        )  # fmt: skip
        if fp8:
            both = cells.get((views, "lite3r-fp8"))
            row += (_time(cells.get((views, "strong-fp8"))),) if dense_fp8 else ()
            row += (_time(both), _ratio(both, "strong"), _ratio(both, "stock"), _memory(both))
        lines.append("| " + " | ".join(row) + " |")
    c = report["conditions"]
    options = ", ".join(f"`{name}={value!r}`" for name, value in c["lite3r_options"].items())
    lines += [
        "",
        f"{c['summary'].partition(' (')[0]}, {c['resolution']} × {c['resolution']} pixels, {options}, on one {c['device']}, "
        f"torch {c['torch']}, triton {c['triton']}, {c['date'][:10]}, "
        f"commit {c['commit'][:7]}. Median milliseconds of a whole forward. Weights: {c['weights']}.",
        "",
    ]
    return "\n".join(lines)


def update(text: str) -> str:
    """`text` with every table rendered anew from its file."""
    return TABLE.sub(lambda match: match[1] + render(json.loads((ROOT / match[2]).read_text())) + match[3], text)


def _measured(cell: dict[str, Any] | None) -> dict[str, Any] | None:
    return cell["candidates"][cell["best"]] if cell is not None and cell["best"] is not None else None


def _time(cell: dict[str, Any] | None) -> str:
    measured = _measured(cell)
    if measured is not None:
        return f"{measured['median_ms']:,.0f} ms"
    return "" if cell is None else {"oom": "out of memory", "skipped": "–"}.get(cell["status"], cell["status"])


def _memory(cell: dict[str, Any] | None) -> str:
    measured = _measured(cell)
    return f"{measured['peak_bytes'] / 2**30:.1f} GiB" if measured is not None and measured["peak_bytes"] else "-"


def _ratio(cell: dict[str, Any] | None, over: str) -> str:
    value = None if cell is None else cell[f"speedup_over_{over}"]
    return "" if value is None else f"{value:.2f} ×"


def _density(cell: dict[str, Any] | None) -> str:
    value = None if cell is None else cell["density"]
    return "" if value is None else "dense" if value == 1 else f"{value:.2f}"


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(update(readme.read_text()))
