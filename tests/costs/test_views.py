"""What one scene on several devices costs, as arithmetic."""

from __future__ import annotations

from pathlib import Path

import pytest

from lite3r_plugin.costs.views import Scene, head_groups, plan, traffic
from lite3r_plugin.errors import ConfigError

VGGT_100 = Scene(views=100, tokens_per_view=1374, pinned=500 + 1369)


def test_one_device_is_sent_nothing() -> None:
    assert traffic(VGGT_100, 1).bytes == 0
    found = plan(VGGT_100, 1, seconds=2.0, attention_share=0.5, link=1e11)
    assert (found.seconds, found.gain, found.held) == (2.0, 1.0, 0)


def test_keys_and_values_of_the_other_half_travel_at_each_site() -> None:
    assert traffic(VGGT_100, 2).keys == 24 * 2 * 1024 * 2 * 50 * 1374
    assert traffic(VGGT_100, 2, output_bytes_per_view=10).outputs == 500


def test_heads_are_divided_where_each_group_takes_its_time() -> None:
    assert [head_groups(16, megabytes << 20) for megabytes in (10, 63, 64, 127, 128, 10_000)] == [1, 1, 2, 2, 4, 4]
    assert [head_groups(heads, 1 << 40) for heads in (1, 2, 3, 4)] == [1, 2, 2, 4]


def test_fast_links_and_many_views_come_near_to_the_number_of_devices() -> None:
    gains = [plan(Scene(views, 1374), 2, seconds=1e-2 * views, attention_share=0.5, link=2.6e11).gain for views in (4, 20, 100)]
    assert gains == sorted(gains)
    assert 1.85 < gains[-1] < 2
    slow = plan(VGGT_100, 2, seconds=1.0, attention_share=0.5, link=1e9)
    assert slow.gain < 1
    assert slow.share_of_links > 0.8


def test_what_travels_is_hidden_but_for_the_first_group() -> None:
    quick = plan(VGGT_100, 2, seconds=1.0, attention_share=0.5, link=2e11, stand_in=False)
    travels = traffic(VGGT_100, 2)
    assert quick.groups == 4
    assert quick.seconds == pytest.approx(0.5 + (travels.keys / 4 + travels.queries) / 2e11)
    assert quick.held == 2 * 1024 * 2 * 137_400 // 2  # two groups of four
    slow = plan(VGGT_100, 2, seconds=1.0, attention_share=0.5, link=1e9, stand_in=False)
    assert slow.seconds == pytest.approx(0.25 + 0.25 / 4 + travels.bytes / 1e9)
    few = plan(Scene(views=4, tokens_per_view=1374), 2, seconds=1.0, attention_share=0.5, link=1e9, stand_in=False)
    assert few.groups == 1
    assert few.seconds == pytest.approx(0.5 + few.traffic.bytes / 1e9)
    assert few.held == 2 * 1024 * 2 * 4 * 1374


def test_a_stand_in_costs_a_view() -> None:
    with_it, without = (plan(Scene(4, 10), 2, seconds=1, attention_share=0, link=1e15, stand_in=x).seconds for x in (True, False))
    assert with_it == pytest.approx(3 / 4)
    assert without == pytest.approx(2 / 4)


def test_the_table_of_the_documentation_is_this_arithmetic() -> None:
    page = (Path(__file__).parents[2] / "docs" / "parallel.md").read_text()
    for views in (20, 100, 400, 1000):
        travels = traffic(Scene(views, 1374, pinned=5 * views + 1369), 2).bytes
        times = " | ".join(f"{1e3 * travels / link:.0f} ms" for link in (25e9, 100e9, 280e9))
        assert f"| {views:,} | {1374 * views:,} | {travels / 1e9:.2f} GB | {times} |" in page


@pytest.mark.parametrize("devices", [0, 101])
def test_there_are_views_for_all(devices: int) -> None:
    with pytest.raises(ConfigError, match="1 to 100"):
        traffic(VGGT_100, devices)


@pytest.mark.parametrize("wrong", [{"seconds": 0}, {"attention_share": 1.5}, {"link": 0}])
def test_numbers_have_ranges(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="measure them"):
        plan(VGGT_100, 2, **{"seconds": 1.0, "attention_share": 0.5, "link": 1e9, **wrong})
