from typing import Any

import pytest
import torch
from torch import Tensor

from padst_compiler.formulation import Formulation, Geometry
from padst_compiler.kernels import fan_in
from padst_compiler.structures import NM, Diagonal, FanIn, Shape, Structure

SHAPES = [Shape(48, 16), Shape(16, 48), Shape(24, 24)]
CASES: list[tuple[Structure, tuple[Formulation, ...]]] = [
    (FanIn(), fan_in.FAN_IN_LINEAR),
    (NM(m=4), fan_in.NM_LINEAR),
    (NM(m=8, n=3), fan_in.NM_LINEAR),
    (Diagonal(), fan_in.DIAGONAL_LINEAR),
]
Cases = pytest.mark.parametrize(("structure", "ways"), CASES, ids=lambda c: str(c)[:12])


def geometry(structure: Structure, shape: Shape, **changes: Any) -> Geometry:
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


@Cases
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tokens", [(), (1,), (9,), (2, 7)], ids=str)
@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_linear_equals_the_product_with_the_effective_weight(
    structure: Structure,
    ways: tuple[Formulation, ...],
    shape: Shape,
    tokens: tuple[int, ...],
    sparsity: float,
) -> None:
    dense = torch.randn(shape.out_features, shape.in_features)
    indices = structure.select(dense, structure.kept(shape, sparsity))
    values = structure.pack(dense, indices)
    weight = structure.unpack(values.double(), indices, shape)
    x, bias = torch.randn(*tokens, shape.in_features), torch.randn(shape.out_features)
    for way in ways:
        if isinstance(structure, Diagonal) and shape.out_features > shape.in_features:
            assert way.cost(geometry(structure, shape)) is None
            continue
        for b in (None, bias):
            expected = x.double() @ weight.t() + (0.0 if b is None else b.double())
            result = way.run(x, values, indices, b, shape.out_features)
            assert result.dtype is torch.float32
            torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-5)


@Cases
def test_a_strided_input_is_read_right(structure: Structure, ways: tuple[Formulation, ...]) -> None:
    shape = Shape(24, 24)
    dense = torch.randn(24, 24)
    indices = structure.select(dense, structure.kept(shape, 0.5))
    values = structure.pack(dense, indices)
    x = torch.randn(24, 5, 3).permute(2, 1, 0)
    for way in ways:
        result = way.run(x, values, indices, None, 24)
        torch.testing.assert_close(result, x @ structure.unpack(values, indices, shape).t())


def test_a_row_that_reads_an_input_twice_counts_it_twice() -> None:
    x, inputs = torch.randn(3, 4), torch.tensor([[1, 1], [0, 3]])
    y = fan_in.bag(x, torch.tensor([[2.0, 3.0], [1.0, 1.0]]), inputs, None)
    expected: Tensor = torch.stack([5.0 * x[:, 1], x[:, 0] + x[:, 3]], dim=1)
    torch.testing.assert_close(y, expected)


@Cases
@pytest.mark.parametrize("tokens", [32, 197, 8192])
def test_a_cost_is_positive_and_grows_with_tokens(
    structure: Structure, ways: tuple[Formulation, ...], tokens: int
) -> None:
    for way in ways:
        costs = [
            way.cost(geometry(structure, Shape(768, 768), tokens=t)) for t in (tokens, 2 * tokens)
        ]
        assert costs[0] is not None
        assert costs[1] is not None
        assert 0 < costs[0] < costs[1]


@Cases
@pytest.mark.parametrize(
    "change",
    [
        {"dtype": torch.bfloat16},
        {"dtype": torch.float64},
        {"device": "cuda"},
        {"tokens": 31},
        {"frozen": False},
    ],
    ids=str,
)
def test_there_is_no_cost_where_the_bag_does_not_apply(
    structure: Structure, ways: tuple[Formulation, ...], change: dict[str, Any]
) -> None:
    for way in ways:
        assert way.cost(geometry(structure, Shape(768, 768), **change)) is None
