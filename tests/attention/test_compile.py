"""`torch.compile` and `torch.export`: one graph without a break serves any number of views, with gradients too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim, export
from toys import Attention, Separate, Toy, images, toy_adapter

from lite3r_plugin import AttentionSite, FusedQKV, apply_lite3r, remove_lite3r
from lite3r_plugin.costs import attention as costs
from lite3r_plugin.costs.model import AttentionCosts
from lite3r_plugin.errors import AdapterError
from lite3r_plugin.ops import dispatch
from lite3r_plugin.ops.dispatch import constant_in_graphs
from lite3r_plugin.ops.qk_norm_rope import HeadNorm
from lite3r_plugin.ops.sla import forward, operators, sparse_linear_attention
from lite3r_plugin.ops.sla.signature import INPUTS, Arguments
from lite3r_plugin.runtime.compile import repeated_blocks
from lite3r_plugin.testbed.model import Testbed, TestbedConfig
from lite3r_plugin.testing import TEST_CONFIG
from lite3r_plugin.wrapper import Changes, put_module

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
__all__ = ["toy_adapter"]  # the fixture
pytestmark = pytest.mark.usefixtures("fresh")
MAKES: dict[str, Callable[[int, int], nn.Module]] = {
    "fused": Attention,
    "separate": Separate,
    "routed": lambda dim, heads: Attention(dim, heads, "routed"),
}


@pytest.fixture
def fresh() -> Any:
    """No graphs of other tests, which would count towards the limit."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(params=["fused", *(pytest.param(name, marks=pytest.mark.slow) for name in MAKES if name != "fused")])
def toy(request: pytest.FixtureRequest, adapter: Any) -> Toy:
    return Toy(depth=1, make=MAKES[request.param]).eval()


def some_views(views: int, dtype: torch.dtype = torch.float32) -> Tensor:
    x = images(views, dtype=dtype)
    torch._dynamo.mark_dynamic(x, 1)
    return x


OPTIONS: dict[str, dict[str, Any]] = {"sparse": {}, "all kept": {"keep_ratio": 1.0}, "dense": {"dense_below": 10**6}}
NODES = {"sparse": 1, "all kept": 0, "dense": 0}


@pytest.mark.usefixtures("adapter")
@pytest.mark.parametrize(
    ("make", "name"),
    [
        pytest.param(make, name, marks=[pytest.mark.slow] * (make == "separate" or (make != "fused" and name != "sparse")))
        for make in MAKES
        for name in OPTIONS
    ],
)
def test_one_graph_serves_all_views(make: str, name: str) -> None:
    """It has one node for the attention of a site that runs sparse."""
    model = apply_lite3r(Toy(depth=1, make=MAKES[make]).eval(), TEST_CONFIG, **OPTIONS[name])
    graphs = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    with torch.no_grad():
        for views in (3, 2, 7):
            torch.testing.assert_close(compiled(some_views(views)), model(images(views)))
    assert graphs.frame_count == 1
    assert sum(node.target is operators.infer for node in graphs.graphs[0].graph.nodes) == NODES[name]


def costs_are(monkeypatch: pytest.MonkeyPatch, found: AttentionCosts) -> None:
    """Let attention cost that on every device."""
    monkeypatch.setattr(costs.TABLE, "of", lambda device, may_measure: found)


@pytest.mark.usefixtures("adapter")
def test_there_is_one_more_graph_where_sparse_attention_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    costs_are(monkeypatch, AttentionCosts(dense=1e-3, slowdown=1.2, per_token=0.0, per_call=5.0))
    model = apply_lite3r(Toy(depth=1).eval(), TEST_CONFIG, dense_below=None)
    graphs = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    ran = []
    with torch.no_grad():
        for views in range(2, 9):
            torch.testing.assert_close(compiled(some_views(views)), model(images(views)))
            ran.append(model.cross[0].calls.sparse)
    assert ran[2] == 0
    assert ran[-1] >= 2
    assert graphs.frame_count == 2


@pytest.mark.slow
def test_dynamic_shapes_with_the_policy(toy: Toy) -> None:
    """Heads and head dimension are symbols there as well."""
    model = apply_lite3r(toy, TEST_CONFIG, dense_below=None)
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for views in (3, 5):
            torch.testing.assert_close(compiled(images(views)), model(images(views)))


