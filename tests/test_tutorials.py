"""The tutorials run as they stand: blocks of a page one after another, in an empty folder, with the names of the blocks before."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from commands import lite3r

from lite3r_plugin.cli.distill import Recipe

PAGES = sorted((Path(__file__).parent.parent / "docs" / "tutorials").glob("*.md"))
BLOCK = re.compile(r"(<!-- not run: [^>]+ -->\n)?```(python|bash|toml|yaml)\n(.*?)```", re.DOTALL)
FILE = re.compile(r"# ([\w./]+\.\w+)\n")


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
@pytest.mark.filterwarnings("ignore::lite3r_plugin.ops.dispatch.SlowPathWarning")
def test_it_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    names: dict[str, Any] = {"__name__": "tutorial"}
    before = set(sys.modules)
    for skipped, language, text in BLOCK.findall(page.read_text()):
        if file := FILE.match(text):  # a block that begins with the name of a file is that file
            Path(file[1]).parent.mkdir(parents=True, exist_ok=True)
            Path(file[1]).write_text(text)
        if language == "python":
            program = compile(text, f"{page.name}: {text.splitlines()[0]}", "exec")
            if not skipped and not file:
                exec(program, names)
        elif language == "bash":
            for line in text.splitlines():
                run(shlex.split(line, comments=True), monkeypatch)
        elif language == "toml" and file and file[1] == "recipe.toml":
            Recipe.read(Path(file[1]), {})
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            monkeypatch.delitem(sys.modules, name)


def run(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A command in this process: `lite3r`, `pytest`, and of `accelerate launch` the program; `tests/training` launches processes."""
    if command[0] == "lite3r":
        lite3r(*command[1:])
    elif command[:2] == ["accelerate", "launch"]:
        monkeypatch.setattr(sys, "argv", command[-1:])
        runpy.run_path(command[-1], run_name="__main__")
    elif command[0] == "pytest":
        assert pytest.main([*command[1:], "-p", "no:cacheprovider", "--import-mode=importlib", "--rootdir=."]) == 0
    else:
        pytest.fail(f"a tutorial runs {command}, which this test does not know")
