"""Stored weights, with and without ablated neurons, mean the dense weight that they should."""

import pytest
import torch
from torch import nn

from padst_compiler.layers import SparseLayer, SparseLinear
from padst_compiler.storage import replace_data, width_of
from padst_compiler.structures import NM, FanIn, Shape, Structure


def make(structure: Structure, kept: int, rows: list[int] | None) -> SparseLayer:
    dense = nn.Linear(12, 6, dtype=torch.float64)
    start = structure.select(torch.randn(6, 12), kept)
    layer = SparseLinear.adopt(dense, structure, start, None, "input")
    if rows is not None:
        active = Shape(len(rows), 12)
        width = width_of(structure, layer.values.numel(), active)
        units = structure.select(torch.randn(len(rows), 12), width)
        layer.store(units, torch.tensor(rows))
        used = units.numel()
        layer.values.data.view(-1)[used:] = 0
    return layer


@pytest.mark.parametrize("rows", [None, [0, 1, 2, 3, 4], [1, 4], [5]], ids=str)
@pytest.mark.parametrize(("structure", "kept"), [(FanIn(), 2), (NM(m=4), 1), (NM(m=4, n=2), 2)])
def test_every_view_of_a_layer_is_one_weight(
    structure: Structure, kept: int, rows: list[int] | None
) -> None:
    layer = make(structure, kept, rows)
    left = list(range(6)) if rows is None else rows
    packed = layer.packed()
    weight = torch.zeros(6, 12, dtype=torch.float64)
    part = structure.unpack(packed.values.detach(), packed.indices, Shape(len(left), 12))
    weight[left] = part
    assert torch.equal(layer.matrix().detach(), weight) and torch.equal(layer.weight, weight)
    mask = layer.mask()
    assert mask[left].any(dim=1).all() and int(mask.sum()) == packed.values.numel()
    gone = [row for row in range(6) if row not in left]
    assert not mask[gone].any() and layer.ablated == len(gone)
    assert layer.sparsity == pytest.approx(1 - float(mask.double().mean()))
    x = torch.randn(3, 12, dtype=torch.float64)
    assert layer.bias is not None
    torch.testing.assert_close(layer(x), x @ weight.t() + layer.bias)
    matrix = torch.randn(6, 12, dtype=torch.float64)
    layer.values.data.copy_(layer.pack(matrix))
    assert torch.equal(layer.matrix().detach(), matrix * mask)
    units = layer.kept_units()
    assert bool((units[gone] == -1).all()) and bool((units[left] >= 0).all())


def test_widths_follow_the_budget() -> None:
    assert width_of(FanIn(), 30, Shape(4, 12)) == 7
    assert width_of(FanIn(), 30, Shape(2, 12)) == 12  # no more than there are inputs
    assert width_of(NM(m=4), 18, Shape(3, 12)) == 2
    assert width_of(NM(m=4, n=1), 18, Shape(1, 12)) == 1


def test_storing_is_in_place_where_the_size_stays() -> None:
    layer = make(FanIn(), 2, [1, 4])
    rows, pointer = layer.rows, layer.indices.data_ptr()
    layer.store(layer.packed().indices.clone(), torch.tensor([0, 5]))
    assert layer.rows is rows and layer.rows is not None and layer.rows.tolist() == [0, 5]
    assert layer.indices.data_ptr() == pointer
    layer.store(FanIn().select(torch.randn(6, 12), 2), None)
    assert layer.rows is None and layer.ablated == 0


def test_resizing_makes_room() -> None:
    layer = make(FanIn(), 2, None)
    parameter = layer.values
    assert layer.resize([6, 1], 3, False) is None
    assert layer.values is parameter and parameter.shape == (6, 1) == tuple(layer.indices.shape)
    assert layer.size() == ([6, 1], 3, False)


def test_new_data_drops_the_gradient() -> None:
    weight = nn.Parameter(torch.ones(4))
    weight.sum().backward()
    replace_data(weight, torch.zeros(2, 2))
    assert weight.grad is None and weight.shape == (2, 2) and weight.requires_grad
