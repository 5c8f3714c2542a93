"""The documentation is true: its code runs, its commands, names and links exist, its numbers are those of the stored results."""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib
import json
import pkgutil
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import screenshots
import timm
import torch
from packaging.version import Version
from PIL import Image, ImageStat
from typer.testing import CliRunner

import lite3r_plugin
from lite3r_plugin.adapter import hookspecs
from lite3r_plugin.cli.app import app
from lite3r_plugin.cli.distill import Recipe

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
DOCS = tuple(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))
RUN = ("README.md", *DOCS, "adapters/README.md")  # their blocks of Python are run
TUTORIALS = tuple(f"docs/tutorials/{path.name}" for path in sorted((ROOT / "docs/tutorials").glob("*.md")))  # run by test_tutorials.py
PAGES = (
    *RUN, *TUTORIALS, "CONTRIBUTING.md", "CHANGELOG.md", *(f"benchmarks/{path.name}" for path in sorted(BENCHMARKS.glob("*.md"))),
    "examples/README.md", "examples/custom_adapter/README.md", "examples/lightglue/README.md",
)  # fmt: skip
BLOCK = re.compile(r"(<!-- not run: [^>]+ -->\n)?```python\n(.*?)```", re.DOTALL)


def read(page: str) -> str:
    return (ROOT / page).read_text()


