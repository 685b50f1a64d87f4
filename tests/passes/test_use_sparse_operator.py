from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._functorch.partitioners import default_partition
from torch.nn import functional as F

import padst_compiler as padst
from padst_compiler.backend import Settings, fold_dynamo
from padst_compiler.kernels import CANDIDATES
from padst_compiler.passes import training_passes
from padst_compiler.passes.use_sparse_operator import UseSparseOperator
from padst_compiler.rewrite import Facts, run_pipeline
from padst_compiler.structures import NM, Block, Diagonal, FanIn, Shape, Structure, Unstructured

Rewrite = Callable[..., Any]
permute: Callable[..., Tensor] = torch.ops.padst.permute
inverse: Callable[..., Tensor] = torch.ops.padst.invert
STRUCTURES = [Block(4), Block(2, 4), NM(4), Diagonal(), FanIn(), Unstructured()]
STEP = UseSparseOperator()


def d(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def weight(structure: Structure, o: int, i: int) -> tuple[Callable[..., Tensor], dict[str, Tensor]]:
    """Return what unpacks a weight of that shape, and its stored tensors."""
    indices = structure.select(torch.rand(o, i), structure.kept(Shape(o, i), 0.5))
    values = structure.pack(d(o, i), indices).contiguous()

    def unpack(v: Tensor, k: Tensor) -> Tensor:
        made: Tensor = torch.ops.padst.unpack(v, k, structure.name, o, i)
        return made

    return unpack, {"v": values, "k": indices}


each = pytest.mark.parametrize("structure", STRUCTURES, ids=str)


@each
def test_a_product_becomes_the_operator(rewrite: Rewrite, structure: Structure) -> None:
    made, held = weight(structure, 16, 8)
    bias = d(16)
    result = rewrite(STEP, lambda x, v, k, b: F.linear(x, made(v, k), b), d(3, 8), b=bias, **held)
    assert result.after == [f"{structure.name}_linear"]
    assert result.fired == ["addmm is a sparse operator"] and result.left == []


@each
@pytest.mark.parametrize("side", ["columns", "rows"])
@pytest.mark.parametrize("turned", [False, True])
def test_a_moved_weight_moves_what_stands_around(
    rewrite: Rewrite, structure: Structure, side: str, turned: bool
) -> None:
    made, held = weight(structure, 16, 8)
    table = torch.randperm(8 if side == "columns" else 16)

    def run(x: Tensor, v: Tensor, k: Tensor, p: Tensor) -> Tensor:
        w = made(v, k)
        w = permute(w, inverse(p)) if side == "columns" else permute(w.t(), p).t()
        return x @ w if turned else x @ w.t()

    result = rewrite(STEP, run, d(3, 16 if turned else 8), p=table, **held)
    operator = f"{structure.name}_linear" + ("_dx" if turned else "")
    first = ["permute"] if (side == "columns") != turned else []
    assert [n for n in result.after if n in ("permute", operator)] == (
        [*first, operator] if first else [operator, "permute"]
    )


PRODUCTS: dict[str, Callable[..., Tensor]] = {
    "x @ W": lambda x, w: x @ w,
    "W @ x": lambda x, w: (w @ x.mT.reshape(8, -1)).t(),
    "einsum": lambda x, w: torch.einsum("bti,oi->bto", x, w),
    "batched": lambda x, w: torch.bmm(x, w.t().expand(2, -1, -1)),
    "matmul": lambda x, w: torch.matmul(x, w.t()),
    "addmm": lambda x, w: torch.addmm(x.new_ones(16), x.flatten(0, 1), w.t()),
    "cast": lambda x, w: (x.float() @ w.float().t()).double(),
    "heads": lambda x, w: torch.einsum("bti,hoi->btho", x, w.view(4, 4, 8)),
    "a slice": lambda x, w: F.linear(x, w[4:12]),
    "chunks": lambda x, w: sum((F.linear(x, part) for part in w.chunk(4)), x.new_zeros(())),
    "twice": lambda x, w: F.linear(x, w) @ w,
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_every_way_to_multiply(rewrite: Rewrite, name: str) -> None:
    width = 16 if name == "x @ W" else 8
    made, held = weight(Block(4), 16, 8)
    product = PRODUCTS[name]
    if name == "cast":
        x = d(2, 5, width)
        result = rewrite(STEP, lambda x, v, k: product(x, made(v, k)), x, compare=False, **held)
    else:
        x = d(2, 5, width)
        result = rewrite(STEP, lambda x, v, k: product(x, made(v, k)), x, **held)
    assert any(op.startswith("block_linear") for op in result.after), result.after
    assert not [node for node in result.graph.nodes if "unpack" in str(node.target)]
    assert not {"mm", "bmm", "addmm"} & set(result.after) and result.left == []


def test_stacked_experts_are_taken_apart(rewrite: Rewrite) -> None:
    made, held = weight(FanIn(), 48, 8)

    def run(x: Tensor, v: Tensor, k: Tensor) -> Tensor:
        return torch.bmm(x, made(v, k).view(3, 16, 8).mT)

    result = rewrite(STEP, run, d(3, 5, 8), **held)
    assert result.after.count("fan_in_linear") == 3 and result.left == []


def refused(rewrite: Rewrite, run: Callable[..., Any], x: Tensor, held: dict[str, Tensor]) -> Any:
    result = rewrite(STEP, run, x, **held)
    assert result.fired == []
    return result.left


def test_too_many_experts_stay(rewrite: Rewrite) -> None:
    made, held = weight(FanIn(), 33 * 2, 8)
    run = lambda x, v, k: torch.bmm(x, made(v, k).view(33, 2, 8).mT)  # noqa: E731
    assert refused(rewrite, run, d(33, 5, 8), held) == ["unpacked for aten.bmm.default"]


def test_a_slice_through_a_block_stays(rewrite: Rewrite) -> None:
    made, held = weight(Block(4), 16, 8)
    run = lambda x, v, k: F.linear(x, made(v, k)[2:6])  # noqa: E731
    assert refused(rewrite, run, d(5, 8), held) == ["unpacked for aten.mm.default"]


@pytest.mark.parametrize("structure", [Diagonal(), Unstructured(), Block(4, balanced=False)])
def test_a_slice_of_a_structure_without_rows_stays(rewrite: Rewrite, structure: Any) -> None:
    made, held = weight(structure, 16, 8)
    run = lambda x, v, k: F.linear(x, made(v, k)[4:8])  # noqa: E731
    assert refused(rewrite, run, d(5, 8), held) == ["unpacked for aten.mm.default"]


def test_a_bias_before_a_weight_on_the_left_stays(rewrite: Rewrite) -> None:
    made, held = weight(Block(4), 16, 8)
    run = lambda x, v, k: torch.addmm(x.new_ones(5), made(v, k), x)  # noqa: E731
    assert refused(rewrite, run, d(8, 5), held) == ["unpacked for aten.addmm.default"]


def test_other_uses_of_a_weight_stay_and_are_named(rewrite: Rewrite) -> None:
    made, held = weight(Block(4), 16, 8)

    def run(x: Tensor, v: Tensor, k: Tensor) -> Tensor:
        w = made(v, k)
        return F.linear(x, w) * w.square().sum()

    result = rewrite(STEP, run, d(5, 8), **held)
    assert result.fired == ["mm is a sparse operator"]
    assert len(result.left) == 1 and result.left[0].startswith("unpacked for aten.")


def test_a_graph_without_weights_is_left_alone(rewrite: Rewrite) -> None:
    result = rewrite(STEP, lambda x, w: x @ w, d(3, 8), w=d(8, 8))
    assert (result.after, result.fired, result.left) == (["mm"], [], [])


class Raw(nn.Module):
    """A raw parameter, stacked experts, and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(32, 32) / 6)
        self.experts = nn.Parameter(torch.randn(2, 32, 32) / 6)
        self.attention = nn.MultiheadAttention(32, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.w).relu()
        x = torch.bmm(x, self.experts)
        y: Tensor = self.attention(x, x, x, need_weights=False)[0]
        return x + y


def sparse(structure: str) -> tuple[nn.Module, Tensor]:
    model, x = Raw().double(), d(2, 6, 32)
    config = padst.SparseConfig(structure=structure, sparsity=0.5, permutation="random")
    padst.sparsify(model, {"re:.*": config}, example_inputs=x)
    return model, x


@pytest.mark.parametrize("structure", ["block:16", "nm:4:16", "fan_in"])
def test_a_captured_model_multiplies_by_stored_numbers(structure: str) -> None:
    model, x = sparse(structure)
    model.eval()
    expected = padst.to_dense(model)(x).detach()
    told = padst.explain(model, x, options={"kernels": "sparse"})
    rewritten = [row for row in told.passes if row[0] == "use_sparse_operator"]
    assert len(rewritten) >= 4 and all(state == "fired" for _, _, state, _ in rewritten)
    assert {site for _, site, _, _ in rewritten} == {
        "w_sparse",
        "experts_sparse",
        "attention.in_proj_weight_sparse",
        "attention.out_proj.weight_sparse",
    }
    if structure == "block:16":  # the others have no faster formulation on this device
        assert len(told.kernels) == 5 and not [k for k in told.kernels if "dense" in k[1]]

    def folded(module: fx.GraphModule, inputs: Any) -> Any:
        return fold_dynamo(module, inputs, Settings(kernels="sparse")).graph_module

    with torch.no_grad():
        result = torch.compile(model, backend=folded)(x)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-9)


def joint(graphs: list[fx.Graph]) -> Any:
    """Return a backend that runs the training passes on joint graphs, and no code generator."""

    def partition(module: fx.GraphModule, inputs: Any, **options: Any) -> Any:
        passes = training_passes(CANDIDATES, prefer="sparse")
        run_pipeline(passes, module.graph, Facts(table=None))
        module.graph.lint()
        module.recompile()
        graphs.append(module.graph)
        return default_partition(module, inputs, **options)

    return aot_autograd(
        fw_compiler=lambda module, _: make_boxed_func(module.forward), partition_fn=partition
    )


@pytest.mark.parametrize("structure", ["block:16", "nm:4:16", "fan_in"])
def test_a_training_step_has_the_eager_gradients(structure: str) -> None:
    model, x = sparse(structure)
    graphs: list[fx.Graph] = []
    seen = []
    for run in (model, torch.compile(model, backend=joint(graphs))):
        y: Any = x.clone().requires_grad_()
        run(y).square().sum().backward()
        seen.append([y.grad, *(p.grad for p in model.parameters())])
        model.zero_grad(set_to_none=True)
    for eager, compiled in zip(*seen, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=0, atol=1e-9)
    said = {str(node.target) for graph in graphs for node in graph.nodes}
    assert not [name for name in said if "unpack" in name or "padst.pack" in name]
    if structure != "block:16":
        return
    dense = [
        n.meta["val"].shape
        for graph in graphs
        for n in graph.nodes
        if n.op != "output" and isinstance(n.meta.get("val"), Tensor)
    ]
    assert torch.Size([32, 32]) not in dense and torch.Size([96, 32]) not in dense


@pytest.mark.slow
def test_a_model_compiles_with_inductor() -> None:
    model, x = sparse("block:16")
    expected = padst.to_dense(model.eval())(x).detach()
    compiled = torch.compile(model, backend="padst", options={"kernels": "sparse"})
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), expected, rtol=0, atol=1e-9)
    y = x.clone().requires_grad_()
    torch.testing.assert_close(compiled(y), expected, rtol=0, atol=1e-9)
