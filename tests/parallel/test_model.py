"""One scene on two and on three processes, against one: outputs, gradients, what is undone, what ends a run."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import spreading
import torch
from filelock import FileLock

from lite3r_plugin.adapter.plugins import find_gathered
from lite3r_plugin.errors import ParallelError
from lite3r_plugin.parallel import parallelize_views


@dataclass(frozen=True)
class Found:
    """What cases found, by the run and their name, and files that they wrote."""

    cases: dict[str, dict[str, list[Any]]]
    folder: Path


def found_by(factory: pytest.TempPathFactory, name: str, *runs: str) -> Found:
    """What all processes found in all cases: started once, by the first worker of the tests that asks."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    results = {run: folder / f"{run}.json" for run in runs}
    with FileLock(folder.with_suffix(".lock")):
        if not all(path.exists() for path in results.values()):
            folder.mkdir(exist_ok=True)
            start(folder, results)
    return Found({run: json.loads(path.read_text()) for run, path in results.items()}, folder)


def start(folder: Path, results: dict[str, Path]) -> None:
    """Run all cases of these runs to their end, which must leave their results."""
    process = spreading.start(folder, *results)
    try:
        said, _ = process.communicate(timeout=300)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert all(path.exists() for path in results.values()), said[-3000:]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """On two processes."""
    return found_by(tmp_path_factory, "two", "two")


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """The same on three processes, and on two with other packages, which is slow."""
    pytest.importorskip("depth_anything_3")
    return found_by(tmp_path_factory, "others", "three", "packages")


@pytest.fixture
def found(run: str, request: pytest.FixtureRequest) -> Found:
    """What `run` found."""
    return request.getfixturevalue("two" if run == "two" else "others")


THREE = pytest.param("three", marks=pytest.mark.slow)


def ranks(found: Found, run: str, name: str) -> list[Any]:
    """What each process found; no case may have failed."""
    one = found.cases[run][name]
    assert not [rank for rank in one if "error" in rank], one
    return one


@pytest.mark.parametrize(
    ("run", "name", "sparse", "dense"),
    [
        ("two", "sparse_with_marginal_branch", 2, 0),
        pytest.param("three", "sparse_with_marginal_branch", 2, 0, marks=pytest.mark.slow),
        ("two", "sparse_without_branch_or_means", 2, 0),
        ("two", "sparse_with_branch_over_all", 2, 0),
        ("two", "sparse_with_the_reference_as_keys", 2, 0),
        pytest.param("three", "sparse_with_the_reference_as_keys", 2, 0, marks=pytest.mark.slow),
        ("two", "dense_with_branch_over_all", 0, 2),
        pytest.param("three", "dense_with_branch_over_all", 0, 2, marks=pytest.mark.slow),
        ("two", "dense_without_lite3r", 0, 0),
        ("two", "fp8_emulated", 2, 0),
        ("two", "images_without_a_batch", 2, 0),
        ("two", "hosts_that_make_their_own_attention", 1, 0),
        ("two", "camera_head_of_vggt", 2, 0),
        pytest.param("packages", "depth_anything_3", 1, 0, marks=pytest.mark.slow),
    ],
)
def test_outputs_are_those_of_one_process(found: Found, run: str, name: str, sparse: int, dense: int) -> None:
    for one in ranks(found, run, name):
        assert one["difference"] < 1e-5
        assert (one["sparse"], one["dense"]) == (sparse, dense)
        assert one["stand_in"]
        assert len(one["counts"]) == spreading.PROCESSES[run]
        assert len(set(one["counts"])) > 1  # uneven


@pytest.mark.parametrize("run", ["two", THREE])
def test_keys_of_heads_travel_while_those_before_are_attended_with(found: Found, run: str) -> None:
    one_site = ["leave", "leave", "arrive", "leave", "arrive", "leave", "arrive", "arrive"]  # of four groups, never more than two
    for one in ranks(found, run, "heads_in_groups"):
        assert one["same"]
        assert one["steps"] == 2 * one_site
        assert not any(one["held"])
        assert (one["sparse"], one["dense"]) == (4, 0)


