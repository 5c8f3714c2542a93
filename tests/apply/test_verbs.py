"""apply, remove and disable: what they refuse, what they leave alone, and what models can still do afterwards."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from toys import Adapter, Attention, Separate, Toy, images, sites, toy_adapter

from lite3r_plugin import (
    AttentionSite,
    FusedQKV,
    Routed,
    SeparateQKV,
    TokenSource,
    apply_lite3r,
    calibrate,
    convert,
    describe,
    distill,
    lite3r_disabled,
    load_lite3r,
    remove_lite3r,
    save_lite3r,
)
from lite3r_plugin.apply.lookup import lite3r_modules
from lite3r_plugin.attention.module import SparseLinearAttention
from lite3r_plugin.errors import (
    AdapterError,
    AlreadyAppliedError,
    BackendError,
    CheckpointError,
    ConfigError,
    LayoutError,
    ModelTypeError,
    NoSitesError,
    NotAppliedError,
    UnknownModelError,
    UnsupportedAttentionError,
    WeightsError,
)
from lite3r_plugin.ops.dispatch import SlowPathWarning
from lite3r_plugin.ops.fp8 import fake_quantize
from lite3r_plugin.testing import TEST_CONFIG, check_adapter

SPARSE = TEST_CONFIG.replace(keep_ratio=0.3)

__all__ = ["toy_adapter"]  # the fixture
pytestmark = pytest.mark.usefixtures("adapter")


def snapshot(model: nn.Module) -> dict[str, Any]:
    return {
        "modules": [(name, id(module)) for name, module in model.named_modules(remove_duplicate=False)],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "keys": list(model.state_dict()),
        "training": [m.training for m in model.modules()],
    }


def one_site(**fields: Any) -> Any:
    """An answer with one site, ``cross.0`` with right values but for `fields`."""
    known: dict[str, Any] = dict(fqn="cross.0", scope="global", head_dim=16, projections=FusedQKV(2))
    return lambda model: [AttentionSite(**(known | fields))]


# What is refused, with the model left as it was.


@pytest.mark.parametrize("thing", [None, "vggt", {"model": 1}])
@pytest.mark.parametrize(
    "verb",
    [
        apply_lite3r,
        remove_lite3r,
        describe,
        convert,
        lambda m: lite3r_disabled(m).__enter__(),
        lambda m: calibrate(m, []),
        lambda m: save_lite3r(m, "nowhere"),
        lambda m: load_lite3r(m, "nowhere"),
        lambda m: check_adapter(m, ()),
    ],
    ids=["apply", "remove", "describe", "convert", "disabled", "calibrate", "save", "load", "check_adapter"],
)
def test_not_a_module(verb: Any, thing: Any) -> None:
    with pytest.raises(ModelTypeError, match=rf"Lite3R takes a torch\.nn\.Module, got {type(thing).__name__}; pass the module inside it"):
        verb(thing)


def test_an_unknown_model() -> None:
    with pytest.raises(UnknownModelError, match=r"no model adapter knows torch\.nn.*Linear \(asked: toy\)"):
        apply_lite3r(nn.Linear(2, 2))


def test_applying_twice() -> None:
    model = apply_lite3r(Toy())
    with pytest.raises(AlreadyAppliedError, match=r"call remove_lite3r\(model\) first"):
        apply_lite3r(model)
    with pytest.raises(AlreadyAppliedError):
        apply_lite3r(nn.Sequential(model))


def test_no_site_with_the_wanted_scope(adapter: Adapter) -> None:
    with pytest.raises(NoSitesError, match=r"no attention site with scope \('encoder',\).*pass scopes=\('frame', 'global'\)"):
        apply_lite3r(Toy(), scopes=("encoder",))
    adapter.answer = lambda model: []
    with pytest.raises(NoSitesError, match="it has no attention sites at all"):
        apply_lite3r(Toy())


def test_a_keep_ratio_for_no_site() -> None:
    with pytest.raises(ConfigError, match=r"keep_ratio names \['cross\.7'\].*those are like 'cross\.0'"):
        apply_lite3r(Toy(), keep_ratio={"cross.7": 0.5})
    with pytest.raises(ConfigError, match=r"keep_ratio names \['frame\.0'\], which match no site that becomes sparse"):
        apply_lite3r(Toy(), keep_ratio={"frame.0": 0.5})


def test_an_unknown_option() -> None:
    with pytest.raises(ConfigError, match="keep_rate"):
        apply_lite3r(Toy(), keep_rate=0.5)


@pytest.mark.parametrize("verb", [remove_lite3r, describe, lambda m: lite3r_disabled(m).__enter__()])
def test_verbs_on_a_dense_model(verb: Any) -> None:
    with pytest.raises(NotAppliedError, match=r"this Toy carries no Lite3R; call apply_lite3r\(model\) first"):
        verb(Toy())


def test_the_triton_backend_refuses_other_head_dims_at_once() -> None:
    with pytest.raises(BackendError, match=r"site 'cross\.0' has head_dim 8; the Triton kernels take \(32, 64, 80, 96, 128\)"):
        apply_lite3r(Toy(dim=16), attention_backend="triton")


def test_the_triton_backend_refuses_cpu_tensors_even_where_it_would_run_dense() -> None:
    model = apply_lite3r(Toy(dim=64), attention_backend="triton")
    with pytest.raises(BackendError, match='"triton" backend of attention cannot run here: the tensors are on cpu'):
        model(images())


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (one_site(fqn="cross.9"), "names 'cross.9', but the model has no such module"),
        (lambda model: [sites(model)[0]] * 2, "names the site 'frame.0' twice"),
        (one_site(projections=FusedQKV(2, qkv="to_qkv")), "Attention has no child 'to_qkv'"),
        (one_site(projections=FusedQKV(2, out="forward")), "has no child 'forward'"),
        (one_site(projections=FusedQKV(2, q_norm="q_norm")), "has no child 'q_norm'"),
        (one_site(projections=SeparateQKV(2)), "has no child 'q_proj'"),
        (one_site(projections=FusedQKV(4)), "qkv.out_features is 96, but 4 heads of 16 need 192"),
        (one_site(head_dim=8), "qkv.out_features is 96, but 2 heads of 8 need 48"),
        (one_site(projections=FusedQKV(2, positions="pos")), "forward has no argument 'pos'"),
        (one_site(tokens=TokenSource("patches", (4, 4))), "names 'patches', but the model has no such module"),
    ],
)
def test_wrong_adapters_are_named_and_the_model_is_unchanged(adapter: Adapter, answer: Any, message: str) -> None:
    model, adapter.answer = Toy(), answer
    before = snapshot(model)
    with pytest.raises(AdapterError, match=f"^adapter 'toy'.*{re.escape(message)}"):
        apply_lite3r(model)
    assert snapshot(model) == before


def test_an_error_at_the_last_site_leaves_the_first_ones_unchanged(adapter: Adapter) -> None:
    model = Toy()
    good = sites(model)
    adapter.answer = lambda model: [*good[:-1], AttentionSite("cross.1", "global", 16, FusedQKV(3))]
    before = snapshot(model)
    with pytest.raises(AdapterError, match=r"cross\.1"):
        apply_lite3r(model)
    assert snapshot(model) == before
    assert sum(isinstance(m, SparseLinearAttention) for m in model.modules()) == 0


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ("causal", "its attention is causal"),
        ("dropout", "it drops attention weights by chance"),
        ("negative", "the scale of its scores is negative"),
        ("cross", "cross-attention, of queries to another number of keys"),
        ("eager", "its forward does not call scaled_dot_product_attention"),
        ("twice", "its forward calls scaled_dot_product_attention several times"),
    ],
)
def test_attention_without_a_sparse_form_runs_in_the_hosts_code(variant: str, message: str) -> None:
    model = Toy(make=lambda dim, heads: Attention(dim, heads, variant))
    expected = _seeded(model)
    apply_lite3r(model, SPARSE)
    with pytest.warns(SlowPathWarning, match=rf"site 'cross\.0'.* runs dense in the host's own code: .*{message}"):
        assert torch.equal(_seeded(model), expected)
    assert torch.equal(_seeded(model), expected)  # a reason is told once
    calls = [site.calls for site in describe(model).sites]
    begun = int(variant == "twice")  # the first of two calls ran before the second was seen
    assert [(c.sparse, c.dense, c.host) for c in calls] == [(begun, 0, 2)] * 2
    where = "dense, in" if variant == "twice" else "ran calls dense in"
    assert f"2 global sites {where} the host's own code: {calls[0].reason}" in str(describe(model))
    with lite3r_disabled(model):
        assert torch.equal(_seeded(model), expected)


def _seeded(model: nn.Module) -> Tensor:
    torch.manual_seed(0)
    return model(images())


@pytest.mark.parametrize("variant", ["plain", "routed"])
def test_a_mask_makes_that_call_dense(variant: str) -> None:
    model, mask = Toy(make=lambda dim, heads: Attention(dim, heads, variant)), torch.rand(246, 246) < 0.5
    expected = model(images(), mask=mask)
    apply_lite3r(model, SPARSE)
    with pytest.warns(SlowPathWarning, match="mask"):
        assert torch.equal(model(images(), mask=mask), expected)
    assert not torch.allclose(model(images()), expected)
    assert [(site.calls.sparse, site.calls.host) for site in describe(model).sites] == [(1, 1)] * 2


def test_an_object_that_may_remember_a_call_forbids_to_begin_it_again() -> None:
    class Remembers(Attention):
        def forward(self, x: Tensor, cache: Any = None) -> Tensor:
            return super().forward(x)

    model = apply_lite3r(Toy(make=lambda dim, heads: Remembers(dim, heads, "twice")), SPARSE)
    with pytest.raises(UnsupportedAttentionError, match=r"exclude=\('cross\.0',\)\)"):
        model(images(), cache=object())


def test_active_dropout_of_attention_weights_is_dense_in_training_only() -> None:
    model = Toy()
    model.cross[0].attn_drop.p = 0.1
    apply_lite3r(model, SPARSE).train()
    with pytest.warns(SlowPathWarning, match="drops attention weights"):
        model(images())
    model.eval()(images())
    assert [(site.calls.sparse, site.calls.host) for site in describe(model).sites] == [(1, 1), (2, 0)]


def test_excluded_sites_are_the_hosts_own(toy: Toy) -> None:
    hosts = list(toy.cross)
    model = apply_lite3r(toy, SPARSE, exclude=("cross.0",))
    assert model.cross[0] is hosts[0]
    assert lite3r_modules(model).keys() == {"cross.1"}
    assert describe(model).skipped["cross.0"] == "excluded"
    with pytest.raises(ConfigError, match="exclude names"):
        apply_lite3r(Toy(), exclude=("cros.0",))
    with pytest.raises(NoSitesError, match=r"would become sparse: .*excluded \(such as 'cross\.1'\)"):
        apply_lite3r(Toy(), exclude=("cross.*",))


def test_fp8_without_sparse_attention() -> None:
    toy = Toy()
    converted = apply_lite3r(copy.deepcopy(toy), precision="fp8", exclude=("*",))
    for module in toy.modules():
        if isinstance(module, nn.Linear) and module is not toy.head:
            module.weight.data = fake_quantize(module.weight.data)
    assert describe(converted).linears == {"in FP8 (emulated)": 8}
    assert (converted(images()) - toy(images())).abs().max() < 0.1


def test_a_host_with_a_bias_of_its_own_is_left_by_a_keep_ratio_of_1(adapter: Adapter) -> None:
    model = Toy(make=lambda dim, heads: Attention(dim, heads, "causal"))
    expected = model(images())
    apply_lite3r(model, SPARSE, keep_ratio={"*": 1.0})
    assert torch.equal(model(images()), expected)
    assert "2 global sites dense, in the host's own code: keep_ratio 1" in str(describe(model))


def test_a_wrong_patch_size_raises_in_the_forward(adapter: Adapter) -> None:
    adapter.answer = one_site(tokens=TokenSource("embed", (8, 8), 2))
    with pytest.raises(LayoutError, match=r"site 'cross\.0' got 246 tokens, but a view has 22"):
        apply_lite3r(Toy(), SPARSE)(images())


class Opaque:
    """Something that can be called, but does not tell with what."""

    __signature__ = 5

    def __call__(self, x: Tensor) -> Tensor:
        return x


def test_a_forward_whose_arguments_cannot_be_read() -> None:
    model = Toy()
    model.cross[1].forward = Opaque()
    before = snapshot(model)
    with pytest.raises(AdapterError, match=r"site 'cross\.1': the arguments of its forward cannot be read.* of class Opaque"):
        apply_lite3r(model)
    assert snapshot(model) == before
    assert "proj_lin" not in dict(model.cross[0].named_children())


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_host_whose_weights_are_stored_in_fp8_has_branches_in_fp32(dtype: torch.dtype) -> None:
    """As other tools store them, and bring them into the dtype of the input for each call: the same as in FP32."""
    model, plain = toy_stored_in(dtype), Toy().eval()
    plain.load_state_dict({name: value.float() for name, value in model.state_dict().items()})
    dense = model(images())
    for each in (apply_lite3r(model, SPARSE), apply_lite3r(plain, SPARSE)):
        for i, site in enumerate(lite3r_modules(each).values()):
            assert site.proj_lin.weight.dtype == torch.float32
            nn.init.normal_(site.proj_lin.weight, std=0.1, generator=torch.Generator().manual_seed(i))
    torch.testing.assert_close(model(images()), plain(images()))
    calibrate(model, [images(), 1 - images()])
    assert all(site.proj_lin.weight.any() for site in lite3r_modules(model).values())
    assert torch.equal(remove_lite3r(model)(images()), dense)


class Stored(nn.Linear):
    """A Linear whose weight has another dtype than what it computes in."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype), self.bias)


