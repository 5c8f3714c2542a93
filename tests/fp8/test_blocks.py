"""Which modules count as transformer blocks, by structure or as the adapter says."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import nn
from toys import Adapter, Attention, Toy, toy_adapter

from lite3r_plugin import AttentionSite, PreNormBlock, Routed, apply_lite3r, describe
from lite3r_plugin.apply.lookup import block_linears, lite3r_modules
from lite3r_plugin.errors import AdapterError
from lite3r_plugin.fp8.blocks import find_blocks, find_linears

__all__ = ["toy_adapter"]  # the fixture


def attention() -> nn.Module:
    return nn.Linear(4, 4)


def block() -> nn.Module:
    return nn.ModuleDict(dict(attn=attention(), mlp=nn.Linear(4, 4)))


def blocks_of(model: nn.Module, *sites: str) -> list[str]:
    return list(find_blocks(dict(model.named_modules()), [AttentionSite(fqn, "global", 4, Routed()) for fqn in sites]))


class Named(nn.Module):
    """Its children, by name."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


def test_elements_of_a_list() -> None:
    model = Named(blocks=nn.ModuleList(Named(attn=attention(), mlp=nn.Linear(4, 4)) for _ in range(2)), head=nn.Linear(4, 4))
    assert blocks_of(model, "blocks.0.attn", "blocks.1.attn") == ["blocks.0", "blocks.1"]


def test_one_block_in_its_list_does_not_reach_the_head() -> None:
    model = Named(decoder=Named(blocks=nn.ModuleList([Named(attn=attention())]), head=nn.Linear(4, 4)))
    assert blocks_of(model, "decoder.blocks.0.attn") == ["decoder.blocks.0"]


def test_attention_deep_inside_its_block() -> None:
    layers = nn.ModuleList(Named(attention=Named(attention=attention(), output=nn.Linear(4, 4)), up=nn.Linear(4, 4)) for _ in range(2))
    model = Named(encoder=Named(layer=layers))
    assert blocks_of(model, "encoder.layer.0.attention.attention", "encoder.layer.1.attention.attention") == [
        "encoder.layer.0",
        "encoder.layer.1",
    ]


def test_the_list_itself_holds_the_attention() -> None:
    model = Named(frame=nn.ModuleList([attention(), attention()]))
    assert blocks_of(model, "frame.0", "frame.1") == ["frame.0", "frame.1"]


def test_attention_and_mlp_in_a_list_of_two() -> None:
    model = Named(layers=nn.ModuleList(nn.ModuleList([attention(), nn.Linear(4, 4)]) for _ in range(2)))
    assert blocks_of(model, "layers.0.0", "layers.1.0") == ["layers.0", "layers.1"]


def test_outside_of_lists() -> None:
    model = Named(first=Named(attn=attention()), second=Named(attn=attention()), both=Named(a=attention(), b=attention()))
    assert blocks_of(model, "first.attn", "second.attn", "both.a", "both.b") == ["first", "second", "both.a", "both.b"]
    assert blocks_of(Named(attn=attention(), head=nn.Linear(4, 4)), "attn") == ["attn"]


def test_two_sites_of_one_block() -> None:
    model = Named(blocks=nn.ModuleList([Named(self_attn=attention(), cross_attn=attention())]))
    assert blocks_of(model, "blocks.0.self_attn", "blocks.0.cross_attn") == ["blocks.0"]


def test_the_adapter_has_the_last_word() -> None:
    model = Named(outer=Named(blocks=nn.ModuleList([Named(attn=attention())]), mlp=nn.Linear(4, 4)))
    site = AttentionSite("outer.blocks.0.attn", "global", 4, Routed(), block=PreNormBlock("outer", "mlp", "mlp"))
    assert list(find_blocks(dict(model.named_modules()), [site])) == ["outer"]


def linears_of(model: nn.Module, *blocks: str, branches: tuple[str, ...] = ()) -> dict[tuple[str, ...], nn.Module]:
    modules = dict(model.named_modules(remove_duplicate=False))
    return {linear.names: linear.module for linear in find_linears(modules, {block: [block] for block in blocks}, (), branches)}


def test_subclasses_of_linear_are_found_but_not_known() -> None:
    other, plain = nn.modules.linear.NonDynamicallyQuantizableLinear(4, 4), nn.Linear(4, 4)
    found = find_linears(dict(nn.Sequential(other, plain).named_modules()), {"": ["block"]}, ())
    assert [(linear.module, linear.known) for linear in found] == [(other, False), (plain, True)]


def test_a_linear_has_all_its_names_and_is_found_once() -> None:
    plain = nn.Linear(4, 4)
    model = Named(a=Named(x=plain, y=plain), b=Named(z=plain), head=nn.Linear(4, 4), more=nn.Linear(4, 4))
    assert linears_of(model, "a", "b", "more") == {("a.x", "a.y", "b.z"): plain, ("more",): model.more}


def test_what_is_inside_an_adapter_has_the_name_of_the_adapter_too() -> None:
    model = Named(block=Named(qkv=Named(base_layer=nn.Linear(4, 4), lora_A=nn.ModuleDict(dict(default=nn.Linear(4, 4))))))
    assert list(linears_of(model, "block")) == [("block.qkv.base_layer", "block.qkv")]


def test_what_adapters_consist_of_is_no_part_of_a_block() -> None:
    """Neither at the first level nor inside of what an adapter is around."""
    inner = Named(base_layer=Named(up=nn.Linear(4, 4)), lora_A=nn.ModuleDict(dict(default=nn.Linear(4, 4))))
    model = Named(block=Named(mlp=Named(base_layer=inner, lora_B=nn.ModuleDict(dict(default=nn.Linear(4, 4))))))
    assert [names[0] for names in linears_of(model, "block")] == ["block.mlp.base_layer.base_layer.up"]


