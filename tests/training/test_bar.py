"""`Bar`: what a log gets to see of a long call."""

from __future__ import annotations

import io
import time
from collections.abc import Callable

import pytest
from rich.console import Console

from lite3r_plugin.training import bar as module
from lite3r_plugin.training.bar import Bar


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EVERY_S", 0.02)


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_a_log_gets_lines_with_the_time_to_go_until_the_end() -> None:
    log = io.StringIO()
    with Bar(Console(file=log)) as bar:
        task = bar.add_task("loading", total=None)
        wait_for(lambda: "loading, 0 s so far\n" in log.getvalue())
        for done in range(4):
            bar.stage(task, "fitting [1]", done, 1000)
            time.sleep(0.01)
        wait_for(lambda: "fitting [1], 3 of 1000, 0 s so far, about " in log.getvalue())
        assert log.getvalue().rstrip().endswith(" to go")
    told = log.getvalue()
    time.sleep(0.1)
    assert log.getvalue() == told


@pytest.mark.parametrize(("terminal", "told", "wrong"), [(False, "fitting, 2 done, 0 s so far", "2 of"), (True, " 2 ", "2/")])
def test_a_stage_without_an_end_has_not_that_of_the_stage_before(terminal: bool, told: str, wrong: str) -> None:
    log = io.StringIO()
    with Bar(Console(file=log, force_terminal=terminal, width=100)) as bar:
        task = bar.add_task("calibrating", total=None)
        for done in range(2):
            bar.stage(task, "running dense", done, 1)
        for done in range(3):
            bar.stage(task, "fitting", done, None)
        if terminal:
            bar.refresh()
        wait_for(lambda: told in log.getvalue())
    assert wrong not in log.getvalue()


def test_a_share_is_told_in_percent() -> None:
    log = io.StringIO()
    with Bar(Console(file=log), percent=True) as bar:
        bar.update(bar.add_task("distilling", total=1.0), completed=0.25)
        wait_for(lambda: "distilling, 25 %" in log.getvalue())


def test_who_is_quiet_says_nothing() -> None:
    log = io.StringIO()
    with Bar(Console(file=log, quiet=True)) as bar:
        bar.add_task("fitting", total=1)
        time.sleep(0.1)
    assert log.getvalue() == ""


def test_a_terminal_has_a_bar_with_the_time_to_go_and_no_lines() -> None:
    log = io.StringIO()
    with Bar(Console(file=log, force_terminal=True, width=100)) as bar:
        task = bar.add_task("fitting", total=None)
        for done in range(3):
            bar.stage(task, "fitting", done, 4)
            time.sleep(0.05)
        bar.refresh()
    shown = log.getvalue()
    assert "2/4" in shown
    assert "0:00:00" in shown
    assert "so far" not in shown
