"""Saving and loading that are interrupted: at any line of the package, and by a signal that nothing can catch.

``--fuzz-seconds`` makes them go on for longer than a sample takes; with some minutes every line has its turn.
"""

from __future__ import annotations

import functools
import json
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from checkpoints import JSON, WEIGHTS, snapshot
from safetensors import safe_open
from torch import nn
from toys import Toy, images, toy_adapter

import lite3r_plugin
from lite3r_plugin import apply_lite3r, load_lite3r, remove_lite3r, save_lite3r
from lite3r_plugin.apply.lookup import lite3r_modules
from lite3r_plugin.errors import CheckpointError
from lite3r_plugin.testing import TEST_CONFIG

__all__ = ["toy_adapter"]  # the fixture
pytestmark = pytest.mark.usefixtures("adapter")
PACKAGE = str(Path(lite3r_plugin.__file__).parent)
SECONDS = 1.0  # of this process: another that is busy takes none of them


def interrupted(call: Callable[[], Any], at: int | None) -> tuple[int, str]:
    """Call it and raise `KeyboardInterrupt` before the line of number `at` of the package; how many lines ran, and which was the last."""
    count, last = 0, ""

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count, last
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if event == "line":
            count, last = count + 1, f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
            if count == at:
                raise KeyboardInterrupt(last)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        if at is None:
            raise
    finally:
        sys.settrace(before)
    return count, last


def places(lines: int, pytestconfig: pytest.Config) -> list[int]:
    """Numbers of lines, all of them, in an order by chance: those that time is left for have their turn."""
    seconds = pytestconfig.getoption("--fuzz-seconds")
    order = list(range(1, lines + 1))
    random.Random(0 if seconds is None else time.time()).shuffle(order)
    return order


def until(pytestconfig: pytest.Config) -> float:
    seconds = pytestconfig.getoption("--fuzz-seconds")
    return time.process_time() + (SECONDS if seconds is None else seconds)


def say(capsys: pytest.CaptureFixture[str], text: str) -> None:
    with capsys.disabled():
        sys.stdout.write(text)


def branches(precision: Any, value: float, **fields: Any) -> Toy:
    model = apply_lite3r(Toy().eval(), TEST_CONFIG, precision=precision, **fields)
    for module in lite3r_modules(model).values():
        if module.sparse:
            nn.init.constant_(module.proj_lin.weight, value)
    return model


def finite(model: Toy) -> bool:
    return bool(model(images()).isfinite().all())


@pytest.mark.parametrize(
    ("precision", "device"),
    [
        ("full", "cpu"),
        ("fp8", "meta"),
        *(
            pytest.param(*form, marks=pytest.mark.slow)
            for form in (("full", "meta"), ("fp8_qat", "cpu"), ("fp8_qat", "meta"), ("fp8", "cpu"))
        ),
    ],
)
def test_loading(precision: Any, device: str, tmp_path: Path, pytestconfig: pytest.Config, capsys: pytest.CaptureFixture[str]) -> None:
    """The model is what it was to the bit. After the last change it may be the loaded one, whole."""
    saved = branches(precision, 0.5)
    save_lite3r(saved, tmp_path, whole=True)
    want = saved(images())

    def dense() -> Toy:
        with torch.device(device):
            return Toy().eval()

    model, seen = dense(), Counter[str]()
    lines = interrupted(lambda: load_lite3r(dense(), tmp_path), None)[0]
    end = until(pytestconfig)
    for at in places(lines, pytestconfig):
        before = snapshot(model)
        _, last = interrupted(functools.partial(load_lite3r, model, tmp_path), at)
        if snapshot(model) == before:
            seen["as before"] += 1
        else:
            assert torch.equal(model(images()), want), last
            if precision != "fp8":
                assert finite(remove_lite3r(model))
            seen["loaded"] += 1
            model = dense()
        if time.process_time() > end:
            break
    say(capsys, f"\nloading, {precision}, {device}: of {lines} lines {sum(seen.values())} interrupted: {dict(seen)}")
    assert seen["loaded"] <= 0.02 * lines
    assert seen["as before"] > 10


