from typing import Any

import pytest
import torch
from torch import Tensor

from padst_compiler.formulation import Formulation, Geometry
from padst_compiler.kernels import CANDIDATES, PORTABLE, block
from padst_compiler.ops import LINEAR
from padst_compiler.structures import Block, Diagonal, FanIn, Shape, unit_of

SHAPES = [Shape(64, 16), Shape(16, 64), Shape(32, 32), Shape(8, 8)]
TOKENS = [(), (1,), (5,), (40,), (2, 7)]
LIMITS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}
Limits = pytest.mark.parametrize("dtype", LIMITS, ids=lambda d: str(d).removeprefix("torch."))
Shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
Tokens = pytest.mark.parametrize("tokens", TOKENS, ids=str)


def weights(structure: Block, shape: Shape, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return values and indices, and the weight that they stand for in float64."""
    dense = torch.randn(shape.out_features, shape.in_features)
    indices = structure.select(dense, structure.kept(shape, 0.5))
    values = structure.pack(dense, indices).to(dtype)
    return values, indices, structure.unpack(values.double(), indices, shape)


def agree(result: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert result.dtype is dtype
    assert result.shape == expected.shape
    scale = float(expected.abs().max())
    assert float((result.double() - expected).abs().max()) <= LIMITS[dtype] * max(scale, 1.0)


@pytest.mark.parametrize("way", [*block.LINEAR, *block.PORTABLE], ids=lambda w: w.name)
@Shapes
@Tokens
@Limits
def test_linear_equals_the_product_with_the_effective_weight(
    way: Formulation, shape: Shape, tokens: tuple[int, ...], dtype: torch.dtype
) -> None:
    for structure in (Block(4), Block(8)):
        values, indices, weight = weights(structure, shape, dtype)
        x, bias = torch.randn(*tokens, shape.in_features).to(dtype), torch.randn(shape.out_features)
        for b in (None, bias.to(dtype)):
            expected = x.double() @ weight.t() + (0.0 if b is None else b.double())
            agree(way.run(x, values, indices, b, shape.out_features), expected, dtype)


@Shapes
@Tokens
@Limits
def test_dx_equals_the_product_with_the_transposed_weight(
    shape: Shape, tokens: tuple[int, ...], dtype: torch.dtype
) -> None:
    values, indices, weight = weights(Block(8), shape, dtype)
    grad = torch.randn(*tokens, shape.out_features).to(dtype)
    for way in block.DX:
        agree(way.run(grad, values, indices, shape.in_features), grad.double() @ weight, dtype)


@Shapes
@Tokens
@Limits
def test_dw_equals_the_kept_blocks_of_the_dense_gradient(
    shape: Shape, tokens: tuple[int, ...], dtype: torch.dtype
) -> None:
    values, indices, _ = weights(Block(8), shape, dtype)
    grad = torch.randn(*tokens, shape.out_features).to(dtype)
    x = torch.randn(*tokens, shape.in_features).to(dtype)
    full = grad.double().reshape(-1, shape.out_features).t() @ x.double().reshape(
        -1, shape.in_features
    )
    for way in block.DW:
        agree(
            way.run(grad, x, indices, unit_of(values, indices)), Block(8).pack(full, indices), dtype
        )


def test_a_strided_input_is_read_right() -> None:
    shape = Shape(16, 32)
    values, indices, weight = weights(Block(8), shape, torch.float64)
    x = torch.randn(32, 5, 3, dtype=torch.float64).permute(2, 1, 0)
    for way in (*block.LINEAR, *block.PORTABLE):
        agree(way.run(x, values, indices, None, 16), x @ weight.t(), torch.float64)


def test_no_token_gives_no_row() -> None:
    values, indices, _ = weights(Block(8), Shape(16, 32), torch.float32)
    for way in (*block.LINEAR, *block.PORTABLE):
        assert way.run(torch.randn(0, 32), values, indices, None, 16).shape == (0, 16)


# -- costs -----------------------------------------------------------------------------------------


def geometry(**changes: Any) -> Geometry:
    given: dict[str, Any] = {
        "structure": Block(32),
        "shape": Shape(3072, 768),
        "kept": 2,
        "tokens": 197,
        "dtype": torch.float32,
        "device": "cpu",
        "frozen": True,
    }
    return Geometry(**{**given, **changes})


ALL = [*block.LINEAR, *block.DX, *block.DW]


@pytest.mark.parametrize("way", [*ALL, *block.PORTABLE], ids=lambda w: w.name)
@pytest.mark.parametrize("tokens", [1, 8, 197, 8192])
@pytest.mark.parametrize("size", [16, 32, 64, 96])
def test_a_cost_is_positive_and_grows_with_tokens(way: Formulation, tokens: int, size: int) -> None:
    one = way.cost(geometry(structure=Block(size), tokens=tokens))
    two = way.cost(geometry(structure=Block(size), tokens=2 * tokens))
    assert one is not None
    assert two is not None
    assert 0 < one <= two


@pytest.mark.parametrize("way", ALL, ids=lambda w: w.name)
def test_a_cost_grows_with_the_blocks_that_are_kept(way: Formulation) -> None:
    costs = [way.cost(geometry(kept=kept)) for kept in (1, 2, 8, 24)]
    assert costs == sorted(c for c in costs if c is not None)


@pytest.mark.parametrize("way", [*ALL, *block.PORTABLE], ids=lambda w: w.name)
def test_other_structures_have_no_cost_here(way: Formulation) -> None:
    assert way.cost(geometry(structure=FanIn(), kept=77)) is None
    assert way.cost(geometry(structure=Diagonal(), kept=77)) is None


@pytest.mark.parametrize("way", ALL, ids=lambda w: w.name)
def test_nothing_is_promised_where_nothing_was_measured(way: Formulation) -> None:
    assert way.cost(geometry(device="cuda")) is None


@pytest.mark.parametrize("way", [*ALL, *block.PORTABLE], ids=lambda w: w.name)
def test_other_forms_of_blocks_have_no_cost_here(way: Formulation) -> None:
    assert way.cost(geometry(structure=Block(32, 16), kept=4)) is None
    assert way.cost(geometry(structure=Block(32, balanced=False), kept=200)) is None


@pytest.mark.parametrize("structure", [Block(8, 4), Block(4, 8), Block(8, balanced=False)], ids=str)
def test_a_formulation_computes_no_wrong_number_for_another_form(structure: Block) -> None:
    shape = Shape(16, 32)
    values, indices, weight = weights(structure, shape, torch.float64)
    x, grad = torch.randn(5, 32, dtype=torch.float64), torch.randn(5, 16, dtype=torch.float64)
    for way in block.LINEAR if structure.balanced else block.LINEAR[:1]:
        agree(way.run(x, values, indices, None, 16), x @ weight.t(), torch.float64)
    agree(block.scatter_dx(grad, values, indices, 32), grad @ weight, torch.float64)
    dw = block.block_dw(grad, x, indices, unit_of(values, indices))
    agree(dw, structure.pack(grad.t() @ x, indices), torch.float64)


def test_small_blocks_are_not_offered_to_onnxruntime() -> None:
    assert block.PORTABLE[0].cost(geometry(structure=Block(8), kept=10)) is None


def winner(candidates: Any, op: Any, g: Geometry) -> str:
    offers = [(c.cost(g), c.name) for c in candidates[op]]
    best: str = min((cost, name) for cost, name in offers if cost is not None)[1]
    return best


@pytest.mark.parametrize(
    ("shape", "size", "kept"),
    [
        (Shape(3072, 768), 32, 2),
        (Shape(3072, 768), 64, 1),
        (Shape(768, 3072), 32, 10),
        (Shape(768, 3072), 64, 5),
    ],
)
def test_the_anchor_shapes_run_sparse(shape: Shape, size: int, kept: int) -> None:
    g = geometry(structure=Block(size), shape=shape, kept=kept)
    assert winner(CANDIDATES, LINEAR["block"], g) != "dense"
    assert winner(PORTABLE, LINEAR["block"], g) != "dense"


def test_a_dense_block_layer_runs_dense() -> None:
    assert winner(CANDIDATES, LINEAR["block"], geometry(kept=24)) == "dense"
