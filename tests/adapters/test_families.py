"""The vision models of transformers: each works or is left to the host, and none fails in its forward."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

transformers = pytest.importorskip("transformers")
ROOT = Path(__file__).parents[2]
MASK = "its attention has a mask or a bias"
SEVERAL = "its forward calls scaled_dot_product_attention several times"
TOKENS = "its tokens are not those of whole images"
SEEN = {  # what is to be seen of some, and why, with the version of transformers that wrote the page or a later one
    "beit": ("left to the host", MASK),
    "clip_vision_model": ("sparse", ""),
    "dinov2_with_registers": ("sparse", ""),
    "dinov3_vit": ("sparse", ""),
    "eomt": ("sparse in part", MASK),
    "mask2former": ("left to the host", MASK),
    "mlcd_vision_model": ("sparse", ""),
    "pixtral": ("left to the host", MASK),
    "qwen2_5_vl_vision": ("sparse in part", SEVERAL),
    "sam_vision_model": ("not known", ""),
    "siglip2_vision_model": ("sparse", ""),
    "swin": ("left to the host", MASK),
    "vit_mae": ("left to the host", TOKENS),
    "vjepa2": ("sparse", ""),
}
pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op:UserWarning")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import families

    return families


def as_written(page: str) -> bool:
    """Whether the transformers here is the one that wrote the page, or a later one."""
    (version,) = re.findall(r"transformers ([\d.]+) that attend", page)
    return Version(transformers.__version__) >= Version(version)


@pytest.mark.parametrize("family", SEEN)
def test_some_families(script: Any, family: str) -> None:
    """An earlier transformers may have another attention, or none of that name, but none fails."""
    known = as_written(script.PAGE.read_text())
    rows, missing = script.walk([family])
    if not known and "KeyError" in str(missing):
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    assert not missing
    row = rows[0]
    assert not row.failed
    assert not known or (row.attention, row.why) == SEEN[family]
    assert bool(row.fp8) == (row.attention != "not known")


@pytest.mark.slow
def test_no_family_fails(script: Any) -> None:
    rows, missing = script.walk(script.families())
    assert [row for row in rows if row.failed] == []
    assert len(rows) > len(missing)
    assert sum(row.attention.startswith("sparse") for row in rows) >= (25 if as_written(script.PAGE.read_text()) else 20)
