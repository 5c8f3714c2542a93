"""`distill` on several processes, and on those that somebody kills."""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from distilling import finish, kill, metrics, run, start
from toys import Adapter, toy_answer

from lite3r_plugin.adapter import plugins

RUNS: tuple[dict[str, Any], ...] = (
    {"steps": 8, "ema": 0.9, "save_every": 1, "trainable": "blocks"},
    {"steps": 4, "mode": "local", "trainable": "proj"},
    {"steps": 4, "shard": True, "trainable": "proj", "save_every": 2},
    {"steps": 4, "shard": True, "lora": True, "checkpointing": True},
    {"steps": 6, "shard": True, "trainable": "proj", "resume": True},
    {"steps": 3, "lora": True},
)


@pytest.fixture(autouse=True)
def _toy() -> Iterator[None]:
    adapter, threads = Adapter(toy_answer), torch.get_num_threads()
    plugins.get_manager().register(adapter, name="toy")
    torch.set_num_threads(1)  # as the other processes have: sums are in the same order
    yield
    torch.set_num_threads(threads)
    plugins.get_manager().unregister(adapter)


def kill_at_random(folder: Path, processes: int, fields: dict[str, Any]) -> None:
    """Start a run and kill it some time after its first steps; again where it was over before this process had its turn."""
    chance = random.Random(os.getpid())
    for _ in range(3):
        process = start(folder, processes, fields)
        steps, until = chance.randint(1, fields["steps"] // 3), time.monotonic() + 240
        while time.monotonic() < until and process.poll() is None:
            if (folder / "0" / "metrics.jsonl").exists() and len((folder / "0" / "metrics.jsonl").read_text().splitlines()) >= steps:
                break
            time.sleep(0.005)
        time.sleep(chance.random() * 0.03)
        if process.poll() is None:
            kill(process)
            return
        finish(process)
        shutil.rmtree(folder / "0")
    pytest.fail("three runs were over before they could be killed")


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_losses(tmp_path: Path) -> None:
    fields = {**RUNS[0], "steps": 12}
    run(tmp_path / "whole", **fields)
    kill_at_random(tmp_path, 1, fields)
    run(tmp_path / "0", resume=True, **fields)
    assert metrics(tmp_path / "0") == metrics(tmp_path / "whole")
    assert sorted(path.name for path in (tmp_path / "0").iterdir()) == ["metrics.jsonl", "training.safetensors"]


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes made of `RUNS`."""
    folder = tmp_path_factory.mktemp("together")
    (folder / "4").symlink_to("2")  # goes on from that one
    error = finish(start(folder, 2, *RUNS))
    assert error.count("all steps are done") == len(RUNS)  # only one of the processes says it
    assert "2 samples, 2 processes on cpu" in error
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1, 2, 3, 5])
def test_two_processes_take_the_steps_of_one_with_twice_the_batches(number: int, together: Path, tmp_path: Path) -> None:
    fields = {name: value for name, value in RUNS[number].items() if name != "shard"}
    run(tmp_path, **fields, accumulate=2)
    for name in ("loss", "gradient_norm", "learning_rate"):
        mine, theirs = metrics(tmp_path, name), metrics(together / str(number), name)
        assert list(theirs)[: len(mine)] == list(mine)
        assert [theirs[step] for step in mine] == pytest.approx(list(mine.values()), rel=1e-4)


@pytest.mark.slow
def test_two_processes_that_are_killed_go_on_to_the_same_losses(together: Path, tmp_path: Path) -> None:
    kill_at_random(tmp_path, 2, RUNS[0])
    finish(start(tmp_path, 2, {**RUNS[0], "resume": True}))
    assert metrics(tmp_path / "0") == metrics(together / "0")


@pytest.mark.slow
def test_a_sharded_run_goes_on(together: Path, tmp_path: Path) -> None:
    losses = metrics(together / "4")
    assert list(losses) == [1, 2, 3, 4, 5, 6]
    run(tmp_path, trainable="proj", accumulate=2, steps=4)
    run(tmp_path, trainable="proj", accumulate=2, steps=6, resume=True)
    assert list(losses.values()) == pytest.approx(list(metrics(tmp_path).values()), rel=1e-4)
