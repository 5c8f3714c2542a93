"""Output files: whole or not at all, whoever writes beside."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from interruptions import interrupted, lines_of
from safetensors.torch import save_file

from lite3r_plugin.errors import InputError
from lite3r_plugin.files import check_output, filling, locked, replacing, to_json, write_atomically


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    write_atomically(path, "old")

    def fail() -> None:
        with replacing(path) as beside:
            beside.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["x.txt"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_the_umask_says_who_may_read(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        with replacing(tmp_path / "a.safetensors") as beside:
            save_file({"a": torch.zeros(1)}, beside)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == 0o666 & ~umask


def test_a_link_that_lies_in_wait_is_not_followed(tmp_path: Path) -> None:
    """What is replaced is the name, and what is written to is new."""
    target = tmp_path / "target"
    target.write_text("mine")
    (tmp_path / "x").symlink_to(target)
    write_atomically(tmp_path / "x", "new")
    assert target.read_text() == "mine"
    assert (tmp_path / "x").read_text() == "new"


def test_threads_do_not_meet_in_one_file(tmp_path: Path) -> None:
    path, seen = tmp_path / "x", Counter[str]()
    size = 300_000

    def write(letter: str) -> None:
        for _ in range(20):
            write_atomically(path, letter * size)

    write_atomically(path, "a" * size)
    threads = [threading.Thread(target=write, args=(letter,)) for letter in "abc"]
    for thread in threads:
        thread.start()
    while not seen or any(thread.is_alive() for thread in threads):
        content = path.read_bytes()
        seen["whole" if len(content) == size and len(set(content)) == 1 else "torn"] += 1
    assert set(seen) == {"whole"}
    assert os.listdir(tmp_path) == ["x"]


def test_what_a_killed_process_left_is_cleared_away(tmp_path: Path) -> None:
    path = tmp_path / "x"
    code = f"""
import pathlib, time
from lite3r_plugin.files import replacing
with replacing(pathlib.Path({str(path)!r})) as beside:
    beside.write_text("half")
    print("writing", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    write_atomically(path, "while the other one is alive")
    assert len(os.listdir(tmp_path)) == 2
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    write_atomically(path, "new")
    assert os.listdir(tmp_path) == ["x"]


def test_an_interruption_anywhere_leaves_no_lock(tmp_path: Path) -> None:
    def lock() -> None:
        with locked(tmp_path):
            pass

    for line in range(1, lines_of(lock) + 1):
        interrupted(lock, line)
        descriptor = os.open(tmp_path, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises where somebody else has it
        os.close(descriptor)


def test_what_another_host_left_is_kept_for_a_day(tmp_path: Path) -> None:
    young, old, other = (tmp_path / f".{name}.elsewhere.1.00ff.tmp" for name in ("x", "x", "y"))
    young = tmp_path / ".x.elsewhere.2.00ff.tmp"
    for folder in (young, old, other):
        folder.mkdir()
        (folder / "part").touch()
    os.utime(old, (0, time.time() - 2 * 24 * 3600))
    write_atomically(tmp_path / "x", "new")
    assert {young.name, other.name, "x"} == set(os.listdir(tmp_path))


def test_a_file_that_cannot_be_written_is_told_by_the_name_that_it_would_get(tmp_path: Path) -> None:
    def fill() -> None:
        with filling(tmp_path / "scene", "last") as folder:
            (folder / "a").mkdir()
            write_atomically(folder / "a", "text")

    with pytest.raises(InputError) as found:
        fill()
    assert str(found.value).startswith(f"{tmp_path / 'scene' / 'a'} cannot be written: ")
    assert not list(tmp_path.iterdir())


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be written: No such file or directory"):
        write_atomically(tmp_path / "no" / "x", "new")
    with pytest.raises(InputError, match="does not exist; create it first"):
        check_output(tmp_path / "no" / "x.png", ".png")


def test_numbers_that_json_does_not_have_are_null() -> None:
    data = {"a": [1.5, float("nan")], "b": {"c": (float("inf"), True, None, "nan")}}
    assert json.loads(to_json(data), parse_constant=lambda name: pytest.fail(name)) == {
        "a": [1.5, None],
        "b": {"c": [None, True, None, "nan"]},
    }


def test_a_name_that_is_too_long_is_refused(tmp_path: Path) -> None:
    for length in (151, 400):
        with pytest.raises(InputError, match="too long for the name of a file"):
            check_output(tmp_path / ("x" * length + ".json"), ".json")
