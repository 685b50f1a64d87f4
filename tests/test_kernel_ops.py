from typing import Any

import pytest
import torch
from torch import Tensor

from padst_compiler.activation import ACTIVATIONS
from padst_compiler.kernel_ops import (
    BLOCK_MLP,
    DIAGONAL_SUMS,
    GATHERED_SUMS,
    IN_MAP,
    INTO,
    MAPPED,
    PICKED_SUMS,
)
from padst_compiler.ops import LINEAR, LINEAR_DX
from padst_compiler.pairs_ops import BLOCK_PAIRS, BLOCK_PAIRS_DX
from padst_compiler.structures import Block, Shape, Structure

from .test_ops import Kinds, storage


def x(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


PLACES = torch.tensor([[[1, 0], [2, 2], [0, 1], [2, 0]], [[0, 0], [1, 2], [1, 1], [0, 2]]])
P, Q = torch.tensor([5, 0, 7, 2, 1, 3]), torch.tensor([3, 0, 2, 1])


def by_hand_picked(x: Tensor, weights: Tensor) -> Tensor:
    """Two groups of three inputs, two slots each; tiles of two outputs."""
    y = torch.zeros(*x.shape[:-1], 4, dtype=x.dtype)
    for tile in range(2):
        for slot in range(4):
            for n in range(2):
                place = slot // 2 * 3 + int(PLACES[tile, slot, n])
                y[..., 2 * tile + n] += weights[tile, slot, n] * x[..., place]
    return y


@pytest.mark.parametrize("lead", [(), (5,), (2, 3)], ids=str)
@pytest.mark.parametrize("through", [False, True])
@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_slots_pick_from_their_group(
    lead: tuple[int, ...], through: bool, moved: bool, dtype: torch.dtype
) -> None:
    given, weights = x(*lead, 8 if through else 6), x(2, 4, 2)
    maps = (P if through else None, Q if moved else None)
    y = PICKED_SUMS(given, weights, PLACES.to(dtype), 2, *maps)
    expected = by_hand_picked(given[..., P] if through else given, weights)
    torch.testing.assert_close(y, expected[..., Q] if moved else expected)


STARTS, CROSSED = torch.tensor([0, 2, 2, 6]), torch.tensor([4, 0, 5, 3, 1, 2])


@pytest.mark.parametrize("down", [False, True])
@pytest.mark.parametrize("through", [False, True])
@pytest.mark.parametrize("moved", [False, True])
def test_crossings_add_to_their_tile(down: bool, through: bool, moved: bool) -> None:
    given, weights = x(3, 8 if through else 6), x(6, 2)
    q, places = torch.randperm(6), CROSSED.to(torch.int32)
    maps = (P if through else None, q if moved else None)
    y = DIAGONAL_SUMS(given, weights, places, STARTS.to(torch.int32) if down else None, 6, *maps)
    inputs = given[:, P] if through else given
    around = torch.zeros(3, 10, dtype=x(1).dtype)
    around[:, 2:8] = inputs
    expected = torch.zeros(3, 6, dtype=inputs.dtype)
    starts = STARTS.tolist() if down else [0, 2, 4, 6]
    for tile in range(3):
        for at in range(starts[tile], starts[tile + 1]):
            for n in range(2):
                place = int(CROSSED[at]) + n
                read = around[:, place] if down else inputs[:, place % 6]
                expected[:, 2 * tile + n] += weights[at, n] * read
    torch.testing.assert_close(y, expected[:, q] if moved else expected)


@pytest.mark.parametrize("through", [False, True])
@pytest.mark.parametrize("moved", [False, True])
def test_weights_gather_their_inputs(through: bool, moved: bool) -> None:
    given, weights = x(2, 3, 8 if through else 6), x(4, 2)
    inputs = torch.tensor([[5, 0], [1, 2], [3, 4], [0, 1]], dtype=torch.int32)
    y = GATHERED_SUMS(given, weights, inputs, P if through else None, Q if moved else None)
    read = (given[..., P] if through else given)[..., inputs.long()]
    expected = (read * weights).sum(-1)
    torch.testing.assert_close(y, expected[..., Q] if moved else expected)
    args = (given, weights, inputs, P if through else None, Q if moved else None)
    torch.library.opcheck(GATHERED_SUMS, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("mapped", [False, True])
def test_two_layers_of_blocks_have_an_activation_between_them(
    activation: str, mapped: bool
) -> None:
    values1, indices1, dense1 = storage(Block, Shape(12, 6))
    values2, indices2, dense2 = storage(Block, Shape(4, 12))
    given, bias = x(2, 3, 8 if mapped else 6), None if mapped else x(12)
    maps = (P, Q) if mapped else (None, None)
    args = (given, values1, indices1, bias, values2, indices2, 12, 4, activation, *maps)
    y = BLOCK_MLP(*args)
    hidden = (given[..., P] if mapped else given) @ dense1.t()
    expected = ACTIVATIONS[activation](hidden if bias is None else hidden + bias) @ dense2.t()
    torch.testing.assert_close(y, expected[..., Q] if mapped else expected)
    torch.library.opcheck(BLOCK_MLP, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("maps", [(None, None), (P, Q)], ids=["plain", "mapped"])
def test_operators_pass_torchs_own_checks(maps: tuple[Any, Any]) -> None:
    given, checks = x(3, 8 if maps[0] is not None else 6), ("test_schema", "test_faketensor")
    args = (given, x(2, 4, 2), PLACES.to(torch.uint8), 2, *maps)
    torch.library.opcheck(PICKED_SUMS, args, test_utils=checks)
    out = None if maps[1] is None else torch.randperm(6)
    places = CROSSED.to(torch.int32)
    for starts in (STARTS.to(torch.int32), None):
        crossed = (given, x(6, 2), places, starts, 6, maps[0], out)
        torch.library.opcheck(DIAGONAL_SUMS, crossed, test_utils=checks)


def test_every_operator_with_maps_says_where_they_go() -> None:
    sums = {GATHERED_SUMS, PICKED_SUMS, DIAGONAL_SUMS}
    plain = {*MAPPED.values(), *sums, BLOCK_MLP, BLOCK_PAIRS, BLOCK_PAIRS_DX}
    assert set(INTO) == {*MAPPED.values(), BLOCK_MLP}
    assert set(IN_MAP) == plain | set(INTO.values())
    for op, place in IN_MAP.items():
        names = [argument.name for argument in op._schema.arguments]
        last = "into" if op in INTO.values() else "out_map"
        assert names[place : place + 2] == ["in_map", last] == names[-2:]


@Kinds
@pytest.mark.parametrize("maps", [(True, True), (True, False), (False, True)], ids=str)
def test_with_maps_the_input_is_moved_before_and_the_output_after(
    kind: type[Structure], maps: tuple[bool, bool]
) -> None:
    shape = Shape(8, 4)
    values, indices, dense = storage(kind, shape)
    for op, weight, width in ((LINEAR, dense, 8), (LINEAR_DX, dense.t(), 4)):
        p, q = torch.tensor([6, 1, 5, 0, 2, 2, 3, 4])[: weight.shape[1]], torch.randperm(width)
        x = torch.randn(2, 3, 7, dtype=dense.dtype)[..., : 7 if maps[0] else weight.shape[1]]
        x = x if maps[0] else torch.randn(2, 3, weight.shape[1], dtype=dense.dtype)
        args = (x, values, indices, width, p if maps[0] else None, q if maps[1] else None)
        y = MAPPED[op[kind.name]](*args)
        expected = (x[..., p] if maps[0] else x) @ weight.t()
        torch.testing.assert_close(y, expected[..., q] if maps[1] else expected)
        checks = ("test_schema", "test_faketensor")
        torch.library.opcheck(MAPPED[op[kind.name]], args, test_utils=checks)
        inverse = (*args[:-1], q.argsort() if maps[1] else None)
        torch.testing.assert_close(INTO[MAPPED[op[kind.name]]](*inverse), y)
        torch.library.opcheck(INTO[MAPPED[op[kind.name]]], inverse, test_utils=checks)