@pytest.mark.parametrize("precision", ["full", "fp8"])
def test_saving(precision: Any, tmp_path: Path, pytestconfig: pytest.Config, capsys: pytest.CaptureFixture[str]) -> None:
    """The model is not touched, and there is no file but the two."""
    old, new = branches(precision, 1.0, feature_map="softmax"), branches(precision, 2.0, feature_map="elu")
    save_lite3r(old, tmp_path)
    before, seen = snapshot(new), Counter[str]()
    lines = interrupted(lambda: save_lite3r(new, tmp_path / "other"), None)[0]
    end = until(pytestconfig)
    for at in places(lines, pytestconfig):
        save_lite3r(old, tmp_path)
        interrupted(lambda: save_lite3r(new, tmp_path), at)
        assert snapshot(new) == before
        seen[state_of(tmp_path)] += 1
        if time.process_time() > end:
            break
    say(capsys, f"\nsaving, {precision}: of {lines} lines {sum(seen.values())} interrupted: {dict(seen)}")
    save_lite3r(old, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == [WEIGHTS, JSON]
    assert seen["old"] > 10


def state_of(folder: Path) -> str:
    """Whose checkpoint `folder` holds: "old", "new", or "old, refused" and "new, refused", where its weights are whole and say so."""
    try:
        model = load_lite3r(Toy().eval(), folder)
    except CheckpointError as error:
        assert "do not belong together" in str(error) or f"holds no {JSON}" in str(error)  # noqa: PT017
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            (folder / JSON).write_text(file.metadata()["lite3r"])
        return f"{state_of(folder)}, refused"
    module = lite3r_modules(model)["cross.0"]
    found = module.state.config.feature_map, *module.proj_lin.weight.unique().tolist()
    return {("softmax", 1.0): "old", ("elu", 2.0): "new"}[found]


KILLS = """
import json, os, pathlib, random, signal, sys, time
from collections import Counter
from test_checkpoint_interrupted import branches, state_of
from lite3r_plugin import save_lite3r
from lite3r_plugin.adapter import plugins
from toys import Adapter, toy_answer

plugins.get_manager().register(Adapter(toy_answer), name="toy")
folder, kills, seed = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
models = [branches("full", 1.0, feature_map="softmax"), branches("full", 2.0, feature_map="elu")]
rng, seen = random.Random(seed), Counter()
start = time.perf_counter()
for model in models * 5:
    save_lite3r(model, folder / "0")
takes = (time.perf_counter() - start) / 10
for i in range(kills):
    here = folder / str(i % 7)  # some are there already, some are not
    child = os.fork()
    if child == 0:
        while True:
            for model in models:
                save_lite3r(model, here)
    time.sleep(rng.uniform(0, 4 * takes))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    if not here.exists() or not (here / "lite3r.safetensors").exists():
        seen["nothing yet"] += 1
        continue
    seen[state_of(here)] += 1
for i in range(min(kills, 7)):
    save_lite3r(models[0], folder / str(i))
    assert sorted(path.name for path in (folder / str(i)).iterdir()) == ["lite3r.safetensors", "lite3r_config.json"]
    assert state_of(folder / str(i)) == "old"
print(json.dumps(seen))
"""


@pytest.mark.slow
def test_kill(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At random moments of saves, one after the other: one of the two checkpoints is there, or is refused and its weights make it whole."""
    kills = 24
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "helpers")]
    code = f"import sys; sys.path[:0] = {paths!r}\n{KILLS}"
    run = subprocess.run([sys.executable, "-c", code, tmp_path, str(kills), "0"], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    seen = json.loads(run.stdout)
    say(capsys, f"\n{kills} kills: {seen}")
    assert sum(seen.values()) == kills
    assert set(seen) <= {"old", "new", "old, refused", "new, refused", "nothing yet"}
    assert seen.get("old", 0) + seen.get("new", 0) > 0