def test_images_that_are_returned_are_those_that_were_given(two: Found) -> None:
    for one in ranks(two, "two", "images_that_are_returned"):
        assert one["difference"] < 1e-5
        assert one["same"]
        assert one["held"] == 0
        assert one["own"]
        assert one["gradient"]


@pytest.mark.parametrize("run", ["two", THREE])
def test_each_process_may_give_and_keep_its_own_views(found: Found, run: str) -> None:
    for one in ranks(found, run, "sharded"):
        assert one["difference"] < 1e-5
        assert one["again"] == 0
        assert one["own"]


@pytest.mark.parametrize(
    ("run", "name"),
    [
        ("two", "gradients_of_gathered_outputs"),
        pytest.param("three", "gradients_of_gathered_outputs", marks=pytest.mark.slow),
        ("two", "gradients_of_sharded_outputs"),
        pytest.param("three", "gradients_of_sharded_outputs", marks=pytest.mark.slow),
        ("two", "gradients_by_groups_of_heads"),
        pytest.param("three", "gradients_by_groups_of_heads", marks=pytest.mark.slow),
        ("two", "gradients_with_checkpointing"),
    ],
)
def test_gradients_add_up_to_those_of_one_process(found: Found, run: str, name: str) -> None:
    for one in ranks(found, run, name):
        assert one["difference"] < 1e-12
        assert one["others"] < 1e-12
        assert one["known"] > 0.9 * one["count"] > 100


def test_blocks_run_compiled_around_attention(two: Found) -> None:
    for one in ranks(two, "two", "compiled_blocks"):
        assert one["difference"] < 1e-5
        assert (one["sparse"], one["dense"]) == (1, 1)
        assert one["report"] == ["6 blocks compiled"]
        assert one["spread"] >= 6  # around both sites, and frame blocks
        assert one["anew"] == 0


def test_what_fails_in_compiled_blocks_does_not_run_twice_in_one_process(two: Found) -> None:
    for rank, one in enumerate(ranks(two, "two", "compiled_blocks_that_fail")):
        assert one["own"] == "the disk is full"
        assert one["calls"] == [1]
        assert f"rank {rank} failed: OSError: the disk is full" in one["later"]
        assert "no compiler today" in one["failed"]
        assert one["difference"] < 1e-5
        assert "no compiler today" in one["report"][0]


@pytest.mark.parametrize("run", ["two", THREE])
def test_gradients_of_heads_go_back_while_those_before_are_computed(found: Found, run: str) -> None:
    way = ["back 4", "back 3", "home 4", "back 2", "home 3", "back 1", "home 2", "home 1"]
    second = [f"{word} {int(number) + 4}" for word, number in map(str.split, way)]
    for one in ranks(found, run, "gradients_by_groups_of_heads"):
        assert one["steps"] == [*second, *way]


def test_the_model_is_as_it_was_afterwards(two: Found) -> None:
    for one in ranks(two, "two", "undone"):
        assert one["same"]
        assert one["tables"]
        assert one["keys"]
        assert one["hooks"]
        assert "already" in one["twice"][0]
        assert "called by itself" in one["part"][0]


def test_no_group_takes_the_name_of_one_that_is_gone(two: Found) -> None:
    """Else a process now and then finds the address at which another could be reached before."""
    for names in ranks(two, "two", "groups_one_after_the_other"):
        assert len(set(names)) == 6


@pytest.mark.parametrize("run", ["two", THREE])
def test_processes_that_were_in_unlike_groups_meet(found: Found, run: str) -> None:
    assert all(one["told"] and all(one["told"]) for one in ranks(found, run, "groups_that_overlap"))


def test_a_process_that_waits_in_vain_says_so_and_may_try_again(two: Found) -> None:
    first, second = ranks(two, "two", "a_group_that_one_makes_too_late")
    assert "all of them call parallelize_views" in first["said"][0]
    assert first["numbers"] == second["numbers"] == [[1], [1]]


def test_processes_of_which_one_was_too_late_meet_again(two: Found) -> None:
    for one in ranks(two, "two", "a_group_that_one_has_too_late"):
        assert one["numbers"] == [[[1], [1]]] * 2


def test_no_process_has_a_group_before_all_have_it(two: Found) -> None:
    """Else one that closes it at once breaks the connections of another that still makes it."""
    assert all(one["seconds"] >= 0.5 for one in ranks(two, "two", "a_group_that_one_makes_late"))


