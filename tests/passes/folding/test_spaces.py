import itertools

import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from padst_compiler.passes.folding.spaces import Axis, Space, cut_at, leaves, size_of, total, unify

SIZES = st.lists(st.integers(1, 6), min_size=1, max_size=5)


def axis(sizes: list[int]) -> Axis:
    return tuple(Space(size) for size in sizes)


def boundaries(given: Axis) -> set[int]:
    found, at = {0}, 0
    for space in leaves(given):
        assert isinstance(space.size, int)
        at += space.size
        found.add(at)
    return found


@given(SIZES, st.data())
def test_unify_makes_two_axes_one_and_keeps_every_boundary(
    sizes: list[int], data: st.DataObject
) -> None:
    length = sum(sizes)
    cuts = data.draw(st.sets(st.integers(1, max(1, length - 1)), max_size=4))
    points = sorted({0, length, *(c for c in cuts if c < length)})
    one, two = axis(sizes), axis([b - a for a, b in itertools.pairwise(points)])
    before = boundaries(one) | boundaries(two)
    assert unify(one, two)
    assert leaves(one) == leaves(two)
    assert total(leaves(one)) == total(leaves(two)) == length
    assert boundaries(one) == before  # no finer than it must be


@given(SIZES, SIZES, SIZES)
def test_unify_of_overlapping_axes_keeps_sizes(a: list[int], b: list[int], c: list[int]) -> None:
    left, right, other = axis(a), axis(b), axis(c)
    one, two = (*left, *right, *other), (*right, *other, *left)  # a rotation of one axis
    assert unify(one, two)
    assert leaves(one) == leaves(two)
    assert total(leaves(one)) == sum(a) + sum(b) + sum(c)
    for part, sizes in ((left, a), (right, b), (other, c)):
        assert total(leaves(part)) == sum(sizes)


@given(SIZES, SIZES)
def test_axes_of_other_lengths_are_left_alone(a: list[int], b: list[int]) -> None:
    one, two = axis(a), axis([*b, sum(a)])
    assert not unify(one, two)
    assert (leaves(one), leaves(two)) == (one, two)


@given(SIZES, st.data())
def test_cut_at_puts_positions_between_spaces(sizes: list[int], data: st.DataObject) -> None:
    given = axis(sizes)
    positions = data.draw(st.lists(st.integers(0, sum(sizes)), max_size=4))
    before = boundaries(given)
    assert cut_at(given, positions)
    assert boundaries(given) == before | set(positions)
    assert total(leaves(given)) == sum(sizes)


def test_symbols_are_neither_ordered_nor_cut() -> None:
    n = sympy.Symbol("n")
    one, two = (Space(n), Space(2)), (Space(2), Space(n))
    assert not unify(one, two)
    assert not cut_at(one, [1])
    assert unify((Space(n), Space(2)), (Space(n), Space(2)))


@pytest.mark.parametrize("hint", [3, 7])
def test_a_size_is_a_number_or_a_symbol_and_adds_no_guard(hint: int) -> None:
    environment = ShapeEnv()
    symbol = environment.create_unbacked_symint()
    assert size_of(hint) == hint
    assert isinstance(size_of(symbol), sympy.Expr)
    assert size_of(symbol * 0 + hint) == hint
    assert isinstance(symbol, torch.SymInt) and not environment.guards
