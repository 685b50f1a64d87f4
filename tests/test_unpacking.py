from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from padst_compiler.index_map import IndexMap
from padst_compiler.layers import SparseLayer, SparseLinear
from padst_compiler.permutation import FixedPermutation, Permutation
from padst_compiler.recorder import Recorder
from padst_compiler.relaxations.sinkhorn import SinkhornPermutation
from padst_compiler.structures import NM, Block, Diagonal, FanIn, Shape, Structure, Unstructured
from padst_compiler.unpacking import PACK, UNPACK, dense_matrix, permuted, unpack, unpermuted

STRUCTURES = [Block(4), Block(2, 4), NM(4), Diagonal(), Diagonal(band=2), FanIn(), Unstructured()]
WIDE, TALL = Shape(8, 16), Shape(16, 8)
each = pytest.mark.parametrize("structure", STRUCTURES, ids=str)
both = pytest.mark.parametrize("shape", [WIDE, TALL], ids=str)


def stored(structure: Structure, shape: Shape) -> tuple[Tensor, Tensor]:
    scores = torch.rand(shape.out_features, shape.in_features)
    indices = structure.select(scores, structure.kept(shape, 0.5))
    values = structure.pack(torch.randn(*scores.shape, dtype=torch.float64), indices)
    return values.contiguous(), indices


def by_product(structure: Structure, values: Tensor, indices: Tensor, shape: Shape) -> Tensor:
    """Return the dense weight, column by column, from the structure's own product."""
    eye = torch.eye(shape.in_features, dtype=torch.float64)
    return structure.linear(eye, values, indices, shape.out_features).t()


def adopted(side: str, permutation: Callable[[int], Permutation | None]) -> SparseLayer:
    linear = nn.Linear(8, 16).double()
    indices = FanIn().select(linear.weight.detach(), 3)
    permutation_ = permutation(8 if side == "input" else 16)
    return SparseLinear.adopt(linear, FanIn(), indices, permutation_, side)


def fixed(size: int) -> FixedPermutation:
    return FixedPermutation(IndexMap.of(torch.randperm(size)))


def soft(size: int) -> Permutation:
    return SinkhornPermutation(size, generator=torch.Generator().manual_seed(0)).double()


@each
@both
def test_a_weight_is_unpacked_as_its_product_says(structure: Structure, shape: Shape) -> None:
    values, indices = stored(structure, shape)
    dense = unpack(structure, values, indices, shape)
    assert torch.equal(dense, by_product(structure, values, indices, shape))
    unit = values.shape[indices.dim() :]
    assert torch.equal(torch.ops.padst.pack(dense, indices, structure.name, unit), values)


@each
@both
def test_each_is_the_gradient_of_the_other(structure: Structure, shape: Shape) -> None:
    values, indices = stored(structure, shape)
    unit = list(values.shape[indices.dim() :])
    name, sizes = structure.name, (shape.out_features, shape.in_features)
    stored_ = values.requires_grad_()
    assert torch.autograd.gradcheck(lambda v: UNPACK(v, indices, name, *sizes), stored_)
    dense = torch.randn(*sizes, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda d: PACK(d, indices, name, unit), dense)


@each
def test_the_operators_keep_torchs_promises(structure: Structure) -> None:
    values, indices = stored(structure, WIDE)
    unit = list(values.shape[indices.dim() :])
    weight: tuple[Any, ...] = (values.requires_grad_(), indices, structure.name, 8, 16)
    torch.library.opcheck(UNPACK, weight)
    dense = torch.randn(8, 16, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(PACK, (dense, indices, structure.name, unit))


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("make", [lambda _: None, fixed, soft], ids=["none", "fixed", "soft"])
def test_a_layers_matrix_is_its_product(
    side: str, make: Callable[[int], Permutation | None]
) -> None:
    layer = adopted(side, make)
    assert isinstance(layer, SparseLinear)
    x = torch.randn(5, 8, dtype=torch.float64)
    expected = layer(x)
    values: Any = torch.autograd.grad(expected.square().sum(), list(layer.parameters()))
    result = nn.functional.linear(x, dense_matrix(layer), layer.bias)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)
    grads: Any = torch.autograd.grad(result.square().sum(), list(layer.parameters()))
    for ours, theirs in zip(grads, values, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("side", ["input", "output"])
def test_a_permutation_is_undone(side: str) -> None:
    layer, matrix = adopted(side, fixed), torch.randn(16, 8)
    assert not torch.equal(permuted(layer, matrix), matrix)
    assert torch.equal(unpermuted(layer, permuted(layer, matrix)), matrix)


def test_a_soft_permutation_cannot_be_undone() -> None:
    matrix = torch.randn(16, 8)
    assert unpermuted(adopted("input", soft), matrix) is matrix


@pytest.mark.parametrize("side", ["input", "output"])
def test_an_armed_recorder_sees_the_gradient_that_a_product_would_show(side: str) -> None:
    layer, x = adopted(side, fixed), torch.randn(5, 8, dtype=torch.float64)
    seen = []

    def product(unpacks: bool) -> Tensor:
        if unpacks:
            return nn.functional.linear(x, dense_matrix(layer), layer.bias)
        return layer.product(x)

    for unpacks in (False, True):
        layer.recorder = Recorder(layer)
        layer.recorder.arm()
        loss: Any = product(unpacks).square().sum()
        loss.backward()
        assert layer.recorder.has_seen
        seen.append((layer.recorder.candidates, layer.recorder.gains, layer.recorder.active))
    assert torch.equal(seen[0][0], seen[1][0])
    for ours, theirs in zip(seen[0][1:], seen[1][1:], strict=True):
        torch.testing.assert_close(ours, theirs)
    layer.recorder = Recorder(layer)
    total: Any = dense_matrix(layer).sum()
    total.backward()
    assert not layer.recorder.has_seen
