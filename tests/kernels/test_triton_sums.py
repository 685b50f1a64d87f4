import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from padst_compiler.kernels import triton_sums
from padst_compiler.kernels.triton_block import by_column
from padst_compiler.kernels.triton_sums import (
    DW,
    DX,
    LINEAR,
    columns,
    diagonal_gradient,
    diagonal_sums,
    gathered_gradient,
    gathered_sums,
)
from padst_compiler.ops import LINEAR as OPERATORS
from padst_compiler.structures import NM, Diagonal, FanIn, Shape, Structure, unit_of

from .stored import weights

pytest.importorskip("triton")

NEAR = {torch.float32: 2e-6, torch.float16: 2**-9, torch.bfloat16: 2**-7}
DTYPES = pytest.mark.parametrize("dtype", list(NEAR), ids=lambda dtype: str(dtype)[6:])
LAYERS: list[tuple[Structure, Shape]] = [
    (FanIn(), Shape(13, 21)),
    (NM(7), Shape(11, 21)),
    (NM(8, 3), Shape(5, 24)),
    (Diagonal(), Shape(21, 37)),
    (Diagonal(), Shape(37, 21)),
    (Diagonal(), Shape(19, 19)),
    (Diagonal(band=5), Shape(23, 35)),
]
EVERY = pytest.mark.parametrize(("structure", "shape"), LAYERS, ids=str)


class Layer:
    """A layer as it is stored, and its weight in float64."""

    def __init__(
        self,
        structure: Structure,
        shape: Shape,
        dtype: torch.dtype,
        device: torch.device,
        sparsity: float = 0.8,
    ) -> None:
        values, indices, dense = weights(structure, shape, dtype, sparsity)
        self.structure, self.shape, self.dtype, self.device = structure, shape, dtype, device
        self.values, self.indices, self.dense = (t.to(device) for t in (values, indices, dense))
        self.bias = self.random(shape.out_features)

    def random(self, *sizes: int) -> Tensor:
        return torch.randn(*sizes).to(self.device, self.dtype)

    def near(self, got: Tensor, expected: Tensor) -> None:
        assert got.dtype == self.dtype and got.shape == expected.shape and got.is_contiguous()
        far = (got.double() - expected).abs().max()
        assert far <= NEAR[self.dtype] * expected.abs().max(), float(far)

    def check(self, x: Tensor, grad: Tensor) -> None:
        """Compare the three products of a layer with their references."""
        name, (out_features, in_features) = self.structure.name, self.dense.shape
        y = LINEAR[name](x, self.values, self.indices, self.bias, out_features)
        self.near(y, x.double() @ self.dense.t() + self.bias.double())
        dx = DX[name](grad, self.values, self.indices, in_features)
        self.near(dx, grad.double() @ self.dense)
        dw = DW[name](grad, x, self.indices, unit_of(self.values, self.indices))
        full = grad.double().flatten(0, -2).t() @ x.double().flatten(0, -2)
        self.near(dw, self.structure.pack(full, self.indices))


@EVERY
@DTYPES
@pytest.mark.parametrize("tokens", [1, 5])
def test_products_are_those_of_the_dense_weight(
    structure: Structure, shape: Shape, dtype: torch.dtype, tokens: int, device: torch.device
) -> None:
    layer = Layer(structure, shape, dtype, device)
    layer.check(layer.random(tokens, shape.in_features), layer.random(tokens, shape.out_features))


@EVERY
def test_tokens_may_fill_many_tiles_and_lie_anywhere(
    structure: Structure, shape: Shape, device: torch.device
) -> None:
    layer = Layer(structure, shape, torch.float32, device)
    x = layer.random(shape.in_features, 2, 13).permute(1, 2, 0)
    layer.check(x, layer.random(2, 13, 2 * shape.out_features)[..., ::2])