def test_the_adapter_around_a_linear() -> None:
    copied = Named(original_module=nn.Linear(4, 4), modules_to_save=nn.ModuleDict(dict(default=nn.Linear(4, 4))))
    model = Named(qkv=Named(base_layer=nn.Linear(4, 4)), proj=nn.Linear(4, 4), up=copied)
    found = find_linears(dict(model.named_modules()), {"": [""]}, ())
    assert [(linear.names[0], linear.tuner) for linear in found] == [
        ("qkv.base_layer", model.qkv),
        ("proj", None),
        ("up.original_module", copied),
        ("up.modules_to_save.default", copied),
    ]


def test_linear_branches_are_no_part_of_a_block() -> None:
    model = Named(attn=Named(qkv=nn.Linear(4, 4), proj_lin=Named(base_layer=nn.Linear(4, 4))))
    assert list(linears_of(model, "attn", branches=("attn.proj_lin",))) == [("attn.qkv",)]


@pytest.mark.usefixtures("adapter")
def test_the_linears_of_all_scopes_and_no_others() -> None:
    model = apply_lite3r(Toy(), precision="fp8_qat")
    assert len(block_linears(model)) == 2 * 4  # qkv and proj, frame and global; neither proj_lin nor the head
    assert describe(model).linears == {"rounded to FP8 in training": 8}
    assert type(model.head) is nn.Linear


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        (PreNormBlock("cross.0", "qkv", "nothing", norm1="qkv", norm2="qkv"), "nothing"),
        (PreNormBlock("cross.0", "qkv", "proj", norm1="qkv", norm2="qkv", gain1="qkv.gamma"), "gamma"),
        (PreNormBlock("frame.0", "qkv", "proj", norm1="qkv", norm2="qkv"), "the site is not inside"),
    ],
)
def test_a_block_that_is_not_as_described(adapter: Adapter, block: PreNormBlock, reason: str) -> None:
    model = Toy(make=lambda dim, heads: Named(attn=Attention(dim, heads), qkv=nn.Linear(dim, dim), proj=nn.Linear(dim, dim)))
    adapter.answer = lambda model: [AttentionSite("cross.0.attn", "global", 16, Routed(2), block=block)]
    with pytest.raises(AdapterError, match=f"site 'cross.0.attn': the block .* is not as described: .*{reason}"):
        apply_lite3r(model)
    assert not lite3r_modules(model)


def linear() -> nn.Linear:
    return nn.Linear(4, 4)


def qkv(*more: str) -> Named:
    return Named(**{name: linear() for name in ("query", "key", "value", *more)})


@pytest.mark.parametrize(
    ("make", "site", "out", "left"),
    [
        (lambda: Named(attn=qkv("dense")), "attn", None, ["attn.dense"]),
        (lambda: Named(attn=Named(proj=linear(), qkv=linear())), "attn", None, ["attn.proj"]),
        (lambda: Named(attn=Named(qkv=linear(), proj=linear(), gate=linear())), "attn", None, ["attn.proj"]),
        (lambda: Named(attn=Named(qkv=linear(), to_out=nn.Sequential(linear(), nn.Dropout()))), "attn", None, ["attn.to_out.0"]),
        (lambda: Named(attn=Named(out_proj=linear())), "attn", None, ["attn.out_proj"]),
        (lambda: Named(attn=Named(qkv=linear(), proj=Named(a=linear(), b=linear()))), "attn", None, ["attn.proj.a", "attn.proj.b"]),
        (lambda: Named(attn=Named(mix=linear(), v_proj=linear())), "attn", None, []),
        (lambda: Named(a=Named(attention=qkv(), output=Named(dense=linear()))), "a.attention", None, ["a.output.dense"]),
        (lambda: Named(attention=qkv(), output=Named(dense=linear())), "attention", None, []),  # that of the MLP
        (lambda: Named(attn=Named(mix=linear(), back=linear())), "attn", None, ["attn.back"]),
        (lambda: Named(attn=Named(mix=linear())), "attn", None, []),
        (lambda: Named(attn=Named(back=linear(), mix=linear(), proj=linear())), "attn", "back", ["attn.back"]),
        (lambda: Named(a=Named(_orig_mod=Named(back=linear(), mix=linear()))), "a", "back", ["a._orig_mod.back"]),
        (lambda: Named(in_proj=linear(), attn_out_proj=linear(), mlp_out_proj=linear()), "", None, ["attn_out_proj"]),
        (lambda: Named(mix=linear(), last=linear()), "", None, []),
    ],
)  # fmt: skip
def test_inner_leaves_output_projections(make: Callable[[], nn.Module], site: str, out: str | None, left: list[str]) -> None:
    model = Named(blocks=nn.ModuleList(make() for _ in range(4)))
    sites = [AttentionSite(f"blocks.{i}.{site}".strip("."), "global", 4, Routed(out=out)) for i in range(4)]
    linears = find_linears(dict(model.named_modules()), {f"blocks.{i}": [f"blocks.{i}"] for i in range(4)}, sites)
    inner = [x for x in linears if x.names[0].startswith(("blocks.1.", "blocks.2."))]
    assert [x.names[0] for x in inner if not x.inner] == [f"blocks.{i}.{name}" for i in (1, 2) for name in left]
    assert not any(x.inner for x in linears if x not in inner)


def test_an_output_projection_that_is_not_there(adapter: Adapter) -> None:
    adapter.answer = lambda model: [AttentionSite("cross.0", "global", 16, Routed(2, out="output"))]
    with pytest.raises(AdapterError, match=r"site 'cross\.0': Attention has no child 'output'; correct the adapter's projections"):
        apply_lite3r(Toy())
