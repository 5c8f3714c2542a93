"""The pieces of exact rewrites, each against what it takes the place of."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any, ClassVar

import hosts
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lite3r_plugin.adapter import ExactRewrite
from lite3r_plugin.errors import AdapterError, InputError
from lite3r_plugin.ops import skinny_linear
from lite3r_plugin.ops.qk_norm_rope.naive import rotate
from lite3r_plugin.runtime.exact import (
    MAX_POSITIONS,
    MOST_SIZES,
    FewRows,
    InFp32,
    KeptEmbedding,
    LayersRead,
    NotKept,
    OutputInFp32,
    ReadLayers,
    StartingMethod,
    TableRope,
    few_rows,
    layers_read,
    token_positions,
    without_weights,
)
from lite3r_plugin.wrapper import Changes, RewrittenMethod, RewrittenModule

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: dict(rtol=1e-4, atol=1e-4), torch.bfloat16: dict(rtol=2e-2, atol=4e-2)}


def put(method: RewrittenMethod) -> None:
    with Changes() as changes:
        method.put_in(changes)


def rope() -> nn.Module:
    return hosts.AxialRope("base_frequency")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tables_rotate_as_the_definition(dtype: torch.dtype) -> None:
    x = torch.randn(2, 3, 20, 16).to(dtype)
    positions = torch.randint(MAX_POSITIONS, (2, 20, 2))
    rotated = TableRope(rope())(x, positions)
    assert rotated.dtype == dtype
    torch.testing.assert_close(rotated, rotate(x.double(), positions, 100.0).to(dtype), **TOLERANCE[dtype])


def test_tables_are_exact_whatever_the_module_was_converted_to() -> None:
    x, positions = torch.randn(1, 2, 5, 16), torch.randint(64, (1, 5, 2))
    table = TableRope(rope())
    expected = table(x, positions)
    assert torch.equal(table.bfloat16().float()(x, positions), expected)
    assert not list(table.buffers())  # nothing that a checkpoint would have to hold


def test_tables_made_in_inference_serve_training() -> None:
    table, x = TableRope(rope()), torch.randn(1, 2, 5, 16, requires_grad=True)
    positions = torch.randint(64, (1, 5, 2))
    with torch.inference_mode():
        table(x, positions)
    table(x, positions).sum().backward()
    assert x.grad is not None


def test_positions_count_patches_from_one() -> None:
    positions = token_positions(2, 2, 3, 1, CPU)
    assert positions.shape == (2, 7, 2)
    assert positions[1].tolist() == [[0, 0], [1, 1], [1, 2], [1, 3], [2, 1], [2, 2], [2, 3]]
    assert torch.equal(positions, hosts.grid_positions(2, 2, 3, 1))
    with pytest.raises(InputError, match=f"images of 2 x {MAX_POSITIONS} patches are too large.*exact_rewrites=False"):
        token_positions(1, 2, MAX_POSITIONS, 0, CPU)


class Head(nn.Module):
    """Adds an FP32 embedding of row and column alone, as DPT heads do, and notes for which sizes it is computed."""

    computed: ClassVar[list[tuple[int, int]]] = []

    def embed(self, x: Tensor, width: int, height: int, ratio: float = 0.1) -> Tensor:
        channels, rows, columns = x.shape[1:]
        self.computed.append((rows, columns))
        across = torch.linspace(0, width / height, columns, dtype=torch.float64).expand(channels // 2, rows, -1)
        down = torch.linspace(1, 2, rows, dtype=torch.float64)[:, None].expand(channels // 2, -1, columns)
        return x + ratio * torch.cat((across, down)).float()

    def forward(self, x: Tensor) -> Tensor:
        return self.embed(x, 8, 6, 0.5)


def test_a_position_embedding_is_computed_once_for_each_size_and_dtype() -> None:
    head, other = Head(), Head()
    x = torch.randn(2, 4, 3, 5)
    expected = head(x)
    put(KeptEmbedding(head, "embed"))
    Head.computed.clear()
    for images in (x, x[:1], -x):
        torch.testing.assert_close(head(images), images + (expected - x)[:1])
    assert Head.computed == [(1, 5), (3, 1)]  # of one row and one column: whole ones are large, and in FP64
    assert head(x.bfloat16()).dtype == torch.float32  # as the host has it
    assert len(Head.computed) == 4
    assert torch.equal(other(x), expected)  # another instance is as it was
    put(KeptEmbedding(other, "embed", keeps_dtype=False))
    assert other(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("size", [(16, 37, 28), (128, 294, 518), (8, 1, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_and_a_column_have_the_bits_of_the_whole(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    head = pytest.importorskip("vggt.heads.dpt_head").DPTHead(8, features=16, out_channels=[8] * 4)
    x = torch.randn(2, *size).to(dtype)
    expected = head._apply_pos_embed(x, 518, 294)
    put(KeptEmbedding(head, "_apply_pos_embed"))
    assert torch.equal(head._apply_pos_embed(x, 518, 294), expected)


def test_embeddings_of_many_sizes_do_not_pile_up() -> None:
    head = Head()
    put(method := KeptEmbedding(head, "embed"))
    for rows in range(1, MOST_SIZES + 4):
        x = torch.zeros(1, 2, rows, 1)
        assert torch.equal(head(x), Head()(x))
    assert len(method._kept) == MOST_SIZES


def test_the_last_activation_gets_fp32() -> None:
    made = OutputInFp32(nn.Linear(4, 4).bfloat16())
    assert made(torch.rand(2, 4).bfloat16()).dtype == torch.float32


def test_a_module_can_stay_in_fp32() -> None:
    made = InFp32(nn.Linear(4, 4))
    assert made(torch.rand(2, 4).bfloat16()).dtype == torch.float32


class CameraHead(nn.Module):
    """A head with Linears of three sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.small, self.up, self.down = nn.Linear(9, 512), nn.Linear(512, 2048), nn.Linear(2048, 512, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(self.small(x)).relu())