def toy_stored_in(dtype: torch.dtype) -> Toy:
    model = Toy().eval()
    for attention in model.cross:
        for linear in (attention.qkv, attention.proj):
            linear.__class__ = Stored
            linear.weight = nn.Parameter(linear.weight.detach().to(dtype), requires_grad=False)
    return model


# What it does.


class Watched:
    """A forward that somebody has put an object around."""

    def __init__(self, forward: Any) -> None:
        self.forward, self.calls = forward, 0

    def __call__(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        self.calls += 1
        return self.forward(x, mask)


@pytest.mark.parametrize("variant", ["plain", "routed"])
def test_a_forward_that_is_an_object_is_the_host_own(variant: str) -> None:
    toy = Toy(make=lambda dim, heads: Attention(dim, heads, variant)).eval()
    dense = toy(images())
    watched = toy.cross[0].forward = Watched(toy.cross[0].forward)
    model = apply_lite3r(toy, SPARSE)
    with lite3r_disabled(model):
        assert torch.equal(model(images()), dense)
    assert watched.calls == 1
    assert torch.equal(remove_lite3r(model)(images()), dense)
    assert toy.cross[0].forward is watched


class Counted(Toy):
    """Counts the walks over all its modules."""

    walks = 0

    def named_modules(self, *args: Any, **kwargs: Any) -> Any:
        self.walks += 1
        return super().named_modules(*args, **kwargs)


@pytest.mark.parametrize("precision", ["full", "fp8_qat", "fp8"])
def test_each_verb_walks_the_model_once(adapter: Adapter, precision: Any) -> None:
    model, adapter.answer = Counted(), sites  # an adapter that does not walk
    apply_lite3r(model, SPARSE, precision=precision)
    assert model.walks == 1
    if precision != "fp8":
        with lite3r_disabled(model):
            assert model.walks == 2
        remove_lite3r(model)
        assert model.walks == 3
        apply_lite3r(model, SPARSE, precision=precision)
    model.walks = 0
    convert(model)
    assert model.walks == 1
    convert(model)
    assert model.walks == 2


MAKES = {"fused": Attention, "separate": Separate, "routed": lambda dim, heads: Attention(dim, heads, "routed")}


@pytest.fixture(params=MAKES)
def toy(request: pytest.FixtureRequest) -> Toy:
    return Toy(make=MAKES[request.param]).eval()


@pytest.mark.parametrize("linear_branch", ["all", "marginal", "none"])
def test_keeping_everything_equals_the_dense_model(toy: Toy, linear_branch: Any) -> None:
    x = images(batch=2).double()
    toy.double()
    dense = toy(x)
    model = apply_lite3r(toy, SPARSE, keep_ratio=1.0, linear_branch=linear_branch)
    torch.testing.assert_close(model(x), dense, rtol=1e-12, atol=1e-12)


def test_the_sparse_operator_at_full_density_equals_the_dense_model(toy: Toy) -> None:
    """As above, but through the sparse path: everything is pinned."""
    x = images(views=1).double()
    toy.double()
    dense = toy(x)
    model = apply_lite3r(toy, SPARSE, keep_ratio=0.999)
    torch.testing.assert_close(model(x), dense, rtol=1e-12, atol=1e-12)
    assert {(s.calls.sparse, s.calls.density) for s in describe(model).sites if s.sparse} == {(1, 1.0)}


def test_sparse_differs_disabled_and_removed_do_not(toy: Toy) -> None:
    x, before = images(), snapshot(toy)
    dense = toy(x)
    model = apply_lite3r(toy, SPARSE)
    assert model is toy
    sparse = model(x)
    assert 1e-6 < (sparse - dense).abs().max() < 1
    with lite3r_disabled(model):
        assert torch.equal(model(x), dense)
    assert torch.equal(model(x), sparse)
    assert remove_lite3r(model) is toy
    assert snapshot(toy) == before
    assert torch.equal(toy(x), dense)


def test_blocks_chosen_by_error() -> None:
    x = images()
    toy = Toy().eval()
    by_mean, by_error = (apply_lite3r(copy.deepcopy(toy), SPARSE, block_choice=choice)(x) for choice in ("mean", "error"))
    assert not torch.allclose(by_mean, by_error)
    everything = apply_lite3r(copy.deepcopy(toy), SPARSE, keep_ratio=1.0, linear_branch="none")(x)
    assert (by_error - everything).norm() < everything.norm()


def test_with_all_but_the_critical_blocks_negligible_nothing_else_counts(toy: Toy) -> None:
    x = images()
    alone = apply_lite3r(copy.deepcopy(toy), SPARSE, block_means=False, linear_branch="none")(x)
    model = apply_lite3r(toy, SPARSE, negligible_ratio=1.0)
    torch.testing.assert_close(model(x), alone)
    assert not torch.allclose(apply_lite3r(remove_lite3r(model), SPARSE, negligible_ratio=0.2)(x), alone)


def test_disabled_ends_also_after_an_error_and_nests(toy: Toy) -> None:
    model = apply_lite3r(toy, SPARSE)
    with pytest.raises(KeyError), lite3r_disabled(model), lite3r_disabled(model):
        raise KeyError
    assert all(m.enabled for m in model.modules() if isinstance(m, SparseLinearAttention))


@torch.no_grad()
def test_disabled_contexts_end_in_any_order(toy: Toy) -> None:
    """As those of several threads do: the model is dense as long as one is open, and what it was afterwards."""
    dense = toy(images())
    model = apply_lite3r(toy, SPARSE)
    sparse = model(images())
    assert not torch.equal(sparse, dense)
    first, second = lite3r_disabled(model), lite3r_disabled(model)
    first.__enter__()
    second.__enter__()
    assert torch.equal(model(images()), dense)
    first.__exit__(None, None, None)
    assert torch.equal(model(images()), dense)
    second.__exit__(None, None, None)
    assert torch.equal(model(images()), sparse)


@torch.no_grad()
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copied", "pickled"])
def test_a_copy_that_is_made_while_disabled_is_not(toy: Toy, copied: Any) -> None:
    """Nobody would ever enable it."""
    model = apply_lite3r(toy, SPARSE, precision="fp8_qat")
    sparse = model(images())
    with lite3r_disabled(model):
        other = copied(model)
        dense = model(images())
        assert torch.equal(other(images()), sparse)
    assert not torch.equal(dense, sparse)
    assert torch.equal(model(images()), sparse)


def test_what_needs_lite3r_is_refused_while_disabled(toy: Toy) -> None:
    model = apply_lite3r(toy, SPARSE)
    with lite3r_disabled(model):
        with pytest.raises(ConfigError, match=r"is disabled.*call convert outside lite3r_disabled"):
            convert(model)
        with pytest.raises(ConfigError, match=r"is disabled.*call distill outside lite3r_disabled"):
            distill(model, [images()], steps=1)
    assert describe(model).phase == "full"


def test_only_global_sites_change_and_only_this_model() -> None:
    model, other = Toy(), Toy()
    before = snapshot(other)
    apply_lite3r(model)
    assert [isinstance(m, SparseLinearAttention) for m in (*model.frame, *model.cross)] == [False, False, True, True]
    assert snapshot(other) == before
    report = describe(model)
    assert report.skipped == {"frame.0": "scope 'frame' stays dense", "frame.1": "scope 'frame' stays dense"}
    assert [(s.fqn, s.scope, s.sparse) for s in report.sites] == [("cross.0", "global", True), ("cross.1", "global", True)]


def test_scopes_and_single_sites_can_be_chosen() -> None:
    model = apply_lite3r(Toy(), SPARSE, scopes=("frame",), keep_ratio={"frame.1": 1.0, "*": 0.3})
    assert {s.fqn: s.keep_ratio for s in describe(model).sites} == {"frame.0": 0.3, "frame.1": 1.0}


def test_short_sequences_run_dense_and_say_so() -> None:
    model = Toy()
    dense = model(images())
    apply_lite3r(model)  # dense_below=None: 246 tokens never pay
    torch.testing.assert_close(model(images()), dense)
    assert {(s.calls.sparse, s.calls.dense) for s in describe(model).sites} == {(0, 1)}


def test_the_state_dict_keeps_its_keys_and_gains_the_branches(toy: Toy) -> None:
    before = set(toy.state_dict())
    model = apply_lite3r(toy, SPARSE)
    assert set(model.state_dict()) - before == {"cross.0.proj_lin.weight", "cross.1.proj_lin.weight"}
    assert before <= set(model.state_dict())
    toy2 = remove_lite3r(model)
    assert set(toy2.state_dict()) == before


def test_two_image_sizes_view_counts_and_batches_in_a_row(toy: Toy) -> None:
    """Each result is what a fresh model gives: nothing of the forward before is left."""
    inputs = [images(3, 32, 40), images(2, 64, 24), images(3, 32, 40, batch=2), images(1, 40, 32)]
    alone = [apply_lite3r(copy.deepcopy(toy), SPARSE)(x) for x in inputs]
    model = apply_lite3r(toy, SPARSE)
    for x, expected in zip(inputs, alone, strict=True):
        assert torch.equal(model(x), expected)


def test_samples_of_a_batch_do_not_see_each_other(toy: Toy) -> None:
    model = apply_lite3r(toy, SPARSE)
    x = images(batch=3)
    torch.testing.assert_close(model(x), torch.cat([model(sample) for sample in x.split(1)]))


def test_copies_and_pickles_are_whole_and_independent(toy: Toy) -> None:
    model = apply_lite3r(toy, SPARSE)
    nn.init.normal_(model.cross[0].proj_lin.weight)
    x = images()
    expected = model(x)
    twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    for twin in twins:
        assert torch.equal(twin(x), expected)
        assert not torch.equal(twin(images(3, 64, 64)), expected)
        assert type(remove_lite3r(twin).cross[0]) is type(model.cross[0].host)


class Shared(Toy):
    """Both layers are the same module."""

    def __init__(self) -> None:
        super().__init__()
        self.cross[1] = self.cross[0]


def test_a_module_under_two_names_is_swapped_once() -> None:
    model = Shared()
    dense, before = model(images()), snapshot(model)
    apply_lite3r(model, SPARSE)
    assert model.cross[0] is model.cross[1]
    assert not torch.allclose(model(images()), dense)
    assert describe(model).branch_parameters == 16 * 16
    remove_lite3r(model)
    assert snapshot(model) == before
    assert torch.equal(model(images()), dense)


def test_a_part_of_a_model_can_be_given() -> None:
    model = nn.Sequential(Toy(), nn.Identity())
    apply_lite3r(model[0], SPARSE)
    assert {s.fqn for s in describe(model).sites} == {"0.cross.0", "0.cross.1"}
    assert model(images()).isfinite().all()


def test_user_hooks_on_the_attention_module_survive(toy: Toy) -> None:
    seen: list[str] = []
    toy.cross[0].register_forward_hook(lambda *_: seen.append("before"))
    model = apply_lite3r(toy, SPARSE)
    model.cross[0].register_forward_hook(lambda *_: seen.append("after"))
    model(images())
    assert seen == ["before", "after"]
    remove_lite3r(model)(images())
    assert seen == ["before", "after"] * 2


def test_training_mode_reaches_the_host_and_stays(toy: Toy) -> None:
    model = apply_lite3r(toy.train(), SPARSE)
    model.eval()
    with lite3r_disabled(model):
        model(images())
    assert not model.cross[0].host.training
    assert not remove_lite3r(model).cross[0].training


def test_attributes_of_the_host_are_there(toy: Toy) -> None:
    model = apply_lite3r(toy, SPARSE)
    assert model.cross[0].num_heads == 2
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = model.cross[0].no_such_thing


def test_dtype_moves_reach_everything(toy: Toy) -> None:
    model = apply_lite3r(toy, SPARSE).double()
    assert model(images().double()).dtype == torch.float64
    assert {p.dtype for p in remove_lite3r(model).parameters()} == {torch.float64}


def test_autocast_gives_the_autocast_dtype(toy: Toy) -> None:
    model = apply_lite3r(toy, SPARSE)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(images())
    assert out.dtype == torch.bfloat16
    assert out.isfinite().all()


# PEFT and gradients.


@pytest.mark.parametrize("order", ["apply first", "peft first"])
def test_lora_on_qkv(order: str) -> None:
    toy = Toy().eval()
    x = images()
    config = peft.LoraConfig(target_modules=["qkv"], r=2, lora_alpha=2, init_lora_weights=False)
    if order == "apply first":
        model = peft.get_peft_model(apply_lite3r(toy, SPARSE), config)
    else:
        model = apply_lite3r(peft.get_peft_model(toy, config), SPARSE)
    site = next(m for m in model.modules() if isinstance(m, SparseLinearAttention))
    assert isinstance(site.qkv, peft.tuners.lora.Linear)
    assert site.qkv is site.host.qkv
    with_lora = model(x)
    with model.disable_adapter():
        assert not torch.allclose(model(x), with_lora)
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for name, p in model.named_parameters() if "lora_B" in name)


