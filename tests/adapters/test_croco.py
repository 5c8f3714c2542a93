"""DUSt3R, MASt3R and CUT3R, by a double of their structure; the real code wherever it can be imported."""

from __future__ import annotations

from typing import Any

import hosts
import pytest
import real_models
import torch
from croco_hosts import CrossAttention, FusedCross, FusedOtherScale, Gated, OtherScale, SwappedPositions, ValuesFromKeys, make, view
from torch import nn

from lite3r_adapters import croco
from lite3r_plugin import AttentionSite, FusedQKV, Routed, SeparateQKV, TokenLayout, Views, apply_lite3r, convert, describe, remove_lite3r
from lite3r_plugin.adapter import find_outputs, find_sites
from lite3r_plugin.errors import AdapterError, LayoutError
from lite3r_plugin.testing import TEST_CONFIG, check_adapter

ALL = ("global", "frame", "encoder")
SIZES = [((96, 160), (96, 160)), ((96, 160), (160, 96)), ((64, 96), (96, 160))]


def test_sites() -> None:
    name, sites = find_sites(nn.Sequential(make()))
    assert name == "croco"
    assert [(site.fqn, site.scope) for site in sites][:4] == [
        ("0.enc_blocks.0.attn", "encoder"), ("0.dec_blocks.0.attn", "frame"), ("0.dec_blocks.0.cross_attn", "global"),
        ("0.dec_blocks.1.attn", "frame"),
    ]  # fmt: skip
    assert len(sites) == 9
    assert isinstance(sites[0].projections, FusedQKV)
    assert sites[0].block is not None
    across = sites[2].projections
    assert isinstance(across, SeparateQKV)
    assert (across.key, across.value, across.positions, across.key_positions) == ("key", "value", "qpos", "kpos")


@pytest.mark.parametrize(("first", "second"), SIZES)
def test_the_adapter_passes(first: tuple[int, int], second: tuple[int, int]) -> None:
    report = check_adapter(make(), (view(*first), view(*second, seed=1)), scopes=ALL)
    assert (report.adapter, report.scopes) == ("croco", {"global": 4, "frame": 4, "encoder": 1})
    assert not report.unchecked


def test_methods_of_the_model_are_enough() -> None:
    """As MASt3R's matching and global alignment call it."""
    dense, model = make(), make()
    apply_lite3r(model, TEST_CONFIG, keep_ratio=1.0, scopes=ALL)
    with torch.no_grad():
        outs = [one.decode(*one.encode(view(96, 160)["img"]), *one.encode(view(160, 96)["img"])) for one in (dense, model)]
    torch.testing.assert_close(*outs, atol=1e-5, rtol=1e-5)
    assert all(site.calls.host == 0 for site in describe(model).sites)


def run(model: Any) -> torch.Tensor:
    """Its outputs for views of two sizes, in one."""
    with torch.no_grad():
        return torch.cat(model(view(96, 160), view(160, 96, 1)), 1)


@pytest.mark.parametrize("fork", [OtherScale, FusedOtherScale, SwappedPositions, ValuesFromKeys, Gated])
def test_a_fork_in_one_line_is_exact_or_left(fork: type[CrossAttention]) -> None:
    dense, model = make(fork), make(fork)
    fused = issubclass(fork, FusedCross)
    apply_lite3r(model, TEST_CONFIG, keep_ratio=1.0, scopes=("global", "frame"))
    described = describe(model)
    torch.testing.assert_close(run(model), run(dense), atol=1e-5, rtol=1e-5)
    across = [site for site in described.sites if site.scope == "global"]
    assert all("differs from the host's own forward" in why for why in described.routed.values())
    assert len(described.routed) == 4
    assert all((site.left is None) == fused for site in across)
    if not fused:
        assert "4 global sites dense, in the host's own code: it calls scaled_dot_product_attention 0 times, not once" in str(described)