def test_training(toy: Toy) -> None:
    model = apply_lite3r(toy.double(), TEST_CONFIG)
    for site in model.cross:
        nn.init.normal_(site.proj_lin.weight)
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    for views in (3, 2):
        grads = []
        for run in (model, compiled):
            model.zero_grad()
            run(some_views(views, torch.float64)).square().sum().backward()
            grads.append({name: p.grad for name, p in model.named_parameters()})
        torch.testing.assert_close(grads[1], grads[0])
        assert grads[0]["cross.0.proj_lin.weight"].abs().sum() > 0
    assert graphs.frame_count == 1


@pytest.mark.filterwarnings("ignore:While (compiling|exporting), we found certain side effects:UserWarning")  # the tracker of the grid
@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_export_with_any_number_of_views(toy: Toy, strict: bool) -> None:
    model = apply_lite3r(toy, TEST_CONFIG)
    with torch.no_grad():
        # Strictly, torch 2.9 exports nothing that has hooks itself.
        whole = nn.Sequential(model) if strict and Version(torch.__version__) < Version("2.10") else model
        program = export(whole, (images(3),), dynamic_shapes=({1: Dim("views", min=2, max=1000)},), strict=strict)
        for views in (2, 9):
            torch.testing.assert_close(program.module()(images(views)), model(images(views)))


@pytest.mark.slow
def test_the_testbed() -> None:
    model = apply_lite3r(Testbed(TestbedConfig(dim=64, head_dim=32, depth=1, stem=8)).eval(), TEST_CONFIG)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        for i, views in enumerate((4, 3, 5)):
            x = torch.rand(1, views, 3, 64, 96)
            expected = model(x)
            torch._dynamo.mark_dynamic(x, 1)
            with torch.compiler.set_stance("fail_on_recompile" if i else "default"):
                torch.testing.assert_close(compiled(x), expected)


@pytest.mark.slow
@pytest.mark.usefixtures("adapter")
def test_the_default_compiler() -> None:
    model = apply_lite3r(Toy(depth=1).eval(), TEST_CONFIG)
    compiled = torch.compile(model, fullgraph=True, options={"cpp.vec_isa_ok": True})  # or it tries out what the processor says it can
    with torch.no_grad():
        for views in (3, 5):
            torch.testing.assert_close(compiled(some_views(views)), model(images(views)))


def flat_arguments(linear: str, learns: str) -> Arguments:
    """Arguments of the operators, with a norm, a rotary embedding, an order, and everything that may be absent absent once."""
    tokens, dim = 33, 32
    q, k, v = torch.randn(1, tokens, 3, 2, dim, device=DEVICE).permute(2, 0, 3, 1, 4).unbind(0)
    norm = HeadNorm("layer", torch.rand(dim, device=DEVICE), torch.rand(dim, device=DEVICE), 1e-5)
    tensors = dict(q=q, k=k, v=v, q_weight=norm.weight, q_bias=norm.bias)
    if linear != "none":
        tensors["proj"] = torch.randn(dim, dim, device=DEVICE)
    leaves = {name: x.clone().requires_grad_(learns == "all" or name == "proj") for name, x in tensors.items()}
    return Arguments(
        **dict.fromkeys(INPUTS) | leaves, order=torch.randperm(tokens, device=DEVICE).int(),
        positions=torch.randint(0, 9, (1, tokens, 2), device=DEVICE), pinned_tokens=5, key_pinned_tokens=5, keep_ratio=0.3,
        negligible_ratio=0.2 if linear == "marginal" else 0.0, q_kind="layer", q_eps=1e-5, k_kind=None, k_eps=0.0, rope_base=100.0,
        scale=None, linear=linear, feature_map="softmax", block_means=linear == "all", block_q=32, block_k=16, backend="auto",
    )  # fmt: skip


def learning(arguments: Arguments) -> list[bool]:
    """Which inputs need a gradient."""
    return [x is not None and x.requires_grad for x in arguments.inputs]


