"""Measurements are kept in the user's cache; what is damaged or old is not taken."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from cost_formula import SLOW

from lite3r_plugin.costs import store
from lite3r_plugin.costs.store import CostStore


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    CostStore(tmp_path).save("NVIDIA X100/PCIe", SLOW)
    assert CostStore(tmp_path).load("NVIDIA X100/PCIe") == SLOW
    assert CostStore(tmp_path).load("NVIDIA X100") is None
    assert [path.name for path in tmp_path.iterdir()] == ["NVIDIA X100-PCIe.json"]


WHOLE = json.dumps({"versions": store.VERSIONS, "costs": vars(SLOW)})


def with_costs(**changed: object) -> str:
    """A measurement of these versions, some of whose numbers are changed."""
    return json.dumps({"versions": store.VERSIONS, "costs": vars(SLOW) | changed})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[1]",
        "[" * 100_000,
        "1" * 5_000,
        "\udcff",
        '{"versions": 0, "costs": {}}',
        *(WHOLE[:length] for length in range(1, len(WHOLE), 17)),
        *(with_costs(**{name: value}) for name in vars(SLOW) for value in ("1", None, True, [1.0], float("nan"), -1.0, 1e30, 10**400)),
        with_costs(dense=0.0),
        with_costs(slowdown=0.0),
        with_costs(colour=1.0),
    ],
)
def test_damaged_or_old_measurements_are_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "X.json").write_text(text, errors="surrogateescape")
    assert CostStore(tmp_path).load("X") is None
    CostStore(tmp_path).save("X", SLOW)
    assert json.loads((tmp_path / "X.json").read_text())["costs"] == vars(SLOW)


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    CostStore(tmp_path / "no folder").save("X", SLOW)
    assert "cannot be kept" in caplog.text


def test_the_cache_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    def cached(library_name: str, namespace: str) -> Path:
        (folder := tmp_path / library_name / namespace).mkdir(parents=True, exist_ok=True)
        return folder

    monkeypatch.setattr(huggingface_hub, "cached_assets_path", cached)
    CostStore().save("NVIDIA A/B", SLOW)
    assert (tmp_path / "lite3r-plugin" / "attention_costs" / "NVIDIA A-B.json").is_file()


def test_messages_go_to_the_packages_logger() -> None:
    assert store.logger is logging.getLogger("lite3r_plugin.costs.store")
