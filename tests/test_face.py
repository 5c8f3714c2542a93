"""What a name of the package shows in the hand: an example that runs, and in a listing nothing but public names."""

from __future__ import annotations

import ast
import doctest
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

import lite3r_plugin
from lite3r_plugin import adapter, evaluation, hub, peft, testing
from lite3r_plugin.adapter import hookspecs
from lite3r_plugin.testbed import Testbed, TestbedConfig

NAMES = [name for name in lite3r_plugin.__all__ if name != "__version__"]


def docstring(name: str) -> str:
    """Of the name; that of `hookimpl`, an object of pluggy, stands below it."""
    if name != "hookimpl":
        return inspect.getdoc(getattr(lite3r_plugin, name)) or ""
    found = ast.parse(inspect.getsource(hookspecs)).body
    targets = [ast.unparse(node.targets[0]) if isinstance(node, ast.Assign) else "" for node in found]
    text = found[targets.index(name) + 1]
    assert isinstance(text, ast.Expr)
    assert isinstance(text.value, ast.Constant)
    return str(text.value.value)


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What examples take for granted: all public names, a model, another one, what it takes."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model, another = (Testbed(TestbedConfig(dim=64, depth=1)).eval() for _ in range(2))
    another.load_state_dict(model.state_dict())
    inputs = [torch.rand(1, 3, 3, 72, 96) for _ in range(2)]
    public = {name: getattr(lite3r_plugin, name) for name in NAMES}
    return public | {"torch": torch, "model": model, "another": another, "images": inputs[0], "inputs": inputs}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore::lite3r_plugin.ops.dispatch.SlowPathWarning")
def test_the_example_runs(name: str, names: dict[str, Any]) -> None:
    text = docstring(name)
    assert "\nExamples:\n" in text
    test = doctest.DocTestParser().get_doctest(text, names, name, None, None)
    assert any(name in example.source for example in test.examples)
    said: list[str] = []
    doctest.DocTestRunner(verbose=False).run(test, out=said.append)
    assert not said, "".join(said)


@pytest.mark.parametrize("module", [lite3r_plugin, adapter, evaluation, hub, peft, testing], ids=lambda module: module.__name__)
def test_a_listing_has_public_names_alone(module: Any) -> None:
    assert dir(module) == sorted(module.__all__)
