"""Shared test set-up: determinism, poisoned uninitialised memory, Triton's interpreter on CPUs, the markers `gpu` and `exact`."""

from __future__ import annotations

import functools
import gc
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from types import CodeType
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton kernels are defined, so before any of them is imported
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton 3.9 warns when it is unset

TESTS = Path(__file__).parent
sys.path.insert(0, str(TESTS / "helpers"))  # helper modules: numerics, hosts

# Fills torch.empty with NaN, so an output element that nothing wrote fails its test.
torch.use_deterministic_algorithms(True, warn_only=True)
torch.utils.deterministic.fill_uninitialized_memory = True


def look_through_triton_once() -> None:
    """Let Triton's interpreter remember which functions of its language it replaces, that it did, and which dtypes are numpy's.

    It looks through all of the language whenever a kernel starts or calls a function, which was half of its time.
    """
    from triton.language.core import is_builtin
    from triton.runtime import interpreter

    language, replace_all, start, numpy_dtype = (
        interpreter.tl, interpreter._patch_lang, interpreter.GridExecutor.__call__, interpreter._get_np_dtype
    )  # fmt: skip
    replaced: set[Any] = set()  # for the kernel that runs
    dtypes: dict[str, Any] = {}

    @functools.cache
    def builtins(package: object) -> list[str]:
        return [name for name, member in inspect.getmembers(package) if is_builtin(member)]

    def replace(package: object, *rest: object) -> None:
        for name in builtins(package):
            if is_builtin(member := getattr(package, name)):  # it is none where it is replaced already
                interpreter._patch_attr(package, name, member, *rest)

    def replace_for(function: Any) -> object:
        seen = {value for value in function.__globals__.values() if value is language or value is language.core}
        if seen <= replaced:
            return None  # only what replaces is given back, by the kernel
        replaced.update(seen)
        return replace_all(function)

    def run(kernel: object, *args: object, **kwargs: object) -> None:
        replaced.clear()
        start(kernel, *args, **kwargs)

    def dtype_of(kind: Any) -> Any:
        if (found := dtypes.get(kind.name)) is None:
            found = dtypes[kind.name] = numpy_dtype(kind)
        return found

    interpreter._patch_builtin = replace
    interpreter._patch_lang = replace_for
    interpreter.GridExecutor.__call__ = run
    interpreter._get_np_dtype = dtype_of


if os.environ.get("TRITON_INTERPRET") and importlib.util.find_spec("triton"):
    look_through_triton_once()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--data-root", help="folder with real samples, one folder for each layout of lite3r_plugin.scene.data, for tests/scene/data"
    )
    parser.addoption(
        "--fuzz-seconds", type=float, help="how long each fuzz test goes on, from a seed by chance; else shortly and from one seed"
    )
    parser.addoption("--bounds", action="store_true", help="fail where an interpreted kernel reads or writes outside of its tensors")
    parser.addoption("--every-line", action="store_true", help="interrupt before every line in tests/apply/test_interruptions.py")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--bounds") and os.environ.get("TRITON_INTERPRET"):
        from bounds import keep_to_bounds

        keep_to_bounds()


# What compares bit for bit: that must hold with every vector width and number of threads of torch's products and sums.
EXACT = ("torch.equal(", "rtol=0, atol=0", "atol=0, rtol=0", "assert_same_bits(", "assert_equal(", "assert_array_equal(")

# Files of tests whose bits torch has no part in: numpy and Pillow read data, numpy runs Triton's interpreter, and what was damaged or
# interrupted is compared with what was there before.
NOT_BY_TORCH = (
    "scene/data/*", "scene/export/*", "ops/*/test_kernels.py", "ops/sla/test_forward.py", "ops/sla/test_backward.py", "fuzz/*",
    "apply/*interrupt*",
)  # fmt: skip


def last_line(code: CodeType) -> int:
    """Of a function, with the functions inside of it."""
    inner = (last_line(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return max(0, *(line or 0 for _, _, line in code.co_lines()), *inner)


@functools.cache
def compares_bits(test: Callable[..., object]) -> bool:
    """Whether a test does, by its source: read once for all its parameters; `inspect.getsource` would split the file into tokens."""
    lines, first = inspect.findsource(test)
    return any(words in line for line in lines[first : last_line(test.__code__)] for words in EXACT)


@functools.cache
def computed_by_torch(path: Path) -> bool:
    """Whether torch has a part in what the tests of a file compare."""
    return not any(fnmatch(str(path), f"{TESTS}/{pattern}") for pattern in NOT_BY_TORCH)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Where only exact tests are wanted, files without any are not imported, nor what they import."""
    if not config.getoption("markexpr").startswith("exact") or not collection_path.match("test_*.py"):
        return None
    source = collection_path.read_text()
    return None if computed_by_torch(collection_path) and any(words in source for words in EXACT) else True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if computed_by_torch(item.path) and isinstance(item, pytest.Function) and compares_bits(inspect.unwrap(item.function)):
            item.add_marker("exact")
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(autouse=True, scope="module")
def _settled() -> None:
    """What is there stays, libraries and compilers' caches above all: a collection of garbage need not look through them each time.

    The benchmark asks for one before each measurement.
    """
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[object]) -> None:
    """What several tests share does not depend on those that ran before it, which processes divide by chance."""
    if fixturedef.scope != "function":
        torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