def test_what_cannot_be_spread_is_refused_everywhere(two: Found) -> None:
    for one in ranks(two, "two", "views_that_meet"):
        assert "views meet outside of the attention sites" in one["mean"][0]
        assert "1 views cannot be spread over 2 processes" in one["few"][0]
        assert "no module 'head'" in one["module"][0]
        assert "attends over views" in one["single"][0]


@pytest.mark.slow
def test_a_reference_view_that_is_chosen_by_what_is_in_it_is_refused(others: Found) -> None:
    for one in ranks(others, "packages", "depth_anything_3"):
        assert 'ref_view_strategy="first"' in one["refused"][0]


def test_processes_that_are_given_something_else_say_so_and_go_on(two: Found) -> None:
    first, second = ranks(two, "two", "one_rank_has_other_images")
    for one in (first, second):
        assert "rank 1 gives" in one["other"][0]
        assert one["views"] == spreading.VIEWS
    assert "the first tensor of the call is [3]" in first["wrong"][0]
    assert "rank 0 refused" in second["wrong"][0]


@pytest.mark.parametrize("run", ["two", THREE])
def test_a_forward_that_fails_ends_the_others_with_its_reason(found: Found, run: str) -> None:
    for rank, one in enumerate(ranks(found, run, "one_rank_fails")):
        if rank == 1:
            assert one["own"] == "the disk is full"
        else:
            assert "rank 1 failed: OSError: the disk is full" in one["said"][0]
        assert "parallelize_views" in one["later"][0]
        assert one["seconds"] < 60


@pytest.mark.parametrize("run", ["two", THREE])
def test_a_process_that_dies_ends_the_others(found: Found, run: str) -> None:
    (one,) = ranks(found, run, "one_rank_dies")
    assert "died" in one["said"][0]
    assert one["seconds"] < 60
    assert "all of them call parallelize_views" in one["alone"][0]


def test_without_processes_it_says_how_to_start_them() -> None:
    with pytest.raises(ParallelError, match="torchrun"):
        parallelize_views(spreading.testbed())


@pytest.mark.parametrize(("field", "value"), [("inputs", "all"), ("outputs", "none"), ("timeout", 0)])
def test_wrong_options_are_named(field: str, value: Any) -> None:
    with pytest.raises(ParallelError, match=field):
        parallelize_views(torch.nn.Identity(), **{field: value})


def test_weights_must_be_the_same(two: Found) -> None:
    for said in ranks(two, "two", "other_weights"):
        assert "the weights of rank 1 are others" in said[0]


@pytest.mark.slow
def test_the_command_line_writes_what_one_process_writes(others: Found) -> None:
    first, second = ranks(others, "packages", "command")
    assert not first["initialized"]
    assert "in 2 processes" in first["said"].replace("\n", " ")
    assert "wrote" in first["said"]
    assert second["said"] == ""  # one speaks for all
    one, several = (np.load(others.folder / name, allow_pickle=False) for name in ("one.npz", "several.npz"))
    assert sorted(one.files) == sorted(several.files)
    numeric = [name for name in one.files if one[name].dtype.kind == "f"]
    assert numeric
    for name in numeric:
        np.testing.assert_allclose(several[name], one[name], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_benchmark_measures_and_plans(others: Found) -> None:
    assert [one["exit"] for one in ranks(others, "packages", "benchmark")] == [0, 0]
    written = json.loads((others.folder / "views.json").read_text())
    assert written["devices"] == 2
    assert written["link_bytes_per_second"] > 0
    (record,) = written["records"]
    assert record["views"] == 4
    assert record["seconds"]["one"] > 0
    assert record["seconds"]["several"] > 0
    assert 0 < record["density"] < 1
    assert max(record["differences"].values()) < 1e-4
    assert set(record["floor"]) == set(record["differences"])
    assert written["resolution"] == [64, 96]
    assert set(record["planned"]) == {"2", "4"}
    assert record["travelled_bytes"] == pytest.approx(record["planned_bytes"], rel=0.2)


def test_adapters_name_what_runs_on_all_views() -> None:
    assert find_gathered(spreading.testbed()) == ("camera_head",)
    assert find_gathered(torch.nn.Identity()) is None
