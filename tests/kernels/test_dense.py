from typing import Any

import pytest
import torch
from torch import Tensor

from padst_compiler.formulation import Geometry
from padst_compiler.kernels import CANDIDATES, PORTABLE
from padst_compiler.kernels.dense import dense
from padst_compiler.ops import LINEAR, LINEAR_DW, LINEAR_DX
from padst_compiler.structures import (
    NM,
    STRUCTURES,
    Block,
    Diagonal,
    FanIn,
    Shape,
    Structure,
    Unstructured,
    unit_of,
)

ALL = (Block(8), NM(8), Diagonal(), FanIn(), Unstructured())
FORMS = (*ALL, Block(8, 4), Block(4, 8, False), Diagonal(band=2), Diagonal(modulus=8))
SHAPES = [Shape(48, 16), Shape(16, 48), Shape(24, 24)]
TOKENS = [(), (1,), (9,), (2, 7)]
LIMITS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}
Structures = pytest.mark.parametrize("structure", ALL, ids=lambda s: s.name)
Shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
Tokens = pytest.mark.parametrize("tokens", TOKENS, ids=str)


Forms = pytest.mark.parametrize("structure", FORMS, ids=str)


def storage(structure: Structure, shape: Shape) -> tuple[Tensor, Tensor]:
    full = torch.randn(shape.out_features, shape.in_features)
    indices = structure.select(full, structure.kept(shape, 0.5))
    return structure.pack(full, indices), indices


def agree(result: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert result.dtype is dtype
    assert result.shape == expected.shape
    scale = float(expected.abs().max())
    assert float((result.double() - expected).abs().max()) <= LIMITS[dtype] * max(scale, 1.0)


@Forms
@Shapes
@Tokens
def test_linear_equals_the_product_with_the_effective_weight(
    structure: Structure, shape: Shape, tokens: tuple[int, ...]
) -> None:
    linear, _, _ = dense(type(structure))
    for dtype in LIMITS:
        values, indices = storage(structure, shape)
        values = values.to(dtype)
        weight = structure.unpack(values.double(), indices, shape)
        x = torch.randn(*tokens, shape.in_features).to(dtype)
        for b in (None, torch.randn(shape.out_features).to(dtype)):
            expected = x.double() @ weight.t() + (0.0 if b is None else b.double())
            agree(linear.run(x, values, indices, b, shape.out_features), expected, dtype)


@Forms
@Shapes
@Tokens
def test_dx_equals_the_product_with_the_transposed_weight(
    structure: Structure, shape: Shape, tokens: tuple[int, ...]
) -> None:
    _, dx, _ = dense(type(structure))
    for dtype in LIMITS:
        values, indices = storage(structure, shape)
        values = values.to(dtype)
        grad = torch.randn(*tokens, shape.out_features).to(dtype)
        expected = grad.double() @ structure.unpack(values.double(), indices, shape)
        agree(dx.run(grad, values, indices, shape.in_features), expected, dtype)


@Forms
@Shapes
@Tokens
def test_dw_equals_the_kept_part_of_the_dense_gradient(
    structure: Structure, shape: Shape, tokens: tuple[int, ...]
) -> None:
    _, _, dw = dense(type(structure))
    for dtype in LIMITS:
        values, indices = storage(structure, shape)
        grad = torch.randn(*tokens, shape.out_features).to(dtype)
        x = torch.randn(*tokens, shape.in_features).to(dtype)
        rows, columns = grad.reshape(-1, shape.out_features), x.reshape(-1, shape.in_features)
        expected = structure.pack(rows.double().t() @ columns.double(), indices)
        agree(dw.run(grad, x, indices, unit_of(values, indices)), expected, dtype)


# -- costs -----------------------------------------------------------------------------------------


def geometry(structure: Structure, **changes: Any) -> Geometry:
    shape = changes.get("shape", Shape(3072, 768))
    given: dict[str, Any] = {
        "structure": structure,
        "shape": shape,
        "kept": structure.kept(shape, 0.9),
        "tokens": 197,
        "dtype": torch.float32,
        "device": "cpu",
        "frozen": True,
    }
    return Geometry(**{**given, **changes})


def operators() -> list[Any]:
    return [ops[kind.name] for kind in STRUCTURES for ops in (LINEAR, LINEAR_DX, LINEAR_DW)]


@pytest.mark.parametrize("candidates", [CANDIDATES, PORTABLE], ids=["own", "portable"])
def test_dense_comes_last_for_every_operator(candidates: Any) -> None:
    assert set(candidates) == set(operators())
    for ways in candidates.values():
        names = [way.name for way in ways]
        assert names.count("dense") == 1
        assert names[-1] == "dense"
        assert len(set(names)) == len(names)


@Structures
@pytest.mark.parametrize(
    "change",
    [
        {"dtype": torch.bfloat16},
        {"device": "cuda"},
        {"tokens": 1},
        {"tokens": 8192},
        {"frozen": False},
        {"shape": Shape(64, 64)},
    ],
    ids=str,
)
def test_dense_always_applies(structure: Structure, change: dict[str, Any]) -> None:
    for ops in (LINEAR, LINEAR_DX, LINEAR_DW):
        cost = CANDIDATES[ops[structure.name]][-1].cost(geometry(structure, **change))
        assert cost is not None
        assert cost > 0


@Structures
def test_a_weight_that_is_made_anew_on_each_call_costs_more(structure: Structure) -> None:
    linear, dx, _ = dense(type(structure))
    for way in (linear, dx):
        frozen, loose = (way.cost(geometry(structure, frozen=f)) for f in (True, False))
        assert frozen is not None
        assert loose is not None
        assert frozen < loose


@pytest.mark.parametrize(
    ("structure", "sparse"),
    [(Block(32), True), (Block(64), True), (Unstructured(), False)],
    ids=lambda v: str(v),
)
@pytest.mark.parametrize("shape", [Shape(3072, 768), Shape(768, 3072)], ids=str)
def test_the_anchor_shape_at_90_percent(structure: Structure, sparse: bool, shape: Shape) -> None:
    g = geometry(structure, shape=shape)
    costs = {way.name: way.cost(g) for way in CANDIDATES[LINEAR[structure.name]]}
    best = min((cost, name) for name, cost in costs.items() if cost is not None)[1]
    assert (best != "dense") is sparse


def test_a_large_weight_that_is_laid_out_in_each_call_costs_more_than_its_products() -> None:
    """768-3072, 1 thread: 0.2 to 0.5 ms with 1 token, 0.7 to 1.6 with 8; then only the rate."""

    def cost(tokens: int, **changes: Any) -> float:
        found = CANDIDATES[LINEAR["unstructured"]][-1].cost(
            geometry(Unstructured(), tokens=tokens, **changes)
        )
        assert found is not None
        return found

    one, eight = (cost(tokens, dtype=torch.float64) for tokens in (1, 8))
    assert 1.5 < eight / one < 6.0
    laid_out = [cost(tokens) for tokens in (1, 2, 8)]  # for our kernel: the weight is read once
    assert laid_out[0] == laid_out[1] < laid_out[2] < 1.5 * laid_out[0] and 2 * laid_out[2] < eight
    assert cost(1576) == pytest.approx(2 * cost(788), rel=0.01)
    assert cost(8, shape=Shape(64, 64)) == pytest.approx(cost(1, shape=Shape(64, 64)), rel=0.2)