def rows_of(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of what runs by `skinny_linear` from now on."""
    seen: list[int] = []
    run = skinny_linear.linear

    def counted(x: Tensor, *args: Any) -> Tensor:
        seen.append(x.numel() // x.shape[-1])
        return run(x, *args)

    monkeypatch.setattr(skinny_linear, "linear", counted)
    return seen


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@torch.no_grad()
def test_large_linears_run_few_rows_by_their_own_kernel(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    head, seen = CameraHead().to(device), rows_of(monkeypatch)
    expected = {rows: head(torch.ones(1, rows, 9, device=device)) for rows in (1, 8, 9)}
    found = few_rows("head", head)
    assert [rewrite.fqn for rewrite in found] == ["head.up", "head.down"]
    assert all(rewrite.kernels and rewrite.keeps_dtype for rewrite in found)
    for rewrite in found:
        put(rewrite.make(head.get_submodule(rewrite.fqn.partition(".")[2])))  # pyright: ignore[reportArgumentType]
    for rows, x in expected.items():
        torch.testing.assert_close(head(torch.ones(1, rows, 9, device=device)), x)
    assert seen == [1, 1, 8, 8]
    head.up.weight.zero_()  # what is written since, is seen
    head.up.bias.zero_()
    assert not head(torch.ones(1, 9, device=device)).any()


def narrow_linear(bias: bool = True, device: str = "cpu") -> tuple[nn.Linear, nn.Linear]:
    """A Linear with few rows by itself and its weight in BF16, and one in FP32 with the same numbers."""
    linear = nn.Linear(40, 24, bias=bias).to(device)
    put(FewRows(linear))
    linear.weight.data = linear.weight.data.bfloat16()
    wide = nn.Linear(40, 24, bias=bias).to(device)
    wide.load_state_dict(linear.state_dict())
    return linear, wide


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("bias", [True, False])
@torch.no_grad()
def test_a_weight_in_bf16_is_computed_with_in_fp32(bias: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    linear, wide = narrow_linear(bias, device)
    seen = rows_of(monkeypatch)
    for rows in (1, 16, 17, 100):
        x = torch.randn(2, rows, 40, device=device)[:1]
        torch.testing.assert_close(linear(x), wide(x), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(linear(input=x), wide(x), rtol=1e-5, atol=1e-6)
        vars(linear)["forward"].enabled = False
        torch.testing.assert_close(linear(x), wide(x), rtol=1e-5, atol=1e-6)
        vars(linear)["forward"].enabled = True
    assert seen == [1, 1, 16, 16, 17, 17, 100, 100]
    assert linear(x[:, :0]).shape == (1, 0, 24)
    assert linear(x.bfloat16().float()).dtype == torch.float32
    with torch.autocast(device, torch.bfloat16):
        assert torch.equal(linear(x), wide(x))  # as the host does there
    with pytest.raises(RuntimeError):
        linear(x.half())  # as torch has it: FP16 holds less than the weight
    torch.testing.assert_close(linear(x.double()), wide.double()(x.double()))


def test_gradients_pass_a_weight_in_bf16() -> None:
    linear, wide = narrow_linear()
    x = torch.randn(3, 40, requires_grad=True)
    (expected,) = torch.autograd.grad(wide(x).square().sum(), x)
    linear.requires_grad_(False)
    torch.testing.assert_close(torch.autograd.grad(linear(x).square().sum(), x)[0], expected)
    assert torch.autograd.gradcheck(linear, (x.detach().double().requires_grad_(),))
    linear, wide = narrow_linear()
    for module in (linear, wide):
        module(x).square().sum().backward()
    assert linear.weight.grad is not None
    assert wide.weight.grad is not None
    assert torch.equal(linear.weight.grad, wide.weight.grad.bfloat16())
    torch.testing.assert_close(linear.bias.grad, wide.bias.grad)


def test_whoever_watches_a_weight_in_bf16_sees_operators_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    linear, wide = narrow_linear()
    seen, x = rows_of(monkeypatch), torch.randn(2, 40)
    with torch.no_grad():
        with FlopCounterMode(display=False) as flops:
            linear(x)
        assert flops.get_total_flops() == 2 * 2 * 40 * 24
        torch.testing.assert_close(torch.func.vmap(linear)(x), wide(x))
        torch.testing.assert_close(torch.func.jvp(linear, (x,), (x,)), torch.func.jvp(wide, (x,), (x,)))
    assert seen == []


@pytest.mark.parametrize("grads", [False, True])
def test_compiled_code_has_an_operator_for_a_weight_in_bf16(grads: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler would copy the weight in each call. Where gradients are wanted, it does."""
    linear, wide = narrow_linear()
    graphs: list[str] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph.code)
        return graph.forward

    compiled = torch.compile(lambda x: linear(x).relu(), backend=backend, fullgraph=True, dynamic=True)
    seen = rows_of(monkeypatch)
    with torch.set_grad_enabled(grads):
        for rows in (3, 20):
            x = torch.randn(rows, 40)
            torch.testing.assert_close(compiled(x), wide(x).relu(), rtol=1e-5, atol=1e-6)
    assert all(("lite3r.skinny_linear" in code) is not grads for code in graphs)
    assert seen == ([] if grads else [3, 20])