@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize(
    ("structure", "shape"),
    [
        (FanIn(), Shape(70, 290)),
        (NM(29), Shape(70, 290)),
        (Diagonal(), Shape(150, 139)),
        (Diagonal(), Shape(139, 150)),
        (Diagonal(), Shape(139, 139)),
    ],
    ids=str,
)
def test_weights_may_fill_many_tiles(
    structure: Structure,
    shape: Shape,
    tokens: int,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(triton_sums, "PROGRAMS", 4)
    layer = Layer(structure, shape, torch.float32, device, sparsity=0.5)
    how = (
        diagonal_sums(layer.values.shape, shape.in_features, shape.out_features, tokens)
        if isinstance(structure, Diagonal)
        else gathered_sums(layer.values.shape, shape.in_features, tokens)
    ).values
    assert how["KEPT"] > how["BLOCK_J"] and 1 < how["BLOCK_N"] < shape.out_features
    layer.check(layer.random(tokens, shape.in_features), layer.random(tokens, shape.out_features))


@EVERY
@pytest.mark.parametrize("side", ["in", "into", "both"])
def test_inputs_are_read_and_results_stored_through_maps(
    structure: Structure, shape: Shape, side: str, device: torch.device
) -> None:
    layer = Layer(structure, shape, torch.float32, device)
    ins, outs = (torch.randperm(n).to(device) for n in (shape.in_features, shape.out_features))

    def through(at: Tensor, to: Tensor) -> tuple[Tensor | None, Tensor | None]:
        return at if side != "into" else None, to.int() if side != "in" else None

    def expected(x: Tensor, dense: Tensor, at: Tensor | None, to: Tensor | None) -> Tensor:
        y = (x if at is None else x[..., at]).double() @ dense.t()
        return y if to is None else torch.empty_like(y).index_copy_(-1, to.long(), y)

    name, x, grad = structure.name, layer.random(3, len(ins)), layer.random(3, len(outs))
    maps = through(ins, outs)
    y = LINEAR[name](x, layer.values, layer.indices, layer.bias, len(outs), *maps)
    layer.near(y, expected(x, layer.dense, *maps) + layer.bias.double())
    maps = through(outs, ins)
    dx = DX[name](grad, layer.values, layer.indices, len(ins), *maps)
    layer.near(dx, expected(grad, layer.dense.t(), *maps))


@pytest.mark.parametrize("structure", [FanIn(), NM(5), Diagonal()], ids=str)
def test_a_map_may_read_part_of_a_wider_input(structure: Structure, device: torch.device) -> None:
    layer = Layer(structure, Shape(14, 20), torch.float32, device)
    x, at = layer.random(2, 33), torch.randperm(33)[:20].to(device)
    y = LINEAR[structure.name](x, layer.values, layer.indices, None, 14, at)
    layer.near(y, x[:, at].double() @ layer.dense.t())


@DTYPES
@pytest.mark.parametrize("structure", [FanIn(), NM(5), Diagonal()], ids=str)
def test_tokens_are_split_and_results_repeat(
    structure: Structure, dtype: torch.dtype, device: torch.device
) -> None:
    layer, tokens = Layer(structure, Shape(6, 10), dtype, device), 83
    sizes, name = tuple(layer.values.shape), structure.name
    how = (
        diagonal_gradient(sizes, 10, 6, tokens)
        if isinstance(structure, Diagonal)
        else gathered_gradient(sizes, 10, tokens)
    )
    assert how.values["SPLIT"] > 1
    x, grad = layer.random(tokens, 10), layer.random(tokens, 6)
    unit = unit_of(layer.values, layer.indices)
    first, again = (DW[name](grad, x, layer.indices, unit) for _ in range(2))
    layer.near(first, structure.pack(grad.double().t() @ x.double(), layer.indices))
    assert torch.equal(first, again)


def test_columns_without_a_weight_have_no_gradient(device: torch.device) -> None:
    indices = torch.tensor([[2, 5], [5, 2], [0, 5]], dtype=torch.int32, device=device)
    values = torch.randn(3, 2, device=device)
    order, starts = by_column(indices, 7)
    assert order.tolist() == [4, 0, 3, 1, 2, 5]
    assert starts.tolist() == [0, 1, 1, 3, 3, 3, 6, 6]
    grad = torch.randn(4, 3, device=device)
    dx = DX["fan_in"](grad, values, indices, 7)
    expected = grad.double() @ FanIn().unpack(values, indices, Shape(3, 7)).double()
    torch.testing.assert_close(dx.double(), expected, rtol=2e-6, atol=2e-6)
    assert not dx[:, [1, 3, 4, 6]].any()


def test_columns_of_groups_are_those_of_the_structure() -> None:
    _, indices, _ = weights(NM(6, 2), Shape(5, 18))
    _, expected = NM(6, 2).coordinates(indices, Shape(5, 18))
    assert torch.equal(columns(indices, 18).long(), expected)


@EVERY
def test_no_tokens_are_no_work(structure: Structure, shape: Shape, device: torch.device) -> None:
    layer, name = Layer(structure, shape, torch.float32, device), structure.name
    x, grad = layer.random(0, shape.in_features), layer.random(0, shape.out_features)
    y = LINEAR[name](x, layer.values, layer.indices, layer.bias, shape.out_features)
    dx = DX[name](grad, layer.values, layer.indices, shape.in_features)
    dw = DW[name](grad, x, layer.indices, unit_of(layer.values, layer.indices))
    assert y.shape == grad.shape and dx.shape == x.shape
    assert dw.shape == layer.values.shape and not dw.any()


def test_not_a_number_stays_with_its_token_and_its_readers(device: torch.device) -> None:
    for structure in (FanIn(), Diagonal()):
        layer = Layer(structure, Shape(9, 13), torch.float32, device)
        x = layer.random(5, 13)
        x[2, 4] = math.nan
        y = LINEAR[structure.name](x, layer.values, layer.indices, None, 9)
        expected = torch.zeros(5, 9, dtype=torch.bool)
        expected[2] = structure.mask(layer.indices, layer.shape)[:, 4].cpu()
        assert torch.equal(y.isnan().cpu(), expected)


@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    structure=st.sampled_from([FanIn(), NM(3), Diagonal()]),
    sizes=st.tuples(st.integers(1, 12), st.integers(1, 5), st.integers(1, 20)),
    dtype=st.sampled_from(list(NEAR)),
)
def test_any_shape(
    structure: Structure, sizes: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> None:
    out_features, thirds, tokens = sizes
    layer = Layer(structure, Shape(out_features, 3 * thirds), dtype, device)
    layer.check(layer.random(tokens, 3 * thirds), layer.random(tokens, out_features))


def test_programs_follow_from_sizes() -> None:
    one, many = (diagonal_sums((1, 77, 768), 768, 768, tokens) for tokens in (1, 100))
    assert one.values["BLOCK_M"] == 1 and one.grid(1) == one.tiles
    assert many.values["BLOCK_M"] == 16 and many.grid(100) == 7 * (many.tiles or 0)
    square = diagonal_sums((1, 77, 768), 768, 768, 1, dx=True)
    assert square.values["WRAPS"] and not one.values["WRAPS"]
    assert set(LINEAR) == set(DX) == set(DW) < set(OPERATORS)
