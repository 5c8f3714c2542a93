"""The wheel: both packages, the entry points, the data; and metadata that agrees with the code."""

from __future__ import annotations

import configparser
import email
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
IMPORT = re.compile(r"^\s*(?:from|import) +(\w+)", re.MULTILINE)
DISTRIBUTIONS = {"PIL": "pillow", "huggingface_hub": "huggingface-hub"}
MODEL_LIBRARIES = {
    "depth_anything_3",
    "vggt",
    "pi3",
    "fast3r",
    "mapanything",
    "transformers",
}  # adapters build their models for the command line, if they are there
TYPES = {"typing_extensions"}  # imported by type checkers alone, which bring it
EXTRAS = {"av", "moderngl", "pillow_heif", "pycolmap", "viser"}  # imported where they are needed, and installed with an extra


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    result = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, env=os.environ | {"SOURCE_DATE_EPOCH": "315532800"}
    )
    assert result.returncode == 0, result.stderr
    (file,) = folder.glob("*.whl")
    return zipfile.ZipFile(file)


def test_an_index_takes_it(wheel: zipfile.ZipFile) -> None:
    pytest.importorskip("twine")
    command = [sys.executable, "-m", "twine", "check", "--strict", str(wheel.filename)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "PASSED" in result.stdout


def read_metadata(wheel: zipfile.ZipFile, name: str) -> str:
    (path,) = (n for n in wheel.namelist() if n.endswith(f".dist-info/{name}"))
    return wheel.read(path).decode()


def test_every_file_of_both_packages_is_inside(wheel: zipfile.ZipFile) -> None:
    expected = set()
    for source in (ROOT, ROOT / "adapters"):
        package = source / ("lite3r_plugin" if source == ROOT else "lite3r_adapters")
        tracked = subprocess.run(["git", "ls-files", "."], cwd=package, capture_output=True, text=True, check=False)
        names = tracked.stdout.split() if tracked.returncode == 0 else [str(p.relative_to(package)) for p in package.rglob("*.py")]
        expected |= {f"{package.name}/{name}" for name in names if (package / name).is_file()}
    assert "lite3r_plugin/py.typed" in expected
    assert expected <= set(wheel.namelist())


def test_nothing_else_is_inside(wheel: zipfile.ZipFile) -> None:
    assert {name.partition("/")[0].partition("-")[0] for name in wheel.namelist()} == {"lite3r_plugin", "lite3r_adapters"}


def test_the_testbeds_weights_are_inside(wheel: zipfile.ZipFile) -> None:
    folder = ROOT / "lite3r_plugin" / "testbed" / "weights"
    files = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
    inside = sorted(name.rpartition("/")[2] for name in wheel.namelist() if name.startswith("lite3r_plugin/testbed/weights/"))
    assert inside == files
    assert not files or {"config.json", "model.safetensors"} <= set(files)


def test_entry_points_lead_to_modules_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    parser = configparser.ConfigParser()
    parser.read_string(read_metadata(wheel, "entry_points.txt"))
    assert dict(parser["console_scripts"]) == {"lite3r": "lite3r_plugin.cli.app:main"}
    modules = dict(parser["lite3r.adapters"]).values()
    assert {"lite3r_adapters.vggt", "lite3r_adapters.depth_anything_3", "lite3r_adapters.pi3", "lite3r_adapters.timm"} <= set(modules)
    names = [module.replace(".", "/") for module in modules]
    assert [name for name in names if not {f"{name}.py", f"{name}/__init__.py"} & set(wheel.namelist())] == []


def test_metadata(wheel: zipfile.ZipFile) -> None:
    import lite3r_plugin

    metadata = email.message_from_string(read_metadata(wheel, "METADATA"))
    assert metadata["Name"] == "lite3r-plugin"
    assert metadata["Version"] == lite3r_plugin.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert "Apache License" in read_metadata(wheel, "licenses/LICENSE")
    assert f"## {lite3r_plugin.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert f"\nversion: {lite3r_plugin.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_every_import_is_a_declared_dependency(wheel: zipfile.ZipFile) -> None:
    metadata = email.message_from_string(read_metadata(wheel, "METADATA"))
    declared = {
        re.split(r"[^\w-]", requirement)[0] for requirement in metadata.get_all("Requires-Dist", []) if "extra ==" not in requirement
    }
    code = [wheel.read(name).decode() for name in wheel.namelist() if name.endswith(".py")]
    used = {name for text in code for name in IMPORT.findall(text)} - sys.stdlib_module_names - MODEL_LIBRARIES - EXTRAS - TYPES
    names = {DISTRIBUTIONS.get(name, name) for name in used if name not in ("lite3r_plugin", "lite3r_adapters", "__future__")}
    prose = {name for name in names if not importable(name)}  # a line of a docstring may begin with "from" or "import"
    assert names - prose <= declared
    assert {"torch", "numpy", "pillow", "trimesh", "matplotlib", "pluggy"} <= names


def importable(distribution: str) -> bool:
    import importlib.metadata

    try:
        importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