def test_a_module_in_fp32_takes_its_dtype_from_what_is_not_narrow() -> None:
    head = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    put(FewRows(head[0]))
    head[0].weight.data = head[0].weight.data.bfloat16()
    x = torch.rand(2, 8).bfloat16()
    assert InFp32(head)(x).dtype == torch.float32
    assert InFp32(head.double())(x).dtype == torch.float64
    assert InFp32(head.bfloat16())(x).dtype == torch.bfloat16
    assert InFp32(head[0])(x).dtype == torch.bfloat16
    alone = nn.Sequential(nn.Linear(8, 8, bias=False))
    put(FewRows(alone[0]))
    alone[0].weight.data = alone[0].weight.data.bfloat16()
    assert InFp32(alone)(x).dtype == torch.float32


def test_whoever_watches_or_transforms_operators_sees_those_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    linear, seen = nn.Linear(4, 3), rows_of(monkeypatch)
    put(FewRows(linear))
    x = torch.rand(2, 4)
    with torch.no_grad(), FlopCounterMode(display=False) as flops:
        linear(x)
    assert flops.get_total_flops() == 2 * 2 * 4 * 3
    with torch.no_grad():
        torch.func.vmap(linear)(x)
        torch.func.jvp(linear, (x,), (x,))
    linear(x).sum().backward()
    assert linear.weight.grad is not None
    assert seen == []
    with torch.no_grad():
        linear(input=x)
    assert seen == [2]


def test_other_classes_of_linears_are_left() -> None:
    class Scaled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    with pytest.raises(AdapterError, match=r"it is a Scaled, not a torch.nn.Linear"):
        FewRows(Scaled(2, 2))
    linear, x = nn.Linear(4, 3), torch.ones(1, 4)
    expected = 2 * linear(x)
    put(FewRows(linear))
    linear.__class__ = Scaled  # as parametrisations do
    with torch.no_grad():
        torch.testing.assert_close(linear(x), expected)


