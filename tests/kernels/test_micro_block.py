from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code
from torch.nn import functional as F

from padst_compiler.formulation import Geometry
from padst_compiler.kernel_ops import MAPPED
from padst_compiler.kernels import CANDIDATES, install
from padst_compiler.kernels.micro_block import chunk
from padst_compiler.ops import LINEAR, LINEAR_DW, LINEAR_DX
from padst_compiler.structures import Block, Shape, Structure, unit_of

from .stored import weights

KERNELS = ("block_sums<", "block_gradient<")
linear, dx, dw = (ops["block"] for ops in (LINEAR, LINEAR_DX, LINEAR_DW))


@pytest.fixture(autouse=True)
def lowered() -> None:
    install()
    torch._dynamo.reset()


def calls(codes: list[str]) -> list[int]:
    """Return how often generated code calls each kernel, and the operator itself."""
    code = "\n".join(codes)
    return [code.count(f"padst::{name}") for name in KERNELS] + [code.count("= torch.ops.padst.")]


def compiled(function: Callable[..., Any], *args: Any, **how: Any) -> tuple[Any, list[int]]:
    result, codes = run_and_get_code(torch.compile(function, fullgraph=True, **how), *args)
    return result, calls(codes)


def close(y: Tensor, expected: Tensor) -> None:
    scale = max(1.0, float(expected.abs().max()))
    assert y.shape == expected.shape and y.is_contiguous()
    assert float((y.double() - expected).abs().max()) <= 1e-5 * scale


SIDES: list[Any] = [Block(4), Block(8), Block(16), Block(8, 24)]
MORE: list[Any] = [Block(32), Block(16, 8)]


@pytest.mark.parametrize(
    "structure",
    [
        *SIDES[:1],
        *(pytest.param(s, marks=pytest.mark.slow) for s in SIDES[1:]),
        *(pytest.param(s, marks=pytest.mark.exhaustive) for s in MORE),
    ],
    ids=str,
)
def test_all_three_operators_become_kernels(structure: Block) -> None:
    r, c = structure.sides
    shape = Shape(6 * r, 4 * c)
    values, indices, dense = weights(structure, shape)
    unit = unit_of(values, indices)
    x, grad = torch.randn(2, 19, shape.in_features), torch.randn(2, 19, shape.out_features)

    def run(x: Tensor, grad: Tensor, v: Tensor, i: Tensor) -> tuple[Tensor, ...]:
        return (
            linear(x, v, i, None, shape.out_features),
            dx(grad, v, i, shape.in_features),
            dw(grad, x, i, unit),
        )

    (y, gx, gw), used = compiled(run, x, grad, values, indices)
    assert used == [2, 1, 0]
    close(y, x.double() @ dense.t())
    close(gx, grad.double() @ dense)
    full = grad.double().flatten(0, 1).t() @ x.double().flatten(0, 1)
    close(gw, structure.pack(full, indices))


@pytest.mark.slow
def test_what_follows_is_computed_on_the_tiles() -> None:
    structure, shape = Block(16), Shape(48, 64)
    values, indices, dense = weights(structure, shape)
    x, bias, residual = torch.randn(13, 64), torch.randn(48), torch.randn(13, 48)

    def run(x: Tensor, v: Tensor, i: Tensor) -> Tensor:
        return F.gelu(linear(x, v, i, None, 48) + bias) + residual

    _, codes = run_and_get_code(torch.compile(run), x, values, indices)
    assert sum(code.count("async_compile.cpp_pybinding(") for code in codes) == 1
    expected = F.gelu(x.double() @ dense.t() + bias) + residual
    close(torch.compile(run)(x, values, indices), expected)


def test_a_result_with_another_reader_is_stored_as_well() -> None:
    values, indices, dense = weights(Block(8), Shape(24, 16))
    x = torch.randn(9, 16)

    def run(x: Tensor, v: Tensor, i: Tensor) -> tuple[Tensor, Tensor]:
        y = linear(x, v, i, None, 24)
        return F.relu(y), y.sum(-1)

    (y, total), used = compiled(run, x, values, indices)
    assert used == [1, 0, 0]
    close(y, F.relu(x.double() @ dense.t()))
    close(total, (x.double() @ dense.t()).sum(-1))


