"""Formulas of maps: the numbers they stand for, and what is no formula."""

import math

import pytest
import sympy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from padst_compiler.index_map import IndexMap
from padst_compiler.symbolic import J, Symbolic, recognise


def check(order: IndexMap) -> Symbolic:
    """Assert that formula and movement are those of the table."""
    found = recognise(order)
    assert found is not None
    x = torch.randn(2, 3, order.size)
    assert torch.equal(found.moved(x), x[..., order.perm])
    assert torch.equal(found.moved(x[0, 0]), x[0, 0, order.perm])
    formula = sympy.lambdify(J, found.formula, "math")
    assert [formula(j) for j in range(order.size)] == order.perm.tolist()
    return found


@pytest.mark.parametrize("size", [2, 3, 12, 17])
def test_rolls_and_flips(size: int) -> None:
    for shift in range(size):
        check(IndexMap.of(torch.arange(size).roll(shift)))
        check(IndexMap.of(torch.arange(size).roll(shift).flip(0)))


def test_the_identity_is_a_roll_by_nothing() -> None:
    assert check(IndexMap.of(torch.arange(8))).formula == sympy.Mod(J, 8)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(2, 5), min_size=2, max_size=4), st.randoms(use_true_random=False))
def test_digits_that_change_places(sizes: list[int], random: object) -> None:
    order = list(range(len(sizes)))
    random.shuffle(order)  # type: ignore[attr-defined]
    table = torch.arange(math.prod(sizes)).view(sizes).permute(order).flatten()
    check(IndexMap.of(table))


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 6), st.integers(2, 9), st.integers(0, 8), st.integers(0, 8))
def test_blocks_that_move_and_turn_within(side: int, count: int, outer: int, inner: int) -> None:
    table = torch.arange(side * count).view(count, side).roll((outer, inner), (0, 1)).flip(0)
    check(IndexMap.of(table.flatten()))


def test_a_formula_for_every_second_block_is_none() -> None:
    table = torch.arange(24).view(4, 6)
    table[1::2] = table[1::2].flip(-1)
    assert recognise(IndexMap.of(table.flatten())) is None


def test_most_maps_have_none() -> None:
    generator = torch.Generator().manual_seed(0)
    found = [recognise(IndexMap.of(torch.randperm(24, generator=generator))) for _ in range(200)]
    assert all(one is None for one in found)
    assert recognise(IndexMap.of([0])) is None