class Backbone(RewrittenModule):
    """Tells which layers are read."""

    def rewritten(self, x: Tensor) -> frozenset[int] | None:
        read = layers_read(self)
        return None if read is None else read.layers


class Reader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone(nn.Identity())

    def forward(self, x: Tensor) -> frozenset[int] | None:
        """Fails for no input."""
        found = self.backbone(x)
        if not len(x):
            raise KeyboardInterrupt
        return found


def test_layers_are_dropped_only_inside_of_the_forward_that_reads_some() -> None:
    model, other, x = Reader(), Reader(), torch.rand(2)
    put(ReadLayers(model, "backbone", frozenset({1})))
    assert model(x) == {1}
    assert model.forward(x) == {1}
    assert model.backbone(x) is None
    assert other(x) is None
    with pytest.raises(KeyboardInterrupt):
        model(x[:0])
    assert model.backbone(x) is None
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copied(x) == {1}
        assert copied.backbone(x) is None
        assert vars(copied)["forward"].module is copied


def test_whoever_hooks_a_backbone_sees_all_layers() -> None:
    model, seen = Reader(), []
    put(ReadLayers(model, "backbone", frozenset({1})))
    model.backbone.register_forward_hook(lambda module, args, output: seen.append(output))
    model(torch.rand(2))
    assert seen == [None]


class Starting(StartingMethod):
    """Takes the mean of the tokens of a view."""

    def start(self, layer: int, tokens: Tensor, special: int, height: int, width: int) -> Tensor | None:
        return tokens.mean(2) if layer else None


def test_a_layer_gives_way_where_all_heads_that_read_it_start() -> None:
    one, other = Starting(nn.Identity(), "forward"), Starting(nn.Identity(), "forward")
    tokens = torch.rand(1, 2, 3, 4)
    read = LayersRead(frozenset({0, 1, 2}), {0: (one,), 1: (one, other)})
    assert read.kept(0, tokens, 1, 8, 8) is tokens
    assert read.kept(2, tokens, 1, 8, 8) is tokens
    started = read.kept(1, tokens, 1, 8, 8)
    assert torch.equal(started.of(other), tokens.mean(2))
    with pytest.raises(AdapterError, match=r"layer 1 was not kept, since only heads that start"):
        started.of(Starting(nn.Identity(), "forward"))
    with pytest.raises(AdapterError, match="layer 1"):
        torch.Size(started.shape)


def test_a_layer_that_was_not_kept_says_so() -> None:
    with pytest.raises(AdapterError, match=r"layer 3 was not kept.*exact_rewrites=False"):
        NotKept(3)[:, 0]
    with pytest.raises(AdapterError, match="layer 3"):
        torch.Size(NotKept(3).shape)


def test_a_layer_that_was_not_kept_goes_where_all_arguments_go() -> None:
    layer = NotKept(3)
    assert layer.to("meta", non_blocking=True) is layer


def test_a_rewritten_method_tells_the_arguments_of_the_host() -> None:
    model = Reader()
    before = inspect.signature(model.forward)
    put(ReadLayers(model, "backbone", frozenset({1})))
    assert inspect.signature(model.forward) == before


def test_a_copy_without_weights_has_the_shapes_of_the_model() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.ConvTranspose2d(8, 4, 4, 2, 1, 1), nn.Conv2d(4, 6, 3, padding="same", dilation=2), nn.ReLU(),
        nn.GroupNorm(2, 6), nn.Flatten(2), nn.Linear(195, 5),
    ).bfloat16()  # fmt: skip
    model.register_forward_hook(lambda *_: pytest.fail("a hook of the user ran"))
    copied, x = without_weights(model, {}), torch.rand(2, 3, 12, 14)
    assert not any(parameter.untyped_storage().nbytes() > 4 for parameter in copied.parameters())
    for host, part in zip(list(model)[:-1], copied, strict=False):
        expected = host.float()(x)
        x = part(x)
        assert x.shape == expected.shape


def test_descriptions_are_told_apart_by_what_they_rewrite() -> None:
    first, second = (ExactRewrite(fqn, "words", TableRope, None) for fqn in ("a", "b"))
    assert len({first, second, first}) == 2