def test_one_graph_serves_every_number_of_tokens() -> None:
    values, indices, dense = weights(Block(8), Shape(24, 16))
    counter = CompileCounterWithBackend("inductor")
    run = torch.compile(
        lambda x: linear(x, values, indices, None, 24) * 2.0, dynamic=True, backend=counter
    )
    for tokens in (2, 3, 31, 32, 33, 97):
        x = torch.randn(tokens, 16)
        close(run(x), 2.0 * (x.double() @ dense.t()))
    assert counter.frame_count == 1


def test_inputs_and_maps_may_be_parts_of_one_tensor() -> None:
    values, indices, dense = weights(Block(8), Shape(16, 16))
    x, p = torch.randn(9, 40), torch.randperm(16)

    def run(x: Tensor, v: Tensor, i: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        y = MAPPED[linear](x[:, 20:36], v, i, 16, p, p)
        return y, dw(x[:, 3:19], x[:, 20:36], i, [8, 8])

    (y, gw), used = compiled(run, x, values, indices, p)
    assert used == [1, 1, 0]
    part = x[:, 20:36].double()
    close(y, (part[:, p] @ dense.t())[:, p])
    close(gw, Block(8).pack(x[:, 3:19].double().t() @ part, indices))


def some(*names: str, ordinary: int) -> list[Any]:
    """Return parameters of which the first ones are in the ordinary suite: each is a compile."""
    slow = [pytest.param(name, marks=pytest.mark.slow) for name in names[ordinary:]]
    return [*names[:ordinary], *slow]


@pytest.mark.parametrize("how", some("transposed", "page", "strided", "one", "vector", ordinary=2))
def test_inputs_may_lie_in_any_way(how: str) -> None:
    wide = 1024 if how == "page" else 16  # rows a page apart are copied
    values, indices, dense = weights(Block(8), Shape(24, wide))
    x = {
        "transposed": torch.randn(16, 9).t(),
        "strided": torch.randn(9, 40)[:, 3:35:2],
        "page": torch.randn(40, 1024),
        "one": torch.randn(1, 16),
        "vector": torch.randn(16),
    }[how]
    y, used = compiled(lambda x, v, i: linear(x, v, i, None, 24), x, values, indices)
    assert used == [1, 0, 0]
    close(y, x.double() @ dense.t())


@pytest.mark.parametrize("where", some("both", "in", "out", "backward", ordinary=1))
def test_maps_are_read_and_written_through(where: str) -> None:
    values, indices, dense = weights(Block(8), Shape(24, 16))
    back = where == "backward"
    if back:
        dense = dense.t()
    x = torch.randn(2, 37, 16 if where == "out" else 48)
    p = None if where == "out" else torch.randperm(48)[: dense.shape[1]]
    q = None if where == "in" else torch.randperm(dense.shape[0])
    op = MAPPED[dx if back else linear]
    residual = torch.randn(2, 37, dense.shape[0])

    def run(x: Tensor, v: Tensor, i: Tensor, p: Tensor | None, q: Tensor | None) -> Tensor:
        return F.gelu(op(x, v, i, dense.shape[0], p, q)) + residual

    y, codes = run_and_get_code(torch.compile(run), x, values, indices, p, q)
    expected = (x.double() if p is None else x.double()[..., p]) @ dense.t()
    close(y, F.gelu(expected if q is None else expected[..., q]) + residual)
    code = "\n".join(codes)
    assert code.count("async_compile.cpp_pybinding(") == 1  # it turns the weights itself
    assert "index out of bounds" not in code
    for table, limit in ((p, 48), (q, dense.shape[0])):
        for wrong in (-1, limit):
            if table is not None:
                kept = int(table[3])
                table[3] = wrong
                with pytest.raises(RuntimeError, match=f"features below {limit}. Got {wrong}"):
                    torch.compile(run)(x, values, indices, p, q)
                table[3] = kept


@pytest.mark.parametrize("why", some("int32", "subset", "bfloat16", ordinary=1))
def test_maps_that_the_kernels_do_not_take_call_the_operator(why: str) -> None:
    dtype = torch.bfloat16 if why == "bfloat16" else torch.float32
    values, indices, dense = weights(Block(8), Shape(24, 16), dtype)
    x, p, q = torch.randn(9, 16).to(dtype), torch.randperm(16), torch.randperm(24)
    p, q = (p.int() if why == "int32" else p), (q[:10] if why == "subset" else q)
    y, used = compiled(lambda *args: MAPPED[linear](*args, 24, p, q), x, values, indices)
    assert used == [0, 0, 1]
    expected = x.double()[:, p] @ dense.t()[:, q]
    torch.testing.assert_close(y.double(), expected, rtol=0.02, atol=0.1)


@pytest.mark.parametrize("why", some("free", "bias", "float64", "odd", ordinary=1))
def test_what_the_kernels_do_not_do_calls_the_operator(why: str) -> None:
    structure = {"free": Block(8, balanced=False), "odd": Block(6, 8)}.get(why, Block(8))
    dtype = torch.float64 if why == "float64" else torch.float32
    values, indices, dense = weights(structure, Shape(24, 16), dtype)
    bias = torch.randn(24) if why == "bias" else None
    x = torch.randn(9, 16, dtype=dtype)
    y, used = compiled(lambda x, v, i: linear(x, v, i, bias, 24), x, values, indices)
    assert used == [0, 0, 1]
    close(y, x.double() @ dense.t() + (0.0 if bias is None else bias))


def geometry(structure: Structure, **changed: Any) -> Geometry:
    shape = Shape(768, 768)
    kept = structure.kept(shape, 0.9)
    given: dict[str, Any] = {"tokens": 197, "dtype": torch.float32, "device": "cpu", "frozen": True}
    return Geometry(structure=structure, shape=shape, kept=kept, **(given | changed))


def test_costs_say_where_the_kernels_apply() -> None:
    for op in (linear, dx, dw):
        way = next(w for w in CANDIDATES[op] if w.name == "micro_kernel")
        dense = CANDIDATES[op][-1]
        here = geometry(Block(32))
        cost, usual = way.cost(here), dense.cost(here)
        assert cost is not None and usual is not None and cost < 0.5 * usual
        for other in (
            geometry(Block(32), dtype=torch.float64),
            geometry(Block(32), device="cuda"),
            geometry(Block(32, balanced=False)),
            geometry(Block(6)),
        ):
            assert way.cost(other) is None


@pytest.mark.slow
def test_a_model_trains_and_infers_through_the_kernels() -> None:
    import padst_compiler as padst

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
    config = padst.SparseConfig("block:16", sparsity=0.5, permutation="random")
    padst.harden(padst.sparsify(net, config, filter_fn=lambda site: True))
    x = torch.randn(3, 7, 32, requires_grad=True)
    leaves = [x, *(p for p in net.parameters() if p.requires_grad)]
    expected = torch.autograd.grad(net(x).square().sum(), leaves)
    fast = torch.compile(net, backend="padst", options={"kernels": "sparse", "verify": "strict"})
    found, codes = run_and_get_code(lambda: torch.autograd.grad(fast(x).square().sum(), leaves))
    assert calls(codes) == [4, 2, 0]
    for y, target in zip(found, expected, strict=True):
        torch.testing.assert_close(y, target, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        y, codes = run_and_get_code(fast, x)
        torch.testing.assert_close(y, net(x), rtol=1e-4, atol=1e-5)
    assert "\n".join(codes).count("padst::block_mlp<") == 1


def test_the_weights_of_many_inputs_meet_more_tokens_where_those_fit_the_cache() -> None:
    assert [chunk(64, 4096), chunk(768, 768), chunk(1024, 1024)] == [32, 128, 128]
    assert [chunk(1536, 1536), chunk(1536, 3072), chunk(4096, 4096)] == [80, 32, 32]