@pytest.mark.parametrize("linear_branch", ["all", "marginal"])
@pytest.mark.parametrize("block_means", [True, False])
def test_gradients_equal_finite_differences(linear_branch: Any, block_means: bool) -> None:
    """Of every weight of a site and of its input. The block map does not flip for such small steps."""
    model = apply_lite3r(Toy(dim=16, num_heads=1, depth=1).double(), SPARSE, linear_branch=linear_branch, block_means=block_means)
    site = model.cross[0]
    nn.init.normal_(site.proj_lin.weight)
    model(images(views=2, height=16, width=24).double())  # fills in the grid
    x = torch.randn(1, 2 * 26, 16, dtype=torch.float64)
    weights = [p.detach().clone().requires_grad_() for p in (site.qkv.weight, site.proj_lin.weight, site.proj.weight)]
    weights[0].data.mul_(4)

    def run(x: Tensor, *weights: Tensor) -> Tensor:
        named = dict(zip(("qkv.weight", "proj_lin.weight", "proj.weight"), weights, strict=True))
        return torch.func.functional_call(site, named, (x,))

    assert torch.autograd.gradcheck(run, (x.requires_grad_(), *weights), fast_mode=True)
    assert site.calls.sparse > 3
    assert site.calls.dense == 0


def test_gradients_reach_the_branch_when_the_backbone_is_frozen(toy: Toy) -> None:
    model = apply_lite3r(toy.requires_grad_(False), SPARSE)
    model(images()).square().sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert set(grads) == {"cross.0.proj_lin.weight", "cross.1.proj_lin.weight"}
    assert all(g is not None and g.abs().sum() > 0 for g in grads.values())