@pytest.mark.parametrize("fork", [FusedOtherScale, Gated])
def test_a_fork_that_calls_attention_once_is_sparse_by_its_own_forward(fork: type[CrossAttention]) -> None:
    model = make(fork)
    apply_lite3r(model, TEST_CONFIG, keep_ratio=0.2)
    dense = run(make(fork))
    assert 0.001 < (run(model) - dense).norm() / dense.norm() < 0.3
    calls = [site.calls for site in describe(model).sites if site.sparse]
    assert [(c.sparse, c.host) for c in calls] == [(1, 0)] * 4


def test_fp8_fuses_the_blocks_of_the_encoder() -> None:
    model, dense = make(), run(make())
    apply_lite3r(model, TEST_CONFIG, keep_ratio=1.0)
    convert(model, fp8_backend="emulated")
    assert 0 < (run(model) - dense).norm() / dense.norm() < 0.1
    assert str(describe(model)).count("Linears: 36 in FP8") == 1  # of an encoder block four, of a decoder block eight
    assert "run their own forward" not in str(describe(model))


def test_the_policy_runs_it_dense_on_a_cpu() -> None:
    model = make()
    apply_lite3r(model, keep_ratio=0.2)
    torch.testing.assert_close(run(model), run(make()), atol=1e-5, rtol=1e-5)
    assert {(s.calls.sparse, s.calls.dense, s.calls.host) for s in describe(model).sites if s.sparse} == {(0, 1, 0)}


def test_gradients() -> None:
    grads = []
    for one in (make(), make()):
        if grads:
            apply_lite3r(one, TEST_CONFIG, keep_ratio=1.0)
        torch.cat(one(view(64, 96), view(96, 64, 1)), 1).square().mean().backward()
        grads.append({name: p.grad for name, p in one.named_parameters() if p.grad is not None and "proj_lin" not in name})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, atol=1e-5, rtol=1e-3)


def test_layouts_of_the_wrong_view_are_found() -> None:
    model = make()
    _, sites = find_sites(model)
    swapped = [
        AttentionSite(s.fqn, s.scope, s.head_dim, s.projections, *((s.keys, None, s.tokens) if s.keys is not None else (s.tokens, s.block)))
        for s in sites
    ]
    with pytest.raises(AdapterError, match=r"the layout at site 'dec_blocks\.0\.cross_attn' is wrong"):
        check_adapter(model, (view(96, 160), view(160, 96, 1)), sites=swapped)
    with pytest.raises(LayoutError, match=r"site 'dec_blocks\.0\.cross_attn' got 24 tokens, but the adapter's LayoutFunction says"):
        check_adapter(model, (view(64, 96), view(96, 160, 1)), sites=swapped)


GRID = torch.cartesian_prod(torch.arange(3), torch.arange(5))[None]


@pytest.mark.parametrize(
    ("positions", "layout"),
    [
        (GRID, TokenLayout((Views((3, 5)),))),
        (torch.cat((-torch.ones(1, 2, 2).long(), GRID), 1), TokenLayout((Views((3, 5), special_tokens=2),))),  # CUT3R's pose tokens
        (GRID[:, :-1], None),  # CUT3R's state ends in the middle of a row
        (GRID.flip(-1), None),
        (torch.arange(9).expand(2, 9).T[None], None),
        (-torch.ones(1, 2, 2).long(), None),
        (None, None),
    ],
)
def test_layouts_are_read_from_coordinates(positions: Any, layout: TokenLayout | None) -> None:
    x = torch.zeros(1)
    for _ in range(2):
        assert (
            croco.of_tokens(x, positions) == croco.of_queries(x, x, x, positions, None) == croco.of_keys(x, x, x, None, positions) == layout
        )


def test_coordinates_that_were_written_to_are_read_again() -> None:
    positions, x = GRID.clone(), torch.zeros(1)
    assert croco.of_tokens(x, positions) is not None
    positions[0, 0] = 7
    assert croco.of_tokens(x, positions) is None


