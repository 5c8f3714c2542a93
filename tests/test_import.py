"""``import lite3r_plugin`` is light: no optional or heavy library, no CUDA context, no environment variable."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

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
before, start = set(sys.modules), time.process_time()
{statement}
seconds = time.process_time() - start
import json
print(json.dumps({{"seconds": seconds, "modules": sorted(set(sys.modules) - before), "cuda": torch.cuda.is_initialized()}}))
"""


def probe(statement: str) -> dict:
    import json

    result = subprocess.run([sys.executable, "-c", PROBE.format(statement=statement)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return json.loads(result.stdout)


def heavy_ones(modules: list[str]) -> list[str]:
    return sorted({name.partition(".")[0] for name in modules} & set(HEAVY))


def test_import_is_light() -> None:
    seen = probe("import lite3r_plugin")
    assert heavy_ones(seen["modules"]) == []
    assert not seen["cuda"]
    assert "lite3r_plugin.apply.verbs" in seen["modules"]
    assert seen["seconds"] < 1.5  # of the processor; 0.1 s on an idle machine


def test_the_probe_sees_heavy_imports() -> None:
    assert heavy_ones(probe("import lite3r_plugin, typer")["modules"]) == ["typer"]


def test_applying_to_a_model_imports_no_other_models_library() -> None:
    statement = (
        "import lite3r_plugin, torch\ntry: lite3r_plugin.apply_lite3r(torch.nn.Linear(2, 2))\nexcept lite3r_plugin.Lite3RError: pass"
    )
    loaded = heavy_ones(probe(statement)["modules"])
    assert {"timm", "transformers", "peft", "PIL", "triton", "matplotlib", "typer", "trimesh", "accelerate"} & set(loaded) == set()


def test_help_is_printed_without_the_models_libraries() -> None:
    statement = "from lite3r_plugin.cli.app import app; from typer.testing import CliRunner; "
    statement += "assert CliRunner().invoke(app, ['--help']).exit_code == 0"
    assert {"timm", "transformers", "peft", "matplotlib", "trimesh", "accelerate"} & set(heavy_ones(probe(statement)["modules"])) == set()


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
