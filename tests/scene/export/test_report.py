"""The page of measurements: whole, in one file, and nothing in it is taken for markup."""

from __future__ import annotations

from pathlib import Path

import pytest
from browser import browser_page
from matplotlib.figure import Figure
from reconstructions import EVIL
from rich.table import Table

from lite3r_plugin.errors import InputError
from lite3r_plugin.scene.export import Facts, Report, facts_of_table, save_report


def figure() -> Figure:
    made = Figure(figsize=(3, 2))
    made.subplots().plot([1, 2], [1, 4])
    return made


def test_page(tmp_path: Path) -> None:
    facts = Facts("numbers", ("variant", "ms"), (("stock " + EVIL, "2.0"), ("lite3r", "1.0")), ("a note",))
    conditions = {"seed": 0, "torch": "2.9"}
    report = Report("a report " + EVIL, ("one thing",), {"time": figure()}, (facts,), "lite3r bench --model 'a b'", conditions)
    save_report(tmp_path / "a.html", report)
    with browser_page(tmp_path / "a.html") as (page, wrong):
        assert page.title() == "a report " + EVIL
        assert page.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 100)")
        assert page.locator("img").get_attribute("alt") == "time"
        assert page.locator("pre").inner_text() == "lite3r bench --model 'a b'"
        cells = page.locator("td").all_inner_texts()
        assert cells == ["stock " + EVIL, "2.0", "lite3r", "1.0", "seed", "0", "torch", "2.9"]
        assert wrong == []


def test_tables_of_the_terminal_keep_their_words() -> None:
    table = Table(title="Means", caption="a note")
    table.add_column("")
    table.add_column(r"difference \[95 %]")
    table.add_row("AbsRel", r"+0.1 \[-0.1, +0.3]")
    table.add_row("failed")
    rows = (("AbsRel", "+0.1 [-0.1, +0.3]"), ("failed", ""))
    assert facts_of_table(table) == Facts("Means", ("", "difference [95 %]"), rows, ("a note",))


def test_a_page_needs_a_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none"):
        save_report(tmp_path / "none" / "a.html", Report("a report"))