def rows(page: str) -> Iterator[list[str]]:
    """The cells of every line of every table."""
    for line in read(page).splitlines():
        if line.startswith("| "):
            yield [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def blocks() -> list:
    found = []
    for page in RUN:
        text = read(page)
        for match in BLOCK.finditer(text):
            line = text.count("\n", 0, match.start(2)) + 1
            found.append(pytest.param(match[2], bool(match[1]), id=f"{page}:{line}"))
    return found


@pytest.mark.parametrize(("code", "compile_only"), blocks())
def test_code_runs(code: str, compile_only: bool) -> None:
    program = compile(code, "<documentation>", "exec")
    if "timm.create_model" in code and 'torch.device("meta")' in code and Version(timm.__version__) < Version("1.0.21"):
        pytest.skip(f"timm {timm.__version__} makes no model without weights")
    if not compile_only:
        exec(program, {"__name__": "documentation"})


def test_there_is_code_of_both_kinds() -> None:
    kinds = [parameters.values[1] for parameters in blocks()]
    assert kinds.count(False) >= 10
    assert kinds.count(True) >= 1


def test_the_readme_is_short() -> None:
    text = read("README.md")
    assert len(text.split()) < 1300
    first = next(line for line in text.splitlines() if line.startswith("|"))
    assert first.count("|") - 1 <= 6


# Commands


def commands() -> list[str]:
    lines = [line.split("#")[0].strip() for page in PAGES if page != "CHANGELOG.md" for line in read(page).splitlines()]
    return sorted({line for line in lines if line.startswith("lite3r ")})


def options() -> list:
    """Every (command, option) of the examples and of the table of options, and (command, "--help") of every command."""
    found = set()
    for command in commands():
        _, name, *arguments = shlex.split(command)
        found |= {(name, argument) for argument in ("--help", *arguments) if argument.startswith("--")}
    names = r"\b(demo|reconstruct|eval|distill|bench|push|convert-official)\b"
    for cells in rows("docs/command_line.md"):
        if option := re.match(r"`(--[\w-]+)", cells[0]):
            found |= {(name, option[1]) for name in re.findall(names, cells[1])}
    return [pytest.param(*pair, id=" ".join(pair)) for pair in sorted(found)]


@functools.cache
def help_of(command: str) -> str:
    result = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"})
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize(("command", "option"), options())
def test_commands_and_their_options_exist(command: str, option: str) -> None:
    assert re.search(rf"{option}\b", help_of(command))


def test_recipes_can_be_read(tmp_path: Path) -> None:
    found = re.findall(r"```toml\n(.*?)```", read("docs/distillation.md"), re.DOTALL)
    assert found
    for text in found:
        (tmp_path / "recipe.toml").write_text(text)
        assert Recipe.read(tmp_path / "recipe.toml", {}).config.output_dir


def test_all_commands_are_shown() -> None:
    shown = {shlex.split(command)[1] for command in commands()}
    assert {info.name or info.callback.__name__ for info in app.registered_commands if info.callback} <= shown


# Names


@pytest.mark.parametrize("name", [n for n in lite3r_plugin.__all__ if not n.startswith("__")])
def test_every_public_name_is_documented(name: str) -> None:
    assert re.search(rf"\b{name}\b", "".join(map(read, RUN)))


def test_every_hook_is_documented() -> None:
    hooks = [name for name, value in vars(hookspecs).items() if hasattr(value, "lite3r_spec")]
    assert len(hooks) >= 2
    text = "".join(map(read, (*RUN, "benchmarks/README.md")))
    assert [hook for hook in hooks if hook not in text] == []


@pytest.mark.parametrize("page", [page for page in PAGES if page != "CHANGELOG.md"])
def test_names_of_the_package_exist(page: str) -> None:
    missing = []
    for name in set(re.findall(r"\blite3r_plugin(?:\.[A-Za-z_]\w*)+", read(page))):
        try:
            pkgutil.resolve_name(name)
        except (ImportError, AttributeError):
            missing.append(name)
    assert missing == []


def test_every_configuration_field_is_explained_with_its_default() -> None:
    stated = {}
    for first, default, *_ in rows("docs/configuration.md"):
        if names := re.findall(r"`(\w+)`", first):
            value = ast.literal_eval(default.strip("`"))
            stated |= dict(zip(names, value if len(names) > 1 else (value,), strict=True))
    assert stated == {field.name: field.default for field in dataclasses.fields(lite3r_plugin.Lite3RConfig)}


PLACE = re.compile(r"`((?:lite3r_plugin|adapters|benchmarks|tests|docs)/[\w/.<>]*)`")


def test_contributing_names_one_place_for_each_kind_of_change() -> None:
    places = {cells[0]: PLACE.findall(cells[1]) for cells in rows("CONTRIBUTING.md") if len(cells) == 2}
    changes = (
        "a new model", "a wrong number", "a slow case", "an option", "a checkpoint", "a new operator", "a new FP8 backend", "a new command",
        "a training loss",
    )  # fmt: skip
    assert {change: len(places[change]) for change in changes} == dict.fromkeys(changes, 1)


def test_places_named_in_contributing_exist() -> None:
    """By their names without a suffix: a place may be a file or a folder."""
    places = [place.replace("<operator>", "*") for place in PLACE.findall(read("CONTRIBUTING.md"))]
    assert len(places) >= 15
    assert [place for place in places if not [*ROOT.glob(place), *ROOT.glob(f"{place}.py")]] == []


def test_scripts_exist() -> None:
    scripts = {name for page in PAGES for name in re.findall(r"python benchmarks/(?:\w+/)?(\w+\.py)", read(page))}
    assert len(scripts) >= 7
    assert [name for name in scripts if not list(BENCHMARKS.rglob(name))] == []


# Links


def sections(page: Path) -> set[str]:
    """Anchors of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_within_the_repository_lead_somewhere(page: str) -> None:
    file = ROOT / page
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", file.read_text()):
        if "://" in target:
            continue
        path, _, section = target.partition("#")
        linked = file.parent / path if path else file
        if not linked.exists() or (section and section not in sections(linked)):
            broken.append(target)
    assert broken == []


# Pictures


def test_pictures_show_something() -> None:
    """What `tests/helpers/screenshots.py` took, for the page whose commands it runs, and what `benchmarks/picture.py` drew."""
    pages = read("docs/first_steps.md") + read("docs/quality.md")
    shown = {f"docs/{path}" for path in re.findall(r"!\[[^\]]+\]\((images/[^)]+)\)", pages)}
    shown |= set(re.findall(r"!\[[^\]]+\]\(([^)]+)\)", read("README.md")))
    assert shown == {str(path.relative_to(ROOT)) for path in (ROOT / "docs" / "images").iterdir()}
    for path in shown:
        with Image.open(ROOT / path) as picture:
            assert picture.width >= 700
            assert ImageStat.Stat(picture.convert("L")).stddev[0] > 20
        assert (ROOT / path).stat().st_size < 400_000
    assert list(screenshots.commands()) == ["demo", "reconstruct", "view"]


def test_a_walk_goes_from_each_camera_to_one_nearby() -> None:
    cameras = torch.eye(3, 4).repeat(4, 1, 1)
    cameras[:, 0, 3] = torch.tensor([0.0, 3.0, 1.0, 2.0])
    assert screenshots.walk(cameras) == [0, 2, 3, 1]


# Numbers


@pytest.fixture(scope="module")
def readme_table() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("readme_table")


def test_the_tables_are_those_of_the_results(readme_table: ModuleType) -> None:
    count = 0
    for path in readme_table.documents():
        text = path.read_text()
        assert readme_table.update(text) == text, f"{path.name}: run python benchmarks/readme_table.py"
        assert text.count("<!-- table: ") == len(readme_table.TABLE.findall(text))
        count += text.count("<!-- table: ")
    assert count >= 10


def test_an_edited_number_is_noticed(readme_table: ModuleType) -> None:
    text = read("README.md")
    typo = re.sub(r"(\d) ms", lambda m: f"{(int(m[1]) + 1) % 10} ms", text, count=1)
    assert typo != text
    assert readme_table.update(typo) == text


@pytest.fixture
def report() -> dict:
    return json.loads((BENCHMARKS / "results" / "h200_vggt_518_keep0.1.json").read_text())


def test_cells_that_failed_say_so(readme_table: ModuleType, report: dict) -> None:
    cell = {"views": 8, "variant": "stock", "status": "oom", "best": None, "candidates": {}, "density": None}
    report["cells"] = [cell, cell | {"variant": "strong", "status": "skipped"}]
    assert readme_table.speed(report).splitlines()[2] == "| 8 | out of memory | – |"
    assert readme_table.times_fp8(report).splitlines()[2] == "| 8 |  |  |  |  |  |"
    assert readme_table.memory(report).splitlines()[2] == "| 8 | – | – |"


def test_gains_are_over_the_named_column(readme_table: ModuleType, report: dict) -> None:
    """As `lite3r bench` computed them when it ran."""
    stored = {(cell["views"], cell["variant"]): cell for cell in report["cells"]}
    lines = readme_table.speed(report).splitlines()[2:]
    for line in lines[: len({views for views, _ in stored})]:
        views, _, one_line, _, strong, fp8 = (cell.strip() for cell in line.split("|")[1:-1])
        for cell, variant, over in ((one_line, "lite3r", "stock"), (strong, "strong-exact", "strong"), (fp8, "lite3r-fp8", "strong")):
            if (int(views), variant) not in stored:
                assert not cell
                continue
            assert f"({stored[int(views), variant][f'speedup_over_{over}']:.2f} ×)" in cell


def test_whether_training_reaches_its_aim_is_as_measured(readme_table: ModuleType) -> None:
    report = json.loads((BENCHMARKS / "results" / "testbed_distillation_keep0.25.json").read_text())
    longest = report["rows"]["lora-chosen 0.25"]["against_dense"]
    for measures in longest.values():
        measures["auc30"]["difference"] = measures["auc15"]["difference"] = -0.5
        measures["abs_rel"]["difference"] = 0.5
    note = " ".join(readme_table.distillation(report).split())
    assert "is reached by: ratios by site, calibrated, distilled: `proj+lora` with 1.5 minutes" in note
    longest["32"]["auc15"]["difference"] = -0.51
    assert "is not reached with 1.5 minutes" in " ".join(readme_table.distillation(report).split())


def test_pins_are_compared_on_the_same_scenes(readme_table: ModuleType) -> None:
    first, second = (json.loads((BENCHMARKS / "results" / f"quality_auto{end}.json").read_text()) for end in ("", "_keys"))
    assert len(readme_table.density(first, second).split("\n|")) == 1 + 1 + 6 * 5
    second["groups"]["32"]["values"]["dense"]["AUC@5"][0] += 1
    with pytest.raises(ValueError, match="32 views: these results are of other scenes"):
        readme_table.density(first, second)


def test_a_variant_that_was_not_measured_has_no_column_and_a_lost_cell_is_empty(readme_table: ModuleType, report: dict) -> None:
    report["cells"] = [cell for cell in report["cells"] if "fp8" not in cell["variant"] or cell["views"] == 2]
    lines = readme_table.speed(report).splitlines()[2:8]
    assert [line.endswith("|  |") for line in lines] == [False, *[True] * 5]
    report["cells"] = [cell for cell in report["cells"] if "fp8" not in cell["variant"]]
    assert "FP8" not in readme_table.speed(report).splitlines()[0]


def test_ratios_are_those_of_the_rows(readme_table: ModuleType) -> None:
    report = json.loads((BENCHMARKS / "results" / "h200_never_slower_vggt.json").read_text())
    report["rows"] = [row for row in report["rows"] if (row["views"], row["pair"]) != (2, "preset")]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in readme_table.never_slower(report).splitlines()[2:4]]
    assert [line[0] for line in lines] == ["1", "2"]
    assert lines[1][3:] == ["", ""]
    assert lines[0][1] == f"{report['rows'][0]['ratio']:.2f}"
