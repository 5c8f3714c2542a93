"""describe: the numbers are right and the text says them."""

from __future__ import annotations

import html
import xml.etree.ElementTree as ET
from typing import Any

import pytest
import torch
from toys import Adapter, Toy, images, toy_adapter

from lite3r_plugin import AttentionSite, FusedQKV, apply_lite3r, convert, describe
from lite3r_plugin.ops.block_map import density
from lite3r_plugin.testing import TEST_CONFIG

__all__ = ["toy_adapter"]  # the fixture
pytestmark = pytest.mark.usefixtures("adapter")

SPARSE = TEST_CONFIG.replace(keep_ratio=0.3)


def test_numbers_before_a_call() -> None:
    model = Toy()
    parameters = sum(p.numel() for p in model.parameters())
    report = describe(apply_lite3r(model.requires_grad_(False), SPARSE))
    assert (report.model, report.adapter, report.config) == ("Toy", "toy", SPARSE)
    assert (report.parameters, report.branch_parameters, report.trainable_parameters) == (parameters, 512, 512)
    assert report.bytes_by_dtype == {"float32": 4 * (parameters + 512)}


def test_calls_and_density() -> None:
    model = apply_lite3r(Toy(), SPARSE, keep_ratio={"cross.1": 1.0, "*": 0.3})
    for _ in range(3):
        model(images())
    calls = {site.fqn: site.calls for site in describe(model).sites}
    assert (calls["cross.0"].sparse, calls["cross.0"].dense) == (3, 0)
    assert (calls["cross.1"].sparse, calls["cross.1"].dense) == (0, 3)
    assert calls["cross.0"].density == density(246, 246, 0.3, 6, 6, 16, 16)
    assert calls["cross.1"].density is None


def test_the_configuration_is_what_was_asked_for_and_the_phase_what_is() -> None:
    model = apply_lite3r(Toy(), SPARSE, precision="fp8_qat")
    assert (describe(model).config.precision, describe(model).phase) == ("fp8_qat", "fp8_qat")
    convert(model)
    assert (describe(model).config.precision, describe(model).phase) == ("fp8", "fp8")
    assert describe(apply_lite3r(Toy(), SPARSE)).phase == "full"
    assert describe(apply_lite3r(Toy(), SPARSE, precision="fp8")).phase == "fp8"


def test_of_a_part_what_is_in_it() -> None:
    model = apply_lite3r(Toy(), SPARSE, precision="fp8_qat")
    part = describe(model.cross)
    assert [site.fqn for site in part.sites] == ["0", "1"]
    assert part.linears == {"rounded to FP8 in training": 4}


def test_bytes_follow_the_dtype() -> None:
    model = apply_lite3r(Toy(), SPARSE).half()
    assert set(describe(model).bytes_by_dtype) == {"float16"}


def test_the_text() -> None:
    assert "keep_ratio 0.3, negligible_ratio 0.1, blocks" in str(describe(apply_lite3r(Toy(), SPARSE, negligible_ratio=0.1)))
    assert ", block means on, blocks chosen by mean" in str(describe(apply_lite3r(Toy(), SPARSE, block_choice="mean")))
    model = apply_lite3r(Toy(), SPARSE, keep_ratio={"cross.1": 0.5, "*": 0.3})
    model(images())
    lines = str(describe(model)).splitlines()
    assert lines[0] == "Lite3R on Toy (adapter 'toy')"
    for ratio in (0.3, 0.5):
        sites = f"  1 global site sparse-linear: keep_ratio {ratio}, blocks 16 x 16, linear branch marginal (softmax)"
        assert f"{sites}, block means on, blocks chosen by error" in lines
    assert "  always kept: special tokens; backend naive" in lines
    assert "  2 sites untouched: scope 'frame' stays dense" in lines
    densities = [site.calls.density or 0.0 for site in describe(model).sites]
    low, high = min(densities), max(densities)
    assert 0.3 < low < high < 0.7
    told = f"density of the last {(low + high) / 2:.3f} on average, {low:.3f} to {high:.3f}"
    assert f"calls so far: 2 sparse, 0 dense (where sparse does not pay), {told}" in str(describe(model))
    apply_lite3r(alike := Toy(), SPARSE)(images())
    assert f"density of the last {low:.3f}\n" in str(describe(alike))


