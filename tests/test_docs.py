"""The documentation is true: its code runs, its commands exist, its numbers are those of the stored reports."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner

import lite3r_plugin
from lite3r_plugin.adapter import hookspecs
from lite3r_plugin.cli.app import app

ROOT = Path(__file__).parent.parent
DOCUMENTS = ("README.md", "adapters/README.md")
BLOCK = re.compile(r"(<!-- not run: [^>]+ -->\n)?```python\n(.*?)```", re.DOTALL)


def blocks() -> list:
    found = []
    for document in DOCUMENTS:
        text = (ROOT / document).read_text()
        for match in BLOCK.finditer(text):
            line = text.count("\n", 0, match.start(2)) + 1
            found.append(pytest.param(match[2], bool(match[1]), id=f"{document}:{line}"))
    return found


@pytest.mark.parametrize(("code", "compile_only"), blocks())
def test_code_runs(code: str, compile_only: bool) -> None:
    program = compile(code, "<documentation>", "exec")
    if not compile_only:
        exec(program, {"__name__": "documentation"})


def test_there_is_code_of_both_kinds() -> None:
    kinds = [parameters.values[1] for parameters in blocks()]
    assert kinds.count(False) >= 4
    assert kinds.count(True) >= 1


def commands() -> list[str]:
    lines = [line.split("#")[0].strip() for d in ("README.md", "benchmarks/README.md") for line in (ROOT / d).read_text().splitlines()]
    return sorted({line for line in lines if line.startswith("lite3r ")})


@pytest.mark.parametrize("command", commands())
def test_commands_and_their_options_exist(command: str) -> None:
    _, name, *arguments = shlex.split(command)
    result = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"})
    assert result.exit_code == 0, result.output
    assert [option for option in arguments if option.startswith("--") and option not in result.output] == []


def test_all_commands_are_shown() -> None:
    shown = {shlex.split(command)[1] for command in commands()}
    assert {info.name or info.callback.__name__ for info in app.registered_commands if info.callback} <= shown


@pytest.mark.parametrize("name", [n for n in lite3r_plugin.__all__ if not n.startswith("__")])
def test_every_public_name_is_documented(name: str) -> None:
    assert re.search(rf"\b{name}\b", "".join((ROOT / d).read_text() for d in DOCUMENTS))


def test_every_hook_is_documented() -> None:
    hooks = [name for name, value in vars(hookspecs).items() if hasattr(value, "lite3r_spec")]
    assert len(hooks) >= 2
    text = "".join((ROOT / d).read_text() for d in (*DOCUMENTS, "benchmarks/README.md"))
    assert [hook for hook in hooks if hook not in text] == []


@pytest.mark.parametrize(
    "document",
    [*DOCUMENTS, "CONTRIBUTING.md", "benchmarks/README.md", "examples/custom_adapter/README.md", "examples/lightglue/README.md"],
)
def test_links_within_the_repository_lead_somewhere(document: str) -> None:
    file = ROOT / document
    targets = [t.partition("#")[0] for t in re.findall(r"\]\(([^)\s]+)\)", file.read_text()) if "://" not in t]
    assert [t for t in targets if t and not (file.parent / t).exists()] == []


def test_every_configuration_field_is_named() -> None:
    text = (ROOT / "README.md").read_text()
    assert [name for name in lite3r_plugin.Lite3RConfig.__dataclass_fields__ if f"`{name}`" not in text] == []


@pytest.fixture(scope="module")
def readme_table() -> ModuleType:
    spec = importlib.util.spec_from_file_location("readme_table", ROOT / "benchmarks" / "readme_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_is_that_of_the_report(readme_table: ModuleType) -> None:
    text = (ROOT / "README.md").read_text()
    assert len(readme_table.TABLE.findall(text)) == 1
    assert readme_table.update(text) == text, "run: python benchmarks/readme_table.py"


def test_an_edited_number_is_noticed(readme_table: ModuleType) -> None:
    text = (ROOT / "README.md").read_text()
    typo = re.sub(r"(\d) ms", lambda m: f"{(int(m[1]) + 1) % 10} ms", text, count=1)
    assert typo != text
    assert readme_table.update(typo) == text


def test_cells_that_failed_say_so(readme_table: ModuleType) -> None:
    cell = {"views": 8, "variant": "stock", "status": "oom", "best": None, "candidates": {}, "density": None}
    skipped = cell | {"variant": "strong", "status": "skipped"}
    names = ("summary", "resolution", "device", "torch", "triton", "date", "commit", "weights")
    conditions = dict.fromkeys(names, "x") | {"lite3r_options": {}}
    row = readme_table.render({"cells": [cell, skipped], "conditions": conditions}).splitlines()[2]
    assert row.startswith("| 8 | out of memory |  |  | – |")


def test_columns_of_fp8_appear_with_its_cells(readme_table: ModuleType) -> None:
    report = json.loads((ROOT / "benchmarks" / "results" / "h100_vggt_518_keep0.1.json").read_text())
    report["cells"] = [cell for cell in report["cells"] if "fp8" not in cell["variant"]]
    without = readme_table.render(report).splitlines()
    strong = next(cell for cell in report["cells"] if (cell["variant"], cell["views"]) == ("lite3r-strong", 32))
    report["cells"].append(strong | {"variant": "lite3r-fp8"})
    lines = readme_table.render(report).splitlines()
    assert lines[0] == without[0] + " Lite3R in FP8 | gain | gain on stock | peak memory in FP8 |"
    assert len({line.count("|") for line in lines[:8]}) == 1
    row = [cell.strip() for cell in lines[6].split("|")]
    assert row[-5:-1] == [*row[6:9], row[9].partition("→ ")[2]]
    assert lines[2] == without[2] + "  |  |  | - |"
    report["cells"].append(strong | {"variant": "strong-fp8"})
    assert " dense in FP8 | Lite3R in FP8 |" in readme_table.render(report)
