"""The bootstrap against SciPy and normal theory; tables that always show the constant prediction."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from collections.abc import Callable

import pytest
import torch
from rich.console import Console
from rich.table import Table

from lite3r_plugin.errors import InputError
from lite3r_plugin.scene.metrics import Comparison, Geometry, paired_bootstrap
from lite3r_plugin.scene.metrics.bootstrap import LEAST_SCENES
from lite3r_plugin.scene.metrics.comparison import USUAL

MakeGeometry = Callable[..., Geometry]


def samples(scenes: int, shift: float, seed: int = 0) -> tuple[list[float], list[float]]:
    """Scenes differ by 10, methods by `shift` with a deviation of 1."""
    generator = torch.Generator().manual_seed(seed)
    hardness = 10 * torch.randn(scenes, generator=generator, dtype=torch.float64)
    return hardness.tolist(), (hardness + shift + torch.randn(scenes, generator=generator, dtype=torch.float64)).tolist()


def test_interval_equals_scipy_and_normal_theory() -> None:
    stats = pytest.importorskip("scipy.stats")
    first, second = samples(60, 0.5)
    found = paired_bootstrap(first, second)

    def difference(a, b, axis=-1):
        return b.mean(axis=axis) - a.mean(axis=axis)

    interval = stats.bootstrap(
        (first, second), difference, paired=True, vectorized=True, method="percentile", n_resamples=10_000, random_state=1
    ).confidence_interval  # fmt: skip
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), abs=0.02)
    each = torch.tensor(second) - torch.tensor(first)
    half = 1.96 * each.std().item() / math.sqrt(60)
    assert found.difference == pytest.approx(each.mean().item(), rel=1e-5)
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.05)


def test_pairing_matters() -> None:
    first, second = samples(60, 1.0)
    paired = paired_bootstrap(first, second)
    assert paired.clear
    assert paired.low < 1 < paired.high
    shuffled = paired_bootstrap(first, [second[i] for i in torch.randperm(60).tolist()])
    assert shuffled.high - shuffled.low > 5 * (paired.high - paired.low)


def test_coverage() -> None:
    """95 % intervals hold the true difference in about 95 of 100 experiments, here of 40 scenes."""
    hits = 0
    for seed in range(200):
        found = paired_bootstrap(*samples(40, 0.3, seed), resamples=500)
        hits += found.low <= 0.3 <= found.high
    assert 180 <= hits <= 198


def test_seed_antisymmetry_and_missing_values() -> None:
    first, second = samples(20, 0.0)
    assert paired_bootstrap(first, second) == paired_bootstrap(first, second)
    assert paired_bootstrap(first, second) != paired_bootstrap(first, second, seed=1)
    back = paired_bootstrap(second, first)
    found = paired_bootstrap(first, second)
    assert (back.difference, back.low, back.high) == pytest.approx((-found.difference, -found.high, -found.low), abs=1e-9)
    assert paired_bootstrap([*first, math.nan], [*second, 1.0]) == found
    same = paired_bootstrap(first, first)
    assert (same.difference, same.low, same.high, same.clear) == (0, 0, 0, False)
    one = paired_bootstrap([1.0], [3.0])
    assert (one.difference, one.scenes, one.clear) == (2, 1, False)
    assert one.to_dict()["low"] is None
    narrow = paired_bootstrap(first, second, confidence=0.5)
    assert found.low < narrow.low < narrow.high < found.high


@pytest.mark.parametrize(("first", "second"), [([1.0], [1.0, 2.0]), ([], [])])
def test_bad_samples(first: list[float], second: list[float]) -> None:
    with pytest.raises(InputError, match="same scenes"):
        paired_bootstrap(first, second)
    with pytest.raises(InputError, match="confidence"):
        paired_bootstrap([1.0], [1.0], confidence=95)


def text(table: Table) -> str:
    stream = io.StringIO()
    Console(file=stream, width=200).print(table)
    return stream.getvalue()


@pytest.fixture
def comparison(scene: MakeGeometry) -> Comparison:
    comparison = Comparison(max_points=500)
    for seed in range(6):
        truth = scene(seed)
        noise = torch.exp(0.02 * torch.randn(truth.depth.shape))
        dense = dataclasses.replace(truth, depth=truth.depth * noise)
        comparison.add(truth, {"dense": dense, "lite3r": dataclasses.replace(truth, depth=truth.depth * noise**4)})
    return comparison


def test_table(comparison: Comparison) -> None:
    printed = text(comparison.table("dense", "lite3r"))
    header = next(line for line in printed.splitlines() if "dense" in line)
    for name in ("constant", "dense", "lite3r", "lite3r - dense [95 %]"):
        assert name in header
    rows = {line.split("│")[1].strip(): line for line in printed.splitlines() if line.startswith("│")}
    assert len(rows) == len(USUAL)
    assert rows["AbsRel ↓"].count("[") == 1
    assert rows["AbsRel ↓"].rstrip(" │").endswith("*")  # four times the noise is clearly worse
    assert not rows["AUC@3, % ↑"].rstrip(" │").endswith("*")  # the cameras are the same
    assert "Means over 6 scenes" in printed
    assert "0 of 18 pairs" in " ".join(printed.split())


def test_names_in_brackets_are_printed(scene: MakeGeometry) -> None:
    comparison = Comparison(max_points=500)
    comparison.add(scene(0), {"dense [bf16]": scene(0), "[/fast]": scene(0)})
    printed = " ".join(text(comparison.table("dense [bf16]", "[/fast]")).split())
    assert printed.count("dense [bf16]") == printed.count("[/fast]") == 2  # of the method, and of the difference


def test_a_table_of_few_measures(comparison: Comparison) -> None:
    few = ("AUC@30, %", "AUC@30 as published, %")
    printed = " ".join(text(comparison.table("dense", "lite3r", few, "A heading", "A note.")).split())
    assert "A heading. Means over 6 scenes" in printed
    assert "A note." in printed
    assert "│ AUC@30 as published, % ↑ │ 100 │" in printed
    assert "AbsRel" not in printed
    assert "Sim(3)" not in printed  # nothing is fitted for angles
    assert comparison.rows(few) == list(few)


def test_values_and_differences(comparison: Comparison) -> None:
    dense, lite3r, constant = (comparison.mean(name, "AbsRel") for name in ("dense", "lite3r", "constant"))
    assert dense < lite3r < constant
    assert comparison.difference("dense", "lite3r", "AbsRel").difference == pytest.approx(lite3r - dense)
    assert comparison.mean("constant", "AUC@30, %") == 0
    stored = json.loads(json.dumps(comparison.to_dict(), allow_nan=False))
    assert stored["dense"][0]["depth"]["abs_rel"] == comparison.values("dense", "AbsRel")[0]
    with pytest.raises(InputError, match="was not measured"):
        comparison.values("dense", "speed")
    with pytest.raises(InputError, match="was not measured"):
        comparison.table("dense", "other")


def test_every_scene_has_every_method(comparison: Comparison, scene: MakeGeometry) -> None:
    truth = scene()
    with pytest.raises(InputError, match="every scene needs the methods"):
        comparison.add(truth, {"dense": truth})
    with pytest.raises(InputError, match="at least one method"):
        comparison.add(truth, {})
    with pytest.raises(InputError, match="none is called 'constant'"):
        comparison.add(truth, {"constant": truth})
    assert len(comparison.scores["dense"]) == 6


def test_undefined_measures_are_left_out_of_means(scene: MakeGeometry) -> None:
    comparison = Comparison()
    for seed in range(2):
        truth = scene(seed, views=2)
        comparison.add(truth, {"dense": truth, "lite3r": truth})
    assert math.isnan(comparison.mean("dense", "ATE"))
    printed = text(comparison.table("dense", "lite3r"))
    assert "undefined" in printed
    assert "nan" not in printed


@pytest.mark.parametrize("scenes", range(1, LEAST_SCENES))
def test_few_scenes_have_no_interval(comparison: Comparison, scenes: int) -> None:
    for scores in comparison.scores.values():
        del scores[scenes:]
    del comparison.scenes[scenes:]
    found = comparison.difference("dense", "lite3r", "AbsRel")
    assert found.difference > 0
    assert not found.clear
    assert math.isnan(found.low)
    assert math.isnan(found.high)
    printed = text(comparison.table("dense", "lite3r"))
    assert all(mark not in printed.replace("lite3r - dense [95 %]", "") for mark in ("nan", " [", " *│"))
    assert "there is none where fewer than 6 scenes have the measure" in " ".join(printed.split())


def test_sets_of_views_of_one_scene_count_as_one(comparison: Comparison) -> None:
    apart = comparison.difference("dense", "lite3r", "AbsRel")
    comparison.scenes = [0, 0, 1, 2, 3, 4]
    together = comparison.difference("dense", "lite3r", "AbsRel")
    each = [b - a for a, b in zip(comparison.values("dense", "AbsRel"), comparison.values("lite3r", "AbsRel"), strict=True)]
    assert apart.scenes == 6
    assert together.scenes == 5
    assert together.difference == pytest.approx((sum(each[:2]) / 2 + sum(each[2:])) / 5)
    assert "Means over 5 scenes, 6 sets of views" in text(comparison.table("dense", "lite3r"))
