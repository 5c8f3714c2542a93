"""`lite3r bench`: a report and a table."""

from __future__ import annotations

import importlib.util
import io
import json
from pathlib import Path

from commands import fails, lite3r
from PIL import Image
from rich.console import Console

from lite3r_plugin.bench import VARIANTS
from lite3r_plugin.bench.records import BenchReport, Cell
from lite3r_plugin.bench.table import table
from lite3r_plugin.cli.bench import DEFAULT_VARIANTS, TABLE_WIDTH


def test_report_and_table(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    options = ("--views", "1,2", "--variants", "stock,lite3r", "--resolution", 16, "--device", "cpu", "--repeats", 1)
    reports = ("--html", tmp_path / "r.html", "--plots", tmp_path / "plots")
    result = lite3r("bench", "--model", "tiny", *options, "--json", path, "--config", "linear_branch=none", *reports)
    stored = json.loads(path.read_text())
    assert stored["conditions"]["lite3r_options"] == {"linear_branch": "none"}
    assert [cell["status"] for cell in stored["cells"]] == ["ok"] * 4
    assert "x strong" in result.stdout
    assert "lite3r_options: {'linear_branch': 'none'}" in result.stdout
    page = (tmp_path / "r.html").read_text()
    for expected in (
        "lite3r bench --model tiny --views 1,2 --variants stock,lite3r",
        "apply_lite3r(model, linear_branch",
        "Memory was not",
    ):
        assert expected in page
    assert [file.name for file in (tmp_path / "plots").iterdir()] == ["time_over_views.png"]
    with Image.open(tmp_path / "plots" / "time_over_views.png") as picture:
        assert picture.width > 2000


def test_page_and_plots(tmp_path: Path) -> None:
    page, plots = tmp_path / "r.md", tmp_path / "plots"
    options = ("--views", "1,2", "--variants", "stock", "--resolution", 16, "--device", "cpu", "--repeats", 1)
    lite3r("bench", "--model", "tiny", *options, "--markdown", page, "--plots", plots)
    lines = page.read_text().splitlines()
    assert lines[0].startswith("# tiny at 16 px on CPU")
    assert sum(line.startswith(("| 1 | stock | eager |", "| 2 | stock | eager |")) for line in lines) == 2
    assert [path.name for path in plots.iterdir()] == ["time_over_views.png"]  # a CPU tells of no memory


def test_a_run_without_any_measurement_fails(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    common = ("bench", "--model", "tiny", "--device", "cpu", "--views", 1)
    line = fails(*common, "--variants", "stock,lite3r", "--resolution", 17, "--json", path)
    assert "nothing was measured: no cell ran; stock at 1 view: error, " in line
    assert [cell["status"] for cell in json.loads(path.read_text())["cells"]] == ["error"] * 2
    assert "variant" not in lite3r(*common, "--resolution", 17, "--variants", "stock", code=2).stdout  # a table of nothing
    assert "stock at 1 view: skipped, the time budget of 0 s was spent" in fails(*common, "--time-budget", 0)


def test_by_default_images_are_of_a_size_that_the_model_takes(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    lite3r("bench", "--model", "tiny", "--device", "cpu", "--views", 1, "--variants", "stock", "--repeats", 1, "--json", path)
    stored = json.loads(path.read_text())
    assert (stored["conditions"]["resolution"], stored["cells"][0]["status"]) == (224, "ok")


def test_default_variants_are_all() -> None:
    assert DEFAULT_VARIANTS.split(",") == list(VARIANTS)


def test_names_of_variants_and_errors_are_told_whole() -> None:
    conditions = {"model": "m", "resolution": 8, "device": "CPU [/b]", "torch": "2", "triton": "3", "variants": {}}
    cells = [Cell(name, 2, 8, status="error", error="[/x] [batch, 3]") for name in VARIANTS]
    console = Console(width=TABLE_WIDTH, emoji=False, record=True, file=io.StringIO())
    console.print(table(BenchReport(conditions, cells)))
    shown = console.export_text()
    assert all(name in shown for name in (*VARIANTS, "CPU [/b]", "[/x]", "[batch,"))


def test_wrong_options_are_refused() -> None:
    assert "--views takes numbers" in fails("bench", "--model", "tiny", "--views", "two")
    assert "unknown variant(s) ['fast']" in fails("bench", "--model", "tiny", "--variants", "fast")
    if importlib.util.find_spec("pi3") is None:
        assert "needs the library 'pi3', which is not installed" in fails("bench", "--model", "pi3")
    assert "must end in .md" in fails("bench", "--model", "tiny", "--markdown", "r.txt")
    assert "unknown peer 'others'" in fails("bench", "--model", "tiny", "--peers", "others")
    assert "must end in .json" in fails("bench", "--model", "tiny", "--json", "r.txt")
    assert "must end in .html" in fails("bench", "--model", "tiny", "--html", "r.json")
    assert "cannot be made: File exists" in fails("bench", "--model", "tiny", "--plots", __file__)
