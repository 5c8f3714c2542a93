"""`KeepRatioProfile`: a file that comes back as it was, is read strictly, and is told by `describe`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from toys import Toy, sites

from lite3r_plugin import KeepRatioProfile, Lite3RConfig, apply_lite3r, describe, load_lite3r, save_lite3r
from lite3r_plugin.apply.profile import SETTINGS, Making, settings
from lite3r_plugin.errors import ConfigError, InputError

FIELDS: dict[str, Any] = {"dense_below": 0, "block_q": 16, "block_k": 16, "pin": "special"}
MAKING = Making(
    model="Toy", adapter="toy", budget="max_rel_error", value=0.02, inputs=4, checked=3, tokens=(246, 300), blocks=(16, 16),
    settings=settings(Lite3RConfig(pin="special")), dtype="float32", density=0.3, uniform=0.2,
    errors={"depth": 0.015}, uniform_errors={"depth": 0.03},
    harm={"cross.0": 1.0}, dense={"cross.1": "nobody was there"},
)  # fmt: skip


def profile(**ratios: float) -> KeepRatioProfile:
    return KeepRatioProfile(ratios or {"cross.0": 0.125, "cross.1": 1.0}, MAKING)


def test_a_file_comes_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "ratios.json"
    profile().save(path)
    loaded = KeepRatioProfile.load(path)
    assert (loaded, loaded.making) == (profile(), MAKING)
    assert path.stat().st_size < 2000
    assert [file.name for file in tmp_path.iterdir()] == ["ratios.json"]


def test_it_is_a_mapping_for_keep_ratio_and_tells_how_it_came_about(tmp_path: Path) -> None:
    model = Toy()
    apply_lite3r(model, keep_ratio=profile(), sites=sites(model), **FIELDS)
    text = str(describe(model))
    assert (
        "chosen for 2 sites, 0.125 to 1, by max_rel_error=0.02: density 0.300, as keep_ratio=0.2 everywhere, on inputs of 246 to 300"
        in text
    )
    assert "on 3 other inputs (with the same density everywhere): depth 0.015 (0.03)" in text
    assert "most harm is done by cross.0 (100%), each sparse by itself" in text
    assert "cross.1 stays dense: nobody was there" in text
    assert "other conditions" not in text
    assert {site.fqn: site.keep_ratio for site in describe(model).sites if site.sparse} == dict(profile())
    save_lite3r(model, tmp_path)
    other = Toy()
    load_lite3r(other, tmp_path, sites=sites(other))
    assert describe(other).config.keep_ratio == profile()


def test_other_conditions_are_told() -> None:
    """What was measured with other blocks is not what runs."""
    model = Toy()
    apply_lite3r(model, keep_ratio=profile(), sites=sites(model), **FIELDS | {"block_q": 32, "block_k": 32, "pin": "none"})
    assert (
        "chosen under other conditions, so these numbers may not hold here: blocks 32 x 32 instead of 16 x 16, pin 'none' instead of "
        "'special'"
    ) in str(describe(model))
    others: dict[str, Any] = {"block_means": False, "block_choice": "mean", "linear_branch": "none", "negligible_ratio": 0.5}
    assert {*others, "pin"} == set(SETTINGS)
    for name, value in others.items():
        model = Toy()
        apply_lite3r(model, keep_ratio=profile(), sites=sites(model), **FIELDS | {name: value})
        assert f" {name} {value!r} instead of " in str(describe(model))
    model = Toy()
    apply_lite3r(model, keep_ratio=profile(), sites=sites(model), **FIELDS | {"block_choice": "error"})
    assert "other conditions" not in str(describe(model))  # "auto" came to it


def test_the_configuration_goes_to_json() -> None:
    config = Lite3RConfig(keep_ratio=profile())
    assert Lite3RConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    waiting = Lite3RConfig(keep_ratio="auto")
    assert Lite3RConfig.from_dict(json.loads(json.dumps(waiting.to_dict()))) == waiting


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "another"}, "no profile of keep ratios"),
        ({"version": 2}, "of version 2, which is not 1"),
        ({"version": True}, "of version True, which is not 1"),
        ({"sites": 3}, "to be of 3 sites, and has 2"),
        ({"ratios": {}}, "to be of 2 sites, and has 0"),
        ({"ratios": [0.5, 0.5]}, "other entries than a profile"),
        ({"ratios": {"cross.0": 0.125, "cross.1": 1.5}}, r"the keep ratio of 'cross.1' must be in \(0, 1\]"),
        ({"ratios": {"cross.0": 0.125, "cross.1": True}}, r"the keep ratio of 'cross.1' must be in \(0, 1\]"),
        ({"more": 1}, "other entries than a profile"),
        ({"making": {}}, "'making' is to have"),
    ],
)
def test_what_is_no_profile(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "ratios.json"
    path.write_text(json.dumps(profile().to_dict() | change))
    with pytest.raises(InputError, match=rf"ratios.json: .*{message}"):
        KeepRatioProfile.load(path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model", 3), ("budget", "max_cost"), ("value", -1), ("value", "0.02"), ("inputs", 0), ("checked", 1.5), ("tokens", [1]),
        ("tokens", [0, 5]), ("blocks", "16"), ("density", None), ("errors", {}), ("errors", {"depth": -1}), ("errors", {"points": 0.1}),
        ("uniform_errors", [1]), ("dense", {"cross.1": 1}), ("harm", {"cross.0": 2}), ("harm", None),
        ("settings", {}), ("settings", settings(Lite3RConfig()) | {"pin": None}), ("settings", settings(Lite3RConfig()) | {"more": 1}),
        ("value", 10**400), ("errors", {"depth": 10**400}), ("density", 7), ("uniform", 2), ("model", "a\x1b[2J"), ("adapter", "a\nb"),
        ("dense", {"cross.1": "\x1b[31m"}), ("harm", {}), ("harm", {"another": 0.5}),
        ("dense", {}), ("dense", {"cross.1": "", "another": ""}), ("dense", {"cross.0": "", "cross.1": ""}),
    ],
)  # fmt: skip
def test_damaged_conditions_are_named(name: str, value: Any, tmp_path: Path) -> None:
    data = profile().to_dict()
    data["making"][name] = value
    path = tmp_path / "ratios.json"
    path.write_text(json.dumps(data))
    with pytest.raises(InputError, match=f"a damaged profile of keep ratios: .*{name}"):
        KeepRatioProfile.load(path)


def test_files_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        KeepRatioProfile.load(tmp_path / "none.json")
    (tmp_path / "device.json").symlink_to("/dev/null")
    with pytest.raises(InputError, match="cannot be read: it is no file"):
        KeepRatioProfile.load(tmp_path / "device.json")
    (tmp_path / "no.json").write_text("{")
    with pytest.raises(InputError, match="is no JSON"):
        KeepRatioProfile.load(tmp_path / "no.json")
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(InputError, match="no profile of keep ratios"):
        KeepRatioProfile.load(tmp_path / "list.json")
    with (tmp_path / "large.json").open("wb") as file:
        file.truncate(5 << 20)
    with pytest.raises(InputError, match="no profile of keep ratios is as large"):
        KeepRatioProfile.load(tmp_path / "large.json")
    with pytest.raises(InputError, match=r"must end in \.json"):
        profile().save(tmp_path / "ratios.txt")
    with pytest.raises(InputError, match="does not exist"):
        profile().save(tmp_path / "nowhere" / "ratios.json")


def test_ratios_are_checked() -> None:
    with pytest.raises(ConfigError, match="at least one site"):
        KeepRatioProfile({}, MAKING)
    with pytest.raises(ConfigError, match=r"the keep ratio of 'a' must be in \(0, 1\], got 0"):
        profile(a=0)


def test_a_name_that_no_file_can_have() -> None:
    with pytest.raises(InputError, match=r"'a\\x00b.json' cannot be read: (embedded null byte|stat: embedded null character in path)"):
        KeepRatioProfile.load("a\0b.json")
