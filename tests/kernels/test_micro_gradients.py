from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code

from padst_compiler.formulation import Geometry
from padst_compiler.kernel_ops import MAPPED
from padst_compiler.kernels import CANDIDATES, install
from padst_compiler.kernels.micro_gradients import DW_FORMS, DX_FORMS, picks
from padst_compiler.ops import LINEAR_DW, LINEAR_DX
from padst_compiler.structures import NM, Block, Diagonal, FanIn, Shape, Structure

from .stored import weights

KERNELS = ("feature_dx(", "feature_dw(", "picked_gradient<", "diagonal_gradient<")


@pytest.fixture(autouse=True)
def lowered() -> None:
    install()
    torch._dynamo.reset()


def calls(codes: list[str]) -> list[int]:
    """Return how often generated code calls each kernel, and the operator itself."""
    code = "\n".join(codes)
    return [code.count(f"padst::{name}") for name in KERNELS] + [code.count("= torch.ops.padst.")]


def close(y: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    scale = max(1.0, float(expected.abs().max()))
    assert y.shape == expected.shape
    assert float((y.double() - expected).abs().max()) <= tolerance * scale


def gradients(structure: Structure, shape: Shape) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return what computes the two gradients of a layer."""
    unit = (min(shape.out_features, shape.in_features),) * isinstance(structure, Diagonal)

    def run(grad: Tensor, x: Tensor, v: Tensor, i: Tensor) -> tuple[Tensor, Tensor]:
        dx = LINEAR_DX[structure.name](grad, v, i, shape.in_features)
        return dx, LINEAR_DW[structure.name](grad, x, i, unit)

    return run


def picked(structure: NM) -> bool:
    return picks(structure.m, structure.n or 1)


STRUCTURES = [FanIn(), NM(10, 2), NM(40, 3), Diagonal()]


@pytest.mark.parametrize(
    "structure",
    [*STRUCTURES[:1], *(pytest.param(s, marks=pytest.mark.slow) for s in STRUCTURES[1:])],
)
@pytest.mark.parametrize("tokens", [(2, 19), pytest.param((1,), marks=pytest.mark.exhaustive)])
def test_both_gradients_become_kernels(structure: Structure, tokens: tuple[int, ...]) -> None:
    for shape in (Shape(48, 80), Shape(80, 240)):
        values, indices, dense = weights(structure, shape)
        indices, values = unsorted(structure, indices, values)
        x, grad = torch.randn(*tokens, shape.in_features), torch.randn(*tokens, shape.out_features)
        run = torch.compile(gradients(structure, shape), fullgraph=True)
        (dx, dw), codes = run_and_get_code(run, grad, x, values, indices)
        nm, diagonal = isinstance(structure, NM) and picked(structure), structure.name == "diagonal"
        dense_dx = int(diagonal)  # its operator is what a formulation of micro_diagonal replaces
        expected = [not diagonal, not nm and not diagonal, nm, diagonal, dense_dx]
        assert calls(codes) == expected
        close(dx, grad.double() @ dense)
        full = grad.double().flatten(0, -2).t() @ x.double().flatten(0, -2)
        close(dw, structure.pack(full, indices))


def unsorted(structure: Structure, indices: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    if isinstance(structure, Diagonal):
        order = torch.randperm(indices.shape[1])
        return indices[:, order], values[:, order]
    order = torch.randperm(indices.shape[-1])
    return indices[..., order], values[..., order]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["strided", "transposed"])
def test_gradients_may_lie_in_any_way(how: str) -> None:
    structure, shape = FanIn(), Shape(32, 48)
    values, indices, dense = weights(structure, shape)
    grad = torch.randn(32, 9).t() if how == "transposed" else torch.randn(9, 80)[:, 3:67:2]
    x = torch.randn(9, 48)
    run = torch.compile(gradients(structure, shape))
    (dx, dw), codes = run_and_get_code(run, grad, x, values, indices)
    assert calls(codes) == [1, 1, 0, 0, 0]
    close(dx, grad.double() @ dense)
    close(dw, structure.pack(grad.double().t() @ x.double(), indices))


@pytest.mark.slow
def test_one_graph_serves_every_number_of_tokens() -> None:
    structure, shape = FanIn(), Shape(32, 48)
    values, indices, dense = weights(structure, shape)
    counter = CompileCounterWithBackend("inductor")
    run = torch.compile(gradients(structure, shape), dynamic=True, backend=counter)
    for tokens in (2, 3, 31, 33, 300):
        x, grad = torch.randn(tokens, 48), torch.randn(tokens, 32)
        dx, dw = run(grad, x, values, indices)
        close(dx, grad.double() @ dense)
        close(dw, structure.pack(grad.double().t() @ x.double(), indices))
    assert counter.frame_count == 1


def test_the_inputs_gradient_reads_and_writes_through_maps() -> None:
    values, indices, dense = weights(NM(10), Shape(48, 80))
    grad, p, q = torch.randn(2, 19, 60), torch.randperm(60)[:48], torch.randperm(80)
    op = MAPPED[LINEAR_DX["nm"]]
    run = torch.compile(lambda *args: op(*args, 80, p, q))
    y, codes = run_and_get_code(run, grad, values, indices)
    assert calls(codes) == [1, 0, 0, 0, 0]
    close(y, (grad.double()[..., p] @ dense)[..., q])


@pytest.mark.parametrize("why", ["float64", pytest.param("odd", marks=pytest.mark.slow)])
def test_what_the_kernels_do_not_do_calls_the_operator(why: str) -> None:
    for structure in (FanIn(), NM(6), Diagonal()):
        shape = Shape(30, 42) if why == "odd" else Shape(32, 48)
        dtype = torch.float64 if why == "float64" else torch.float32
        values, indices, dense = weights(structure, shape, dtype)
        x, grad = (torch.randn(5, n, dtype=dtype) for n in (shape.in_features, shape.out_features))
        (dx, dw), codes = run_and_get_code(
            torch.compile(gradients(structure, shape)), grad, x, values, indices
        )
        assert calls(codes) == [0, 0, 0, 0, 2]
        close(dx, grad.double() @ dense)
        close(dw, structure.pack(grad.double().t() @ x.double(), indices))
        torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("structure", "dtype"),
    [
        *((name, torch.float32) for name in ("fan_in", "nm:16", "diagonal")),
        ("fan_in", torch.bfloat16),
        pytest.param("nm:16", torch.bfloat16, marks=pytest.mark.exhaustive),
        pytest.param("diagonal", torch.bfloat16, marks=pytest.mark.exhaustive),
    ],
    ids=str,
)
def test_a_model_trains_through_the_kernels(structure: str, dtype: torch.dtype) -> None:
    import padst_compiler as padst

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
    config = padst.SparseConfig(structure, sparsity=0.8, permutation="random")
    padst.harden(padst.sparsify(net, config, filter_fn=lambda site: True))
    net.to(dtype)
    x = torch.randn(3, 7, 32, dtype=dtype, requires_grad=True)
    leaves = [x, *(p for p in net.parameters() if p.requires_grad)]
    expected = torch.autograd.grad(net(x).square().sum(), leaves)
    fast = torch.compile(net, backend="padst", options={"kernels": "sparse", "verify": "strict"})
    found, codes = run_and_get_code(lambda: torch.autograd.grad(fast(x).square().sum(), leaves))
    used = calls(codes)
    assert used[0] == (0 if structure == "diagonal" else 2) and sum(used[1:4]) == 2 and not used[4]
    fine = dtype is torch.float32
    for y, target in zip(found, expected, strict=True):
        close(y, target.double(), 1e-5 if fine else 0.03)


def geometry(structure: Structure, **changed: Any) -> Geometry:
    shape = changed.pop("shape", Shape(768, 768))
    given: dict[str, Any] = {
        "tokens": 197,
        "dtype": torch.float32,
        "device": "cpu",
        "frozen": False,
    }
    given["kept"] = structure.kept(shape, 0.9)
    return Geometry(structure=structure, shape=shape, **(given | changed))


def test_costs_say_where_the_kernels_apply() -> None:
    for structure in (FanIn(), NM(16), NM(48)):
        for ops, forms in ((LINEAR_DX, DX_FORMS), (LINEAR_DW, DW_FORMS)):
            ways = forms[structure.name]
            usual = CANDIDATES[ops[structure.name]][-1].cost(geometry(structure))
            costs = [way.cost(geometry(structure)) for way in ways]
            (cost,) = (c for c in costs if c is not None)
            assert usual is not None and cost < 0.8 * usual
            for other in (
                geometry(structure, dtype=torch.float64),
                geometry(structure, device="cuda"),
                geometry(structure, shape=Shape(760, 760), kept=2),
                geometry(Block(16)),
            ):
                assert [way.cost(other) for way in ways] == [None] * len(ways)
    far = geometry(FanIn(), shape=Shape(768, 3072))
    near = geometry(FanIn(), shape=Shape(3072, 768))
    (dw,) = DW_FORMS["fan_in"]
    costs = [dw.cost(g) for g in (far, near)]
    assert costs[0] is not None and costs[1] is not None and costs[0] > costs[1]
