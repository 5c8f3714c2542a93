"""The examples run, each as its README says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False, timeout=300)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with the third-party adapter installed, metadata and all."""
    pytest.importorskip("hatchling")
    target = str(tmp_path_factory.mktemp("site"))
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--disable-pip-version-check", "--target", target)
    result = run(sys.executable, "-m", "pip", "install", *options, str(EXAMPLES / "custom_adapter"))
    assert result.returncode == 0, result.stderr
    return target


def test_the_third_party_adapter_is_found_by_its_entry_point(installed: str) -> None:
    code = "from lite3r_plugin.adapter.plugins import list_adapters; print([(a.name, a.distribution) for a in list_adapters()][0])"
    result = run(sys.executable, "-c", code, PYTHONPATH=installed)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "('tiny_multiview', 'tiny-multiview')"


def test_the_third_party_project_passes_its_own_tests(installed: str) -> None:
    tests = str(EXAMPLES / "custom_adapter" / "tests")
    result = run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", tests, PYTHONPATH=installed)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "2 passed" in result.stdout
