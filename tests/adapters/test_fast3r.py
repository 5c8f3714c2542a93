"""Fast3R, by a double of its structure; the real code wherever it can be imported."""

from __future__ import annotations

from typing import Any

import croco_hosts
import pytest
import real_models
import torch
import torch.nn.functional as F
from croco_hosts import view
from fast3r_hosts import Attention, make
from properties import assert_threads_do_not_mix
from torch import Tensor, nn

from lite3r_adapters.fast3r.sites import of_views
from lite3r_plugin import FusedQKV, LayoutFunction, Routed, TokenLayout, Views, apply_lite3r, convert, describe
from lite3r_plugin.adapter import find_outputs, find_sites, model_entries
from lite3r_plugin.errors import InputError
from lite3r_plugin.ops.dispatch import SlowPathWarning
from lite3r_plugin.testing import TEST_CONFIG, check_adapter

pytestmark = [
    pytest.mark.filterwarnings("ignore:In CPU autocast, but the target dtype is not supported:UserWarning"),
    pytest.mark.filterwarnings("ignore:CUDA is not available or torch_xla is imported:UserWarning"),
    pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda':UserWarning"),
]
MIXED = [view(96, 160), view(160, 96, 1), view(64, 96, 2)]


def run(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return torch.cat(model(MIXED), 1)


def test_sites() -> None:
    name, sites = find_sites(nn.Sequential(make()))
    assert name == "fast3r"
    assert [(site.fqn, site.scope, type(site.projections)) for site in sites] == [
        ("0.decoder.dec_blocks.0.attn", "global", Routed), ("0.decoder.dec_blocks.1.attn", "global", Routed),
        ("0.encoder.enc_blocks.0.attn", "encoder", FusedQKV),
    ]  # fmt: skip
    tokens = sites[0].tokens
    assert isinstance(tokens, LayoutFunction)
    assert tokens.module == "0.decoder"
    assert all(site.block is not None for site in sites)


@pytest.mark.parametrize("implementation", ["flash_attention", "pytorch_naive"])
def test_the_adapter_passes(implementation: str) -> None:
    report = check_adapter(make(implementation), (MIXED,), scopes=("global", "encoder"))
    assert (report.adapter, report.scopes, report.tokens) == ("fast3r", {"global": 2, "encoder": 1}, 60 + 60 + 24)
    assert not report.unchecked


def test_larger_scores_in_evaluation_are_kept() -> None:
    """A trial while the model trains would not see them; spelled out, attention is left to the host."""
    model = make(larger=True).train()
    apply_lite3r(model, TEST_CONFIG, keep_ratio=1.0)
    torch.testing.assert_close(run(model.eval()), run(make(larger=True)), atol=1e-5, rtol=1e-5)
    assert {site.calls.dense for site in describe(model).sites if site.sparse} == {1}
    model = make("pytorch_naive", larger=True)
    apply_lite3r(model, TEST_CONFIG)
    with pytest.warns(SlowPathWarning, match='does not call scaled_dot_product_attention: set attn_implementation="flash_attention" on it'):
        torch.testing.assert_close(run(model), run(make("pytorch_naive", larger=True)), atol=1e-5, rtol=1e-5)


def test_attention_in_the_precision_that_the_decoder_attends_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """FP32 comes in, BF16 is attended in: by the decoder's own forward, so that this is kept."""
    model = make()

    def bf16(self: Attention, x: Tensor, xpos: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).movedim(2, 0).transpose(2, 3)
        with torch.autocast("cpu", torch.bfloat16):
            out = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return self.proj(out.float().transpose(1, 2).flatten(2))

    monkeypatch.setattr(Attention, "forward", bf16)
    apply_lite3r(model, TEST_CONFIG, keep_ratio=0.2)
    seen: list[torch.dtype] = []
    site: Any = model.decoder.dec_blocks[0].attn
    with site.observe(lambda module, inputs, out: seen.append(inputs.v.dtype)):
        run(model)
    assert seen == [torch.bfloat16]


def grid(rows: int, columns: int, batch: int = 1) -> Tensor:
    return torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).expand(batch, -1, -1)


