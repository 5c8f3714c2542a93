"""``import lite3r_plugin`` is light: no optional or heavy library, no CUDA context, no environment variable."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import lite3r_plugin

PACKAGE = Path(lite3r_plugin.__file__).parent
HEAVY = (
    "accelerate",
    "huggingface_hub",
    "matplotlib",
    "peft",
    "PIL",
    "rich",
    "timm",
    "transformer_engine",
    "transformers",
    "trimesh",
    "triton",
    "typer",
)
ENVIRONMENT = re.compile(r"\bos\.environ|\bgetenv\b|\bfrom os import .*environ|\bputenv\b")

PROBE = """
import sys, time, torch
found, known = dict(), set(sys.modules)
for name, statement in {statements}:
    start = time.process_time()
    exec(statement)
    seconds = time.process_time() - start
    found[name] = {{"seconds": seconds, "modules": sorted(set(sys.modules) - known), "cuda": torch.cuda.is_initialized()}}
import json
print(json.dumps(found))
"""
STATEMENTS = {
    "import": "import lite3r_plugin",
    "apply": "try: lite3r_plugin.apply_lite3r(torch.nn.Linear(2, 2))\nexcept lite3r_plugin.Lite3RError: pass",
    "typer": "import typer",
    "help": "from lite3r_plugin.cli.app import app; from typer.testing import CliRunner\n"
    "assert CliRunner().invoke(app, ['--help']).exit_code == 0",
}


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    """What the statements, each after those before it, have imported by then, in a process of their own."""
    code = PROBE.format(statements=list(STATEMENTS.items()))
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return json.loads(result.stdout)


def heavy_ones(modules: list[str]) -> set[str]:
    return {name.partition(".")[0] for name in modules} & set(HEAVY)


def test_import_is_light(seen: dict[str, Any]) -> None:
    after = seen["import"]
    assert heavy_ones(after["modules"]) == set()
    assert not after["cuda"]
    assert "lite3r_plugin.apply.verbs" in after["modules"]
    assert after["seconds"] < 1.5  # of the processor; 0.1 s on an idle machine


def test_the_probe_sees_heavy_imports(seen: dict[str, Any]) -> None:
    assert heavy_ones(seen["typer"]["modules"]) - heavy_ones(seen["apply"]["modules"]) == {"typer"}


def test_applying_to_a_model_imports_no_other_models_library(seen: dict[str, Any]) -> None:
    loaded = heavy_ones(seen["apply"]["modules"])
    assert loaded & {"timm", "transformers", "peft", "PIL", "triton", "matplotlib", "typer", "trimesh", "accelerate"} == set()


def test_help_is_printed_without_the_models_libraries(seen: dict[str, Any]) -> None:
    loaded = heavy_ones(seen["help"]["modules"])
    assert loaded & {"timm", "transformers", "peft", "matplotlib", "trimesh", "accelerate"} == set()


@pytest.mark.parametrize(
    "root", [PACKAGE, PACKAGE.parent / "lite3r_adapters", Path(__file__).parent.parent / "adapters"], ids=lambda p: p.name
)
def test_no_environment_variable_is_read(root: Path) -> None:
    files = list(root.rglob("*.py"))
    found = [
        f"{path.relative_to(root)}: {line.strip()}" for path in files for line in path.read_text().splitlines() if ENVIRONMENT.search(line)
    ]
    assert found == []


@pytest.mark.parametrize("line", ["x = os.environ['A']", "os.getenv('A')", "from os import path, environ"])
def test_the_search_finds_reads(line: str) -> None:
    assert ENVIRONMENT.search(line)


def test_all_names_exist() -> None:
    assert [name for name in lite3r_plugin.__all__ if not hasattr(lite3r_plugin, name)] == []
    assert sorted(lite3r_plugin.__all__) == list(lite3r_plugin.__all__)