def test_what_is_pinned_is_said_where_something_is() -> None:
    def kept(**fields: Any) -> list[str]:
        return [line for line in str(describe(apply_lite3r(Toy(), SPARSE, **fields))).splitlines() if "always kept" in line]

    assert kept(pin="reference") == ["  always kept: special tokens, reference view; backend naive"]
    assert kept(pin="reference_keys") == ["  always kept: special tokens, reference view as keys; backend naive"]
    assert kept(pin="reference", scopes=("frame",)) == ["  always kept: special tokens; backend naive"]  # of one view each
    assert kept(pin="none") == ["  always kept: nothing; backend naive"]
    assert kept(keep_ratio=1.0) == []


def test_nothing_is_pinned_without_an_image_grid(adapter: Adapter) -> None:
    adapter.answer = lambda _: [AttentionSite("cross.0", "global", 16, FusedQKV(2))]
    report = describe(apply_lite3r(Toy(), SPARSE, pin="reference"))
    assert report.sites[0].pinned == ()
    assert "  always kept: nothing; backend naive" in str(report).splitlines()


def test_a_keep_ratio_of_1_is_dense() -> None:
    assert "  2 global sites dense: keep_ratio 1" in str(describe(apply_lite3r(Toy(), SPARSE, keep_ratio=1.0))).splitlines()
    text = str(describe(apply_lite3r(Toy(), SPARSE, keep_ratio=1.0, linear_branch="all")))
    assert "  2 global sites dense: keep_ratio 1, and the linear branch over all tokens" in text.splitlines()
    assert "sparse-linear" not in text


def test_sites_that_never_ran() -> None:
    model = apply_lite3r(Toy(), SPARSE)
    assert "not seen to run" not in str(describe(model))  # as long as nothing did
    model(images())
    assert "not seen to run" not in str(describe(model))
    model = apply_lite3r(Toy(), SPARSE)
    model.embed(images()[0])  # shows the grid
    model.cross[1](torch.randn(1, 246, 32))
    assert "  1 global site not seen to run so far, which compiled code does not show" in str(describe(model)).splitlines()


def test_what_is_left_alone_and_why() -> None:
    report = describe(apply_lite3r(Toy(), SPARSE, exclude=("cross.1", "frame.0")))
    assert report.skipped == {"frame.0": "excluded", "frame.1": "scope 'frame' stays dense", "cross.1": "excluded"}
    assert "  2 sites untouched: excluded" in str(report).splitlines()


def test_a_notebook_shows_the_text_and_every_site() -> None:
    model = apply_lite3r(Toy(), SPARSE, keep_ratio={"cross.1": 1.0, "*": 0.3})
    model(images())
    report = describe(model)
    assert repr(report) == "<Lite3R on Toy: 1 sparse site of 2, full, calls 1 sparse and 1 dense; print() tells all>"
    page = report._repr_html_()
    ET.fromstring(page)  # well-formed
    assert [html.escape(line.strip()) in page for line in str(report).splitlines()] == [True] * len(str(report).splitlines())
    assert "<td>cross.0</td><td>global</td><td>sparse-linear</td><td>0.3</td><td>1</td><td>0</td>" in page
    assert "<td>cross.1</td><td>global</td><td>dense</td><td>1</td><td>0</td><td>1</td><td></td>" in page


def test_numbers_and_words_agree() -> None:
    text = str(describe(apply_lite3r(Toy(), SPARSE, keep_ratio={"cross.1": 1.0, "*": 0.3})))
    assert "  1 global site sparse-linear: keep_ratio 0.3" in text
    assert "  1 global site dense: keep_ratio 1" in text.splitlines()