def layout_of(*positions: Tensor) -> TokenLayout:
    return of_views([torch.empty(*x.shape[:2], 4) for x in positions], positions, torch.empty(0))


def test_layouts() -> None:
    assert layout_of(grid(2, 3), grid(2, 3), grid(3, 2)) == TokenLayout((Views((2, 3), 2), Views((3, 2))))
    transposed = grid(3, 2).flip(-1)  # a portrait view whose patches follow each other column by column
    assert layout_of(grid(2, 3), transposed) == TokenLayout((Views((2, 3)), Views((3, 2))))
    differ = torch.cat((grid(2, 3), grid(3, 2)))  # in a batch
    assert layout_of(differ, grid(1, 4, 2)) == TokenLayout((Views((1, 6)), Views((1, 4))))
    assert layout_of(grid(2, 3).to("meta")) == TokenLayout((Views((1, 6)),))
    assert layout_of(grid(2, 3)).reference == 0


def test_the_first_view_is_the_reference() -> None:
    """What is kept are its patches, whatever the sizes of the others."""
    model = make()
    apply_lite3r(model, TEST_CONFIG, keep_ratio=0.2, pin="reference_keys")
    site: Any = model.decoder.dec_blocks[0].attn
    pinned: list[Any] = []
    with site.observe(lambda module, inputs, out: pinned.append(module.pinned(inputs.layout))):
        run(model)
    assert pinned == [(0, 60)]


def test_threads() -> None:
    assert_threads_do_not_mix(make(), (lambda m: m(MIXED[:2]), lambda m: m(MIXED)), atol=1e-6)


def test_fp8_fuses_the_blocks() -> None:
    model, dense = make(), run(make())
    apply_lite3r(model, TEST_CONFIG, keep_ratio=1.0)
    convert(model, fp8_backend="emulated")
    assert 0 < (run(model) - dense).norm() / dense.norm() < 0.1
    assert "run their own forward" not in str(describe(model))


def test_other_models_are_not_taken_for_it() -> None:
    assert find_sites(croco_hosts.make())[0] == "croco"


# The real code


@pytest.fixture(scope="module")
def real() -> nn.Module:
    torch.manual_seed(0)
    return real_models.small_fast3r(attn_bias_for_inference_enabled=False)


def test_the_real_model(real: nn.Module) -> None:
    """Last run with fast3r of 33104d4."""
    name, sites = find_sites(real)
    assert (name, [site.scope for site in sites]) == ("fast3r", ["global"] * 10 + ["encoder"])
    report = check_adapter(real, (MIXED,), scopes=("global", "encoder"))
    assert (report.scopes, report.tokens) == ({"global": 10, "encoder": 1}, 144)
    assert not report.unchecked


def test_the_real_model_with_larger_scores_and_spelled_out() -> None:
    for implementation, larger in (("flash_attention", True), ("pytorch_naive", False)):
        torch.manual_seed(0)
        model = real_models.small_fast3r(implementation, attn_bias_for_inference_enabled=larger)
        outs = []
        for one in (False, True):
            if one:
                apply_lite3r(model, TEST_CONFIG, keep_ratio=1.0)
            torch.manual_seed(0)
            with torch.no_grad():
                outs.append([x["pts3d_in_other_view"] for x in model(MIXED)])  # pyright: ignore[reportCallIssue]
        torch.testing.assert_close(*outs, atol=1e-5, rtol=1e-5)
        assert {(s.calls.dense, s.calls.host) for s in describe(model).sites if s.sparse} == {(1, 0)}


