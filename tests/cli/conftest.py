"""What tests of several commands need: a plugin with a tiny model, and photographs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lite3r_adapters.testbed.model import ENTRIES
from lite3r_plugin import hookimpl
from lite3r_plugin.adapter import plugins
from lite3r_plugin.adapter.models import ModelEntry
from lite3r_plugin.testbed import Testbed, TestbedConfig


class TinyPlugin:
    """A third party's plugin with one tiny model, which the VGGT adapter recognises by its structure."""

    @hookimpl
    def lite3r_models(self) -> dict[str, ModelEntry]:
        """The model ``tiny``."""
        entry = ENTRIES["testbed"]
        tiny = dataclasses.replace(
            entry, name="tiny", summary="a tiny model", create=lambda: Testbed(TestbedConfig(dim=64, depth=1)), default_weights=None
        )
        return {"tiny": tiny, "pairs": dataclasses.replace(tiny, name="pairs", min_views=2)}


@pytest.fixture(autouse=True)
def _tiny() -> Iterator[None]:
    plugin = TinyPlugin()
    plugins.get_manager().register(plugin, name="tiny")
    yield
    plugins.get_manager().unregister(plugin)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of three JPEGs with smooth colours."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(3):
        coarse = np.random.default_rng(i).integers(0, 255, (4, 6, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((192, 128), Image.Resampling.BICUBIC).save(folder / f"{i}.jpg")
    return folder