def test_a_forward_without_gradient_keeps_no_graph(toy: Toy) -> None:
    model = apply_lite3r(toy, SPARSE)
    assert model(images()).requires_grad
    with torch.no_grad():
        assert not model(images()).requires_grad


def test_routed_says_nothing_about_heads_but_checks_them(adapter: Adapter) -> None:
    adapter.answer = one_site(projections=Routed(), head_dim=32)
    with pytest.warns(SlowPathWarning, match="adapter says .*head_dim=32"):
        apply_lite3r(Toy(), SPARSE)(images())


def test_a_lora_on_the_linear_branch(tmp_path: Path) -> None:
    model = apply_lite3r(Toy().eval().requires_grad_(False), SPARSE)
    for site in lite3r_modules(model).values():
        nn.init.normal_(site.proj_lin.weight)
    before = model(images())
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["proj_lin"], init_lora_weights=False))  # pyright: ignore[reportArgumentType]
    out = adapted.eval()(images())
    out.square().sum().backward()
    assert not torch.allclose(out, before)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapted.parameters() if p.requires_grad)
    with pytest.raises(CheckpointError, match="merge it before save_lite3r"):
        save_lite3r(model, tmp_path)
    torch.testing.assert_close(adapted.merge_and_unload()(images()), out, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("precision", ["full", "fp8_qat"])
def test_converting_with_a_lora_on_the_linear_branch(precision: Any) -> None:
    """What training for FP8 rounded is the sum of both, so they must be merged before; else the branch stays as it is."""
    model = apply_lite3r(Toy().eval().requires_grad_(False), SPARSE, precision=precision)
    for site in lite3r_modules(model).values():
        nn.init.normal_(site.proj_lin.weight)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["proj_lin"], init_lora_weights=False))  # pyright: ignore[reportArgumentType]
    before = adapted.eval()(images())
    if precision == "fp8_qat":
        with pytest.raises(WeightsError, match=r"cross\.0\.proj_lin for good.* adapter around it .*: merge it first"):
            convert(adapted)
        assert torch.equal(adapted(images()), before)
        adapted = adapted.merge_and_unload()
    after = convert(adapted)(images())
    assert (after - before).norm() < 0.06 * before.norm()
    assert describe(adapted).linears == {"in FP8 (emulated)": 8}