@pytest.mark.filterwarnings("ignore:Conversion of an array")
def test_dust3r() -> None:
    """Last run with dust3r of 4c24a6e and croco of d7de070."""
    torch.manual_seed(0)
    model = real_models.small_dust3r()
    for first, second in SIZES[:2]:
        report = check_adapter(model, (view(*first), view(*second, seed=1)), scopes=ALL)
        assert (report.adapter, report.scopes) == ("croco", {"global": 4, "frame": 4, "encoder": 1})
        assert not report.unchecked
    function = find_outputs(model)
    assert function is not None
    with torch.no_grad():
        outputs = function(model(view(96, 160), view(96, 160, 1)))
    assert outputs.points is not None
    assert tuple(outputs.points.shape) == (1, 2, 96, 160, 3)


def test_mast3r() -> None:
    """Last run with mast3r of f5209af."""
    torch.manual_seed(0)
    report = check_adapter(real_models.small_mast3r(), (view(96, 160), view(160, 96, 1)))
    assert (report.adapter, report.scopes) == ("croco", {"global": 24})


def test_cut3r(monkeypatch: pytest.MonkeyPatch) -> None:
    """Last run with CUT3R of 8bc15dc. Its encoder rotates in FP16, which a trial finds: that is run by the host's own code."""
    pytest.importorskip("dust3r")
    code: Any = pytest.importorskip("dust3r.model")
    if not hasattr(code, "ARCroco3DStereo"):
        pytest.skip("this dust3r is DUSt3R's")
    encoders: Any = pytest.importorskip("models.croco")
    monkeypatch.setattr(encoders, "RoPE2D", lambda freq: hosts.AxialRope("base", freq))  # its own one needs a GPU: coordinates of -1
    torch.manual_seed(0)
    model, views = real_models.small_cut3r(), [_cut3r_view(i) for i in range(2)]
    with torch.no_grad():
        dense = model(views).ress
        apply_lite3r(model, TEST_CONFIG, keep_ratio=1.0, scopes=ALL)
        assert list(describe(model).routed) == ["enc_blocks.0.attn"]
        for found, expected in zip(model(views).ress, dense, strict=True):
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        remove_lite3r(model)
        apply_lite3r(model, TEST_CONFIG, keep_ratio=0.2)
        model(views)
    assert [(s.calls.sparse, s.calls.host) for s in describe(model).sites if s.sparse] == [(2, 0)] * 8


def _cut3r_view(seed: int) -> dict[str, Any]:
    masks: dict[str, Any] = {
        name: torch.tensor([on]) for name, on in (("img_mask", True), ("ray_mask", False), ("reset", False), ("update", True))
    }
    return view(96, 160, seed) | masks | {"ray_map": torch.zeros(1, 96, 160, 6)}


def test_routed_sites_with_keys() -> None:
    """`Routed` serves cross-attention, too, where the site says how keys are laid out."""
    model, dense = make(FusedCross), run(make(FusedCross))
    _, sites = find_sites(model)
    across = [AttentionSite(s.fqn, s.scope, s.head_dim, Routed(2), s.tokens, keys=s.keys) for s in sites if s.scope == "global"]
    apply_lite3r(model, TEST_CONFIG, sites=across, keep_ratio=1.0)
    torch.testing.assert_close(run(model), dense, atol=1e-5, rtol=1e-5)
    assert all(site.calls.dense == 1 for site in describe(model).sites)


def test_what_names_keys_names_values_too() -> None:
    with pytest.raises(AdapterError, match="names key and value"):
        SeparateQKV(2, key="key")
    across = SeparateQKV(2, "projq", "projk", "projv", "proj", key="context", value="context")
    site = AttentionSite("dec_blocks.0.cross_attn", "global", 32, across)
    with pytest.raises(AdapterError, match=r"site 'dec_blocks\.0\.cross_attn': the host's forward has no argument 'context'"):
        apply_lite3r(make(), sites=[site])