@pytest.fixture(params=["naive", "triton"])
def triton(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the operators take the Triton path, in its interpreter where there is no GPU."""
    if request.param == "triton":
        pytest.importorskip("triton")
    reason = None if request.param == "triton" else "it is not wanted"
    monkeypatch.setattr(dispatch, "why_not_triton", lambda *_, **__: reason)
    return request.param == "triton"


@pytest.mark.filterwarnings("ignore::lite3r_plugin.ops.dispatch.SlowPathWarning")  # on a GPU
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # opcheck's own
@pytest.mark.filterwarnings("ignore:.*deterministic")
@pytest.mark.parametrize(
    ("linear", "learns", "triton"),
    [
        pytest.param(linear, learns, path, marks=[pytest.mark.slow] * (path == "triton" or learns == "proj"))
        for linear, learns in (("all", "all"), ("all", "proj"), ("none", "all"))
        for path in ("naive", "triton")
    ],
    indirect=["triton"],
)
def test_the_operators_keep_their_contracts(linear: str, learns: str, triton: bool) -> None:
    arguments = flat_arguments(linear, learns)
    torch.library.opcheck(operators.infer, [x.detach() if isinstance(x, Tensor) else x for x in arguments])
    torch.library.opcheck(operators.train, (learning(arguments), *arguments))


@pytest.mark.filterwarnings("ignore::lite3r_plugin.ops.dispatch.SlowPathWarning")  # on a GPU
@pytest.mark.filterwarnings("ignore:.*deterministic")  # torch's gathers and masked attention on a GPU
@pytest.mark.parametrize("learns", ["all", "proj"])
def test_gradients_of_the_operator_are_those_of_the_eager_call(learns: str, triton: bool) -> None:
    arguments = flat_arguments("marginal", learns)
    leaves = [x for x in arguments.inputs if x is not None and x.requires_grad]
    grad = torch.randn(1, 33, 2, 32, device=DEVICE)
    expected = torch.autograd.grad(forward.run(arguments._replace(backend="naive"))[0].transpose(1, 2), leaves, grad)
    found = torch.autograd.grad(operators.train(learning(arguments), *arguments)[0], leaves, grad)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_constants_of_graphs_are_marked_as_torch_does() -> None:
    ours, torchs = constant_in_graphs(lambda: 1), torch.compiler.assume_constant_result(lambda: 1)
    assert vars(ours) == vars(torchs) != {}


def assert_a_graph_replays(run: Callable[[Tensor], tuple[Tensor, ...]], inputs: list[Tensor]) -> None:
    """With the bits of a call for each of the inputs."""
    expected = [run(x) for x in inputs]
    static = inputs[0].clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(static)
    for x, y in zip(inputs, expected, strict=True):
        static.copy_(x)
        graph.replay()
        assert all(map(torch.equal, out, y))


@pytest.mark.gpu
@pytest.mark.parametrize("linear", ["all", "none"])
def test_a_cuda_graph_replays_on_new_inputs(linear: str) -> None:
    """Captured without a word to the host; order and kernels were made by the call before."""
    tokens, dim = 3000, 64
    inputs = [torch.randn(1, tokens, 3, 4, dim, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    options: dict[str, Any] = dict(
        keep_ratio=0.2, linear=linear, proj=torch.randn(dim, dim, device="cuda"), block_means=True, pinned_tokens=70,
        order=torch.randperm(tokens, device="cuda").int(), positions=torch.randint(0, 40, (1, tokens, 2), device="cuda"), rope_base=100.0,
        q_norm=HeadNorm("layer", None, None, 1e-6),
    )  # fmt: skip

    assert_a_graph_replays(lambda qkv: (sparse_linear_attention(*qkv.permute(2, 0, 3, 1, 4).unbind(0), **options),), inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("linear", ["all", "marginal"])
def test_a_cuda_graph_replays_a_training_step(linear: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward pass, with all the streams of the latter."""
    monkeypatch.setattr("lite3r_plugin.ops.sla.kernels.operands.LARGE", 0)
    inputs = [torch.randn(1, 4, 3000, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    proj = torch.randn(64, 64, device="cuda", requires_grad=True)

    def step(x: Tensor) -> tuple[Tensor, ...]:
        leaves = [(x * factor).requires_grad_() for factor in (1, 2, 3)]
        out = sparse_linear_attention(*leaves, keep_ratio=0.2, linear=linear, proj=proj, block_means=True, pinned_tokens=70)
        return torch.autograd.grad(out.square().sum(), [*leaves, proj])

    assert_a_graph_replays(step, inputs)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores")  # the compiler's advice
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")  # of a graph between two breaks, in torch 2.11
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_on_a_gpu(mode: str, adapter: Any) -> None:
    """Triton inside the graph, and CUDA graphs around it."""
    model = apply_lite3r(Toy(dim=128), TEST_CONFIG, attention_backend="triton", block_q=64, block_k=32).cuda().bfloat16().eval()
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    with torch.no_grad():
        for views in (3, 3, 3, 5, 5):
            x = images(views, dtype=torch.bfloat16).cuda()
            torch.testing.assert_close(compiled(x).clone(), model(x), atol=3e-2, rtol=3e-2)


@pytest.mark.usefixtures("adapter")
@pytest.mark.parametrize("dynamic", [pytest.param(None, marks=pytest.mark.slow), True])
@torch.no_grad()
def test_sites_that_share_code_have_their_own_policy(monkeypatch: pytest.MonkeyPatch, dynamic: bool | None) -> None:
    """Where code is compiled module by module, a graph for one keep ratio is none for another."""
    costs_are(monkeypatch, AttentionCosts(dense=1e-3, slowdown=1.0, per_token=0.0, per_call=0.001))
    keep = {"cross.0": 0.1, "cross.1": 0.95, "cross.2": 0.1, "cross.3": 0.5}
    model = apply_lite3r(Toy(depth=4).eval(), TEST_CONFIG, keep_ratio=keep, dense_below=None, block_means=False, pin="none")
    x = torch.randn(1, 246, 32)
    model(images())  # the grid
    expected = [site(x) for site in model.cross]
    rules = [costs.break_even(torch.device("cpu"), *site.shares, False) for site in model.cross]
    assert rules[0] == rules[2] != rules[1] != rules[3]
    graphs = CompileCounterWithBackend("eager")
    for site in model.cross:
        site.compile(backend=graphs, fullgraph=True, dynamic=dynamic)
    for site, out in zip(model.cross, expected, strict=True):
        torch.testing.assert_close(site(x), out)
    assert graphs.frame_count == 3


@pytest.mark.parametrize(
    "options",
    [{}, *(pytest.param(fields, marks=pytest.mark.slow) for fields in ({"keep_ratio": 1.0}, {"precision": "fp8"}, {"dense_below": None}))],
    ids=["sparse", "dense", "fp8", "policy"],
)
@torch.no_grad()
def test_blocks_compiled_one_by_one_share_code(options: dict[str, Any]) -> None:
    """However many there are, which the compiler's limit of recompilations needs: the last ones compile nothing anew."""
    model = Testbed(TestbedConfig(dim=32, head_dim=32, depth=3, stem=8)).eval().requires_grad_(False)
    model = apply_lite3r(model, TEST_CONFIG, **options)
    x = torch.rand(1, 3, 3, 64, 96)
    expected = model(x)
    counter, graphs = CompileCounterWithBackend("eager"), []
    last = (model.aggregator.frame_blocks[2], model.aggregator.global_blocks[2])
    for blocks in ([block for block in repeated_blocks(model) if block not in last], last):
        for block in blocks:
            block.compile(backend=counter, dynamic=True)
        model(torch.rand(1, 4, 3, 64, 96))
        torch.testing.assert_close(model(x), expected)
        graphs.append(counter.frame_count)
    assert graphs[1] == graphs[0] > 0


def test_second_derivatives_are_refused() -> None:
    q, k, v = (torch.randn(1, 2, 70, 8, requires_grad=True) for _ in range(3))
    compiled = torch.compile(lambda *x: sparse_linear_attention(*x, keep_ratio=0.3, block_q=32, block_k=16), backend="eager")
    with pytest.raises(NotImplementedError, match="no second derivatives"):
        torch.autograd.grad(compiled(q, k, v).square().sum(), q, create_graph=True)


def test_attention_modules_that_are_compiled_by_themselves() -> None:
    """`torch.compile(module)` calls the module that it was given, whatever takes its place."""
    torch.manual_seed(0)
    plain, x = nn.Sequential(Attention(32, 2), Attention(32, 2)).eval(), torch.randn(1, 96, 32)
    model = nn.Sequential(*(torch.compile(module, backend="eager") for module in plain))
    fields: dict[str, Any] = {"keep_ratio": 0.25, "dense_below": 0, "block_q": 16, "block_k": 16, "pin": "none"}
    with torch.no_grad():
        dense = model(x)
        with pytest.raises(AdapterError, match=r"what torch.compile made around '0\._orig_mod': name the latter"):
            apply_lite3r(model, sites=[AttentionSite("0", "global", 16, FusedQKV(2))], **fields)
        apply_lite3r(model, sites=[AttentionSite(f"{i}._orig_mod", "global", 16, FusedQKV(2)) for i in range(2)], **fields)
        found = model(x)
        remove_lite3r(model)
        assert torch.equal(model(x), dense)
        changes = Changes()
        put_module(changes, dict(model.named_modules()), "1._orig_mod", nn.Identity())
        assert not torch.equal(model(x), dense)
        changes.undo()
        assert torch.equal(model(x), dense)
        expected = apply_lite3r(plain, sites=[AttentionSite(f"{i}", "global", 16, FusedQKV(2)) for i in range(2)], **fields)(x)
    assert not torch.allclose(found, dense, rtol=1e-2)
    torch.testing.assert_close(found, expected)