@pytest.mark.parametrize("batch", [0, 1])
def test_no_tokens_and_empty_batches_run_as_in_the_dense_model(adapter: Adapter, batch: int) -> None:
    adapter.answer = lambda model: [dataclasses.replace(site, tokens=None) for site in sites(model)] if isinstance(model, Toy) else None
    model = apply_lite3r(Toy().eval(), keep_ratio=0.3, dense_below=0, block_q=16, block_k=16)
    x = torch.rand(batch, 0 if batch else 40, 32, requires_grad=True)
    out = model.cross[0](x)
    assert out.shape == x.shape
    out.sum().backward()
    assert x.grad is not None
    assert describe(model).sites


def test_an_empty_batch_of_images_runs(adapter: Adapter) -> None:
    model = Toy().eval()
    dense = model(images()[:0])
    assert apply_lite3r(model, keep_ratio=0.3, dense_below=0, block_q=16, block_k=16)(images()[:0]).shape == dense.shape


class HasOne(Attention):
    def __init__(self) -> None:
        super().__init__(32, 2)
        self.proj_lin = nn.Linear(16, 16)


def test_a_branch_does_not_take_the_place_of_what_has_its_name() -> None:
    model, x = nn.Sequential(HasOne()), torch.randn(1, 24, 32)
    site = AttentionSite("0", "global", 16, Routed())
    before = set(model.state_dict())
    with pytest.raises(AdapterError, match="HasOne has a proj_lin of its own"):
        apply_lite3r(model, keep_ratio=0.5, sites=[site])
    expected = model(x)
    apply_lite3r(model, keep_ratio=1.0, sites=[site], linear_branch="none")
    torch.testing.assert_close(model(x), expected)
    remove_lite3r(model)
    assert set(model.state_dict()) == before