def test_the_real_decoder_of_llama(real: nn.Module) -> None:
    import fast3r.models.fast3r as code  # pyright: ignore[reportMissingImports]

    torch.manual_seed(0)
    model: Any = nn.Module()
    model.decoder = code.LlamaDecoder(True, 64, embed_dim=64, n_layers=2, n_heads=2, n_kv_heads=1, multiple_of=16)
    model.eval()
    features, positions = [torch.randn(1, 40, 64), torch.randn(1, 24, 64)], [grid(5, 8), grid(4, 6)]

    def call(model: Any) -> Any:
        return model.decoder(features, positions, torch.arange(64)[None] // 40)

    report = check_adapter(model, call)
    assert (report.adapter, report.scopes, report.tokens) == ("fast3r", {"global": 2}, 64)


def test_outputs_of_the_real_model_are_those_of_the_command_line(real: nn.Module) -> None:
    entry, mapped = model_entries()["fast3r"], find_outputs(real)
    assert mapped is not None
    images = torch.rand(2, 3, 64, 96)
    predicted = entry.predict(real, entry.normalize(images))
    assert torch.equal(predicted.depth, entry.predict(real, entry.normalize(images)).depth)  # although views are drawn by chance
    torch.testing.assert_close(predicted.images, images.permute(0, 2, 3, 1))
    torch.manual_seed(0)
    shape = torch.tensor([[64, 96]])
    output: Any = real([{"img": entry.normalize(x[None]), "true_shape": shape} for x in images])
    outputs = mapped(output)
    assert outputs.points is not None
    assert outputs.depth is not None
    assert outputs.depth.requires_grad
    torch.testing.assert_close(outputs.points[0].detach(), predicted.points)
    ratio = predicted.depth / outputs.depth[0].detach()
    assert all(torch.allclose(x, x[:1, :1].expand_as(x), rtol=1e-3) for x in ratio)  # the unit of each view's own points
    assert [x.shape for x in outputs.other] == [(1, 2, 64, 96)] * 2
    with torch.no_grad():
        assert len(mapped(real(MIXED)).other) == 12  # pyright: ignore[reportCallIssue]


def test_cameras_are_fitted_to_points() -> None:
    """Each view's own points, turned, moved and in another unit, are those in the frame of the first."""
    own = torch.rand(2, 8, 12, 3, dtype=torch.float64) + torch.tensor([0, 0, 1.0])
    rotation = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).Q
    rotation = rotation * rotation.det().sign()
    centre = torch.tensor([0.5, -1, 2], dtype=torch.float64)
    points = torch.stack((own[0], 2 * own[1] @ rotation.mT + centre))

    def forward(views: Any) -> list[dict[str, Tensor]]:
        return [
            {"pts3d_in_other_view": points[i : i + 1], "pts3d_local": own[i : i + 1], "conf": torch.ones(1, 8, 12)}
            for i in range(len(views))
        ]

    entry, model = model_entries()["fast3r"], nn.Identity()
    model.forward = forward
    predicted = entry.predict(model, torch.zeros(2, 3, 8, 12))
    expected = torch.cat((rotation.mT, -rotation.mT @ centre[:, None]), -1).float()
    torch.testing.assert_close(predicted.world_to_camera, torch.stack((torch.eye(3, 4), expected)), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(predicted.depth, torch.stack((own[0, ..., 2], 2 * own[1, ..., 2])).float())
    with pytest.raises(InputError, match="at most 1,000 images at once, got 1,001"):
        entry.predict(model, torch.zeros(1001, 3, 1, 1))


@pytest.mark.parametrize(
    ("size", "expected"), [((640, 480), (384, 512)), ((480, 640), (512, 384)), ((500, 500), (384, 512)), ((1000, 300), (144, 512))]
)
def test_images_are_made_as_its_authors_do(size: tuple[int, int], expected: tuple[int, int]) -> None:
    from PIL import Image

    images = [Image.new("RGB", size), Image.new("RGB", (64, 64), "white")]
    pixels = model_entries()["fast3r"].inputs(images)
    assert pixels.shape == (2, 3, *expected)
    assert (float(pixels[0].max()), float(pixels[1].min())) == (-1, 1)
