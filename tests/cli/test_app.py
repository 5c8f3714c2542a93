"""The command line as users meet it: help, version, errors and warnings in one line, commands of other packages."""

from __future__ import annotations

import errno
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer
from commands import fails, lite3r
from typer.testing import CliRunner

import lite3r_plugin
from lite3r_plugin import hookimpl
from lite3r_plugin.adapter.plugins import AdapterWarning, get_manager
from lite3r_plugin.cli.app import app
from lite3r_plugin.errors import InputError

Add = Callable[[str, Callable[[typer.Typer], None]], None]


@pytest.fixture
def add() -> Iterator[Add]:
    """Installs a plugin whose command hook is the given function."""
    names = []

    def register(name: str, commands: Callable[[typer.Typer], None]) -> None:
        get_manager().register(SimpleNamespace(lite3r_commands=hookimpl(commands)), name=name)
        names.append(name)

    yield register
    for name in names:
        get_manager().unregister(name=name)


def test_help_and_version() -> None:
    for command in ("demo", "bench", "eval", "reconstruct", "adapters"):
        assert command in lite3r("--help").stdout
        assert "Usage" in lite3r(command, "--help").stdout
    assert lite3r("--version").stdout.strip() == f"lite3r-plugin {lite3r_plugin.__version__}"


COMMANDS = (
    "bench", "calibrate", "convert-official", "demo", "distill", "doctor", "eval", "push", "reconstruct", "view", "adapters inspect",
)  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_whole_words_as_they_were_written(command: str) -> None:
    """At 80 columns nothing is cut off, and no name between colons is taken for a picture."""
    shown = lite3r(*command.split(), "--help").stdout
    assert "…" not in shown
    assert not [character for character in shown if ord(character) > 0x2600]


def test_names_between_colons_stay_names(tmp_path: Path) -> None:
    assert fails("reconstruct", tmp_path / ":key:", "--model", "testbed").startswith(f"error: {tmp_path}/:key: does not exist")


def test_module_and_error_in_a_real_process(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lite3r_plugin", "reconstruct", "none", "--model", "testbed"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines() == ["error: none does not exist; name photographs of one scene: a folder, files, a video, a list"]


def hello(app: typer.Typer) -> None:
    @app.command()
    def hello(name: str = "world") -> None:
        """Greet."""
        if name == "nobody":
            raise InputError("nobody is there")
        warnings.warn("a library's own affair", FutureWarning, stacklevel=2)
        warnings.warn("greetings are not translated", AdapterWarning, stacklevel=2)
        typer.echo(f"hello {name}")


def test_another_package_adds_a_command(add: Add) -> None:
    """It is listed, has help, and its warnings and errors are shown as those of built-in ones."""
    add("theirs", hello)
    help_text = lite3r("--help").stdout
    assert "hello" in help_text
    assert "Greet." in help_text
    assert "--name" in lite3r("hello", "--help").stdout
    result = lite3r("hello", "--name", "you")
    assert result.stdout == "hello you\n"
    assert result.stderr.splitlines() == ["warning: greetings are not translated"]
    assert fails("hello", "--name", "nobody") == "error: nobody is there"


def test_a_plugin_that_fails_is_named_and_skipped_whole(add: Add) -> None:
    def broken(app: typer.Typer) -> None:
        hello(app)
        raise RuntimeError("no luck")

    add("broken", broken)
    add("theirs", lambda app: app.command("greet")(lambda: None))
    result = lite3r("--help")
    assert "'broken' (of no distribution) failed, and its broken was skipped: RuntimeError: no luck" in result.stderr
    assert "hello" not in result.stdout
    assert "greet" in result.stdout
    assert "No such command" in lite3r("hello", code=2).stderr


def test_a_command_whose_help_cannot_be_shown_takes_no_help_away(add: Add) -> None:
    add("theirs", lambda app: app.command("greet", help="[/bold] of nothing")(lambda: None))
    result = lite3r("--help")
    assert "'theirs' (of no distribution) failed" in result.stderr
    assert "demo" in result.stdout


def test_a_plugin_that_exits_is_named_and_skipped(add: Add) -> None:
    def leave(app: typer.Typer) -> None:
        sys.exit(0)

    add("leaves", leave)
    result = lite3r("--help")
    assert "'leaves' (of no distribution) failed, and its leave was skipped: SystemExit: 0" in result.stderr
    assert "demo" in result.stdout


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "cloud.ply"), "error: No space left on device: cloud.ply"),
        (PermissionError(errno.EACCES, "Permission denied"), "error: Permission denied"),
        (OSError("the disk is gone"), "error: the disk is gone"),
    ],
    ids=["file", "no file", "no number"],
)
def test_errors_of_the_system_are_one_line(add: Add, error: OSError, line: str) -> None:
    def write(app: typer.Typer) -> None:
        @app.command()
        def write() -> None:
            raise error

    add("writes", write)
    assert fails("write") == line


def test_names_that_are_taken_stay_what_they_are(add: Add) -> None:
    add("first", lambda app: app.command("greet")(lambda: typer.echo("first")))
    add("second", lambda app: app.command("greet")(lambda: typer.echo("second")))
    add("third", lambda app: app.command("demo")(lambda: typer.echo("third")))
    result = lite3r("--help")
    assert "'greet' of the plugin" in result.stderr
    assert "'demo' of the plugin 'third' (of no distribution) was skipped" in result.stderr
    assert "--repeats" in lite3r("demo", "--help").stdout


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("lite3r recon", ["reconstruct"]),
        ("lite3r bench --model vg", ["vggt"]),
        ("lite3r eval --config keep_", ["keep_ratio=", "keep_originals="]),
        ("lite3r calibrate --dtype bf", []),
        ("lite3r calibrate --dtype b", ["bfloat16"]),
        ("lite3r demo --device c", ["cpu"]),
        ("lite3r bench --time", ["--time-budget"]),
    ],
)
def test_shells_complete(typed: str, offered: list[str]) -> None:
    words = typed.split()
    environment = {"_LITE3R_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(len(words) - 1)}
    said = CliRunner().invoke(app, [], prog_name="lite3r", env=environment).stdout.split()
    assert set(offered) <= set(said)
    assert all(word.startswith(words[-1]) for word in said)


def test_how_to_complete_is_in_the_help() -> None:
    assert "--install-completion" in lite3r("--help").stdout
