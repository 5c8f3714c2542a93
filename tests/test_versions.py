"""The versions that the nightly run tests: tox.ini, the workflow, the table in the docs and the requirements say the same."""

from __future__ import annotations

import configparser
import importlib.metadata
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COLUMNS = ("torch", "torchvision", "triton", "transformers", "peft", "accelerate", "timm")


def pins() -> dict[str, dict[str, str]]:
    """Versions by nightly environment, as tox.ini pins them."""
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(ROOT / "tox.ini")
    found: dict[str, dict[str, str]] = {name: {} for name in re.findall(r"nightly-\w+", parser["tox"]["labels"])}
    for factor, name, version in re.findall(r"^(\w+): ([\w-]+)==([\d.]+?)(?:\.\*)?$", parser["testenv"]["deps"], re.MULTILINE):
        found[f"nightly-{factor}"][name] = version
    return found


def table() -> dict[str, list[str]]:
    lines = (ROOT / "docs" / "versions.md").read_text().splitlines()
    cells = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| `nightly-"))
    return {first.strip("`"): rest for first, *rest in cells}


def workflow() -> dict[str, str]:
    """The version of Python by environment."""
    return dict(re.findall(r'{environment: ([\w-]+), python: "([\d.]+)"}', (ROOT / ".github" / "workflows" / "nightly.yml").read_text()))


def test_the_table_is_what_runs() -> None:
    pythons = workflow()
    assert table() == {name: [pythons[name], *(pinned.get(column, "") for column in COLUMNS)] for name, pinned in pins().items()}
    assert list(pythons) == list(table())


def test_an_older_triton_comes_with_a_numpy_that_its_interpreter_can_take() -> None:
    (factors,) = re.findall(r"^ *([\w, ]+): numpy<2\.4$", (ROOT / "tox.ini").read_text(), re.MULTILINE)
    old = [name for name, pinned in pins().items() if "triton" in pinned and int(pinned["triton"].split(".")[1]) < 8]
    assert [f"nightly-{factor}" for factor in factors.split(", ")] == old


@pytest.mark.parametrize("column", COLUMNS[:1] + COLUMNS[2:])
def test_the_oldest_versions_are_those_that_the_package_takes(column: str) -> None:
    (least,) = {
        match[1]
        for requirement in importlib.metadata.requires("lite3r-plugin") or []
        if (match := re.match(rf"{column}>=([\d.]+)", requirement))
    }
    oldest = pins()["nightly-oldest"][column]
    assert (oldest + ".0").startswith(f"{least}.") or oldest == least


def test_every_minor_version_up_to_that_of_ci_is_there() -> None:
    (pinned,) = re.findall(r"^torch==(\d+)\.(\d+)", (ROOT / "requirements" / "ci.txt").read_text(), re.MULTILINE)
    tested = [pinned.get("torch") for pinned in pins().values()]
    assert tested == [*(f"2.{minor}" for minor in range(9, int(pinned[1]) + 1)), None]


def test_the_pythons_are_those_of_the_classifiers() -> None:
    classifiers = importlib.metadata.metadata("lite3r-plugin").get_all("Classifier") or []
    stated = {name.rpartition(" ")[2] for name in classifiers if re.fullmatch(r"Programming Language :: Python :: 3\.\d+", name)}
    assert set(workflow().values()) == stated
