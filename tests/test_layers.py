"""Imports go one way: from what stands higher to what stands lower, also inside functions and under TYPE_CHECKING."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

import lite3r_plugin

PACKAGE = Path(lite3r_plugin.__file__).parent
# The lowest first; those of one line do not import each other.
LAYERS = (
    ("errors", "version"),
    ("ops",),
    ("config", "files", "wrapper"),
    ("scene",),
    ("adapter", "testbed"),
    ("costs",),
    ("fp8", "tokens"),
    ("attention",),
    ("runtime",),
    ("apply",),
    ("diagnosis",),
    ("hub", "peft"),
    ("training", "parallel", "testing"),
    ("evaluation",),
    ("bench",),
    ("cli",),
    ("__main__", "distill"),
)
FACE = {"adapter", "apply", "config", "diagnosis", "errors", "training", "version"}  # what `import lite3r_plugin` itself imports


def modules() -> dict[str, Path]:
    """Every module of the package by its name below it; packages by their own."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(name: str) -> Iterator[str]:
    """Names of the package's modules that the module `name` imports, anywhere in it."""
    path = MODULES[name]
    here = name.split(".") if name else []
    package = here if path.name == "__init__.py" else here[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.removeprefix("lite3r_plugin").lstrip(".") for alias in node.names if _is_ours(alias.name))
        elif isinstance(node, ast.ImportFrom) and (node.level or _is_ours(node.module or "")):
            module = node.module.split(".") if node.module else []
            base = package[: len(package) - node.level + 1] + module if node.level else module[1:]
            for alias in node.names:
                full = ".".join([*base, alias.name])
                yield full if full in MODULES else ".".join(base)


def _is_ours(name: str) -> bool:
    return name.split(".")[0] == "lite3r_plugin"


@functools.cache
def graph() -> dict[str, set[str]]:
    """What each module imports."""
    return {name: set(imports(name)) - {name} for name in MODULES}


def circles(graph: dict[str, set[str]]) -> list[tuple[str, ...]]:
    """Groups of nodes that reach each other."""

    def reached(start: str) -> set[str]:
        seen, todo = set(), [start]
        while todo:
            new = graph.get(todo.pop(), set()) - seen
            seen |= new
            todo += new
        return seen

    reach = {node: reached(node) for node in graph}
    return sorted({tuple(sorted(other for other in reach[node] if node in reach.get(other, ()))) for node in graph if node in reach[node]})


def test_no_module_imports_itself_by_way_of_others() -> None:
    assert circles(graph()) == []


def test_every_package_stands_in_a_layer() -> None:
    known = {name for layer in LAYERS for name in layer}
    assert {name.split(".")[0] for name in MODULES if name} <= known


@pytest.mark.parametrize("name", sorted({name.split(".")[0] for name in MODULES if name}))
def test_imports_go_down(name: str) -> None:
    level = {package: i for i, layer in enumerate(LAYERS) for package in layer}
    upwards = [
        f"{module} imports {target or 'the package itself'}"
        for module, targets in graph().items()
        if module.split(".")[0] == name
        for target in targets
        if target.split(".")[0] != name and (not target or level[target.split(".")[0]] >= level[name])
    ]
    assert upwards == []


def test_the_face_imports_no_more_than_it_shows() -> None:
    assert {target.split(".")[0] for target in graph()[""]} <= FACE


def test_the_top_is_short() -> None:
    files = [path.name for path in PACKAGE.iterdir() if path.is_file()]
    assert len(files) <= 8, files


def test_circles_are_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [("a", "b", "c")]