class OnItsOwn(Attention):
    """Does what a class may do of its own: keeps a part frozen, moves a plain tensor along, saves a number, reads old checkpoints."""

    _version = 2

    def __init__(self) -> None:
        super().__init__(32, 2)
        self.norm, self.gain, self.steps = nn.BatchNorm1d(32), torch.ones(32), 0

    def train(self, mode: bool = True) -> OnItsOwn:
        super().train(mode)
        self.norm.eval()
        return self

    def _apply(self, fn: Any) -> OnItsOwn:  # type: ignore[override]
        super()._apply(fn)
        self.gain = fn(self.gain)
        return self

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.steps)

    def set_extra_state(self, state: Tensor) -> None:
        self.steps = int(state)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *args: Any) -> None:
        if f"{prefix}old.weight" in state_dict:
            state_dict[f"{prefix}qkv.weight"] = state_dict.pop(f"{prefix}old.weight")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(self.norm((x * self.gain).mT).mT, mask)


def test_a_host_does_what_its_class_does_of_its_own() -> None:
    model = nn.Sequential(OnItsOwn())
    state = model.state_dict()
    old = {("0.old.weight" if name == "0.qkv.weight" else name): value for name, value in state.items()}
    apply_lite3r(model, keep_ratio=0.5, sites=[AttentionSite("0", "global", 16, Routed())])
    site: Any = model[0]
    assert set(model.state_dict()) == {*state, "0.proj_lin.weight"}
    assert model.state_dict()._metadata["0"]["version"] == 2  # type: ignore[attr-defined]
    model.load_state_dict(old | {"0.proj_lin.weight": site.proj_lin.weight, "0._extra_state": torch.tensor(7)})
    assert site.steps == 7
    model.train()
    assert (site.training, site.norm.training, site.proj_lin.training) == (True, False, True)
    assert model.double()[0].gain.dtype == torch.float64
    seen: list[int] = []
    site.register_full_backward_hook(lambda *_: seen.append(1))
    remove_lite3r(model)
    host: Any = model[0]
    assert (host.training, host.norm.training, host.gain.dtype) == (True, False, torch.float64)
    host(torch.randn(1, 24, 32, dtype=torch.float64, requires_grad=True)).sum().backward()
    assert seen == [1]
