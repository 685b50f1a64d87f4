"""Stored weights, with and without ablated neurons, mean the dense weight that they should."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from padst_compiler.layers import SparseLayer, SparseLinear
from padst_compiler.sparsify import sparsify
from padst_compiler.storage import replace_data
from padst_compiler.structures import NM, Block, FanIn, Shape, Structure
from padst_compiler.topology import width_of
from padst_compiler.training import harden


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


# -- a topology that is none -----------------------------------------------------------------------


def net(structure: str) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 16))
    harden(sparsify(model, structure=structure, sparsity=0.5, permutation="random"))
    return model


def numbers(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


KINDS = ["block:4", "block:8:4", "nm:4", "diagonal", "diagonal:band=4", "fan_in", "unstructured"]


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("structure", KINDS)
@pytest.mark.parametrize("wrong", [-1, 2**30, "twice"])
def test_a_state_with_indices_that_are_none_leaves_its_layer_alone(
    structure: str, wrong: int | str, assign: bool
) -> None:
    model, other = net(structure), net(structure)
    layer, state = model[0], other.state_dict()
    before, held = numbers(model), dict(layer.named_parameters())
    flat = state["0.indices"] = state["0.indices"].clone()
    if wrong == "twice":
        flat[..., 1] = flat[..., 0]
    else:
        flat.view(-1)[-1] = wrong
    with pytest.raises(RuntimeError, match=r"Expected unique indices below \d+\. Got .* '0' saved"):
        model.load_state_dict(state, assign=assign)
    found = model.state_dict()
    for name in before:
        kept = before if name.startswith("0.") else state
        assert torch.equal(found[name], kept[name]), name
    assert all(parameter is held[name] for name, parameter in layer.named_parameters())


def test_ablated_rows_are_looked_at_too() -> None:
    layer, state = make(FanIn(), 2, [1, 4]), make(FanIn(), 2, [0, 2]).state_dict()
    before = numbers(layer)
    for rows in ([2, 0], [1, 6], [-1, 0]):
        with pytest.raises(RuntimeError, match="Expected ascending rows below 6"):
            layer.load_state_dict({**state, "rows": torch.tensor(rows)})
        assert all(torch.equal(before[name], t) for name, t in layer.state_dict().items())
    layer.load_state_dict(state)
    assert layer.rows is not None and layer.rows.tolist() == [0, 2]
    with pytest.raises(RuntimeError, match="Expected ascending rows"):  # a part of a state as well
        layer.load_state_dict({"rows": torch.tensor([0, 7])}, strict=False)


@pytest.mark.filterwarnings("ignore:for .*a no-op")
@pytest.mark.parametrize("assign", [False, True])
def test_a_layer_and_a_state_without_numbers_load(assign: bool) -> None:
    block = Block(4)
    here, there = (make_block(block, device) for device in ("cpu", "meta"))
    there.load_state_dict(here.state_dict(), assign=assign)
    assert there.values.is_meta is not assign
    here.load_state_dict(make_block(block, "meta").state_dict(), assign=True)
    assert here.values.is_meta
    broken: dict[str, Any] = make_block(block, "cpu").state_dict()
    broken["indices"] = broken["indices"] + 9
    empty = make_block(block, "meta")
    with pytest.raises(RuntimeError, match="Expected unique indices below 3"):
        empty.load_state_dict(broken, assign=True)
    assert empty.values.is_meta and empty.indices.is_meta


def make_block(block: Block, device: str) -> SparseLayer:
    indices = block.select(torch.randn(8, 12), 2)
    return SparseLinear.adopt(nn.Linear(12, 8), block, indices, None, "input").to(device)


def test_a_state_of_another_shape_is_torchs_to_refuse() -> None:
    layer, state = make(FanIn(), 2, None), make(FanIn(), 3, None).state_dict()
    state["indices"] = state["indices"] + 100
    with pytest.raises(RuntimeError, match="size mismatch for indices"):
        layer.load_state_dict(state)
