from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from padst_compiler.index_map import IndexMap, invert

Perms = st.integers(1, 24).flatmap(lambda n: st.permutations(range(n)))
Quick = settings(max_examples=60, deadline=None, database=None)


def identity(size: int) -> IndexMap:
    return IndexMap.of(list(range(size)))


def same(first: IndexMap, second: IndexMap) -> bool:
    return torch.equal(first.perm, second.perm)


@st.composite
def several(draw: st.DrawFn, count: int) -> list[IndexMap]:
    size = draw(st.integers(1, 16))
    return [IndexMap.of(list(draw(st.permutations(range(size))))) for _ in range(count)]


# -- the group laws --------------------------------------------------------------------------------


@Quick
@given(several(3))
def test_composition_is_associative(maps: list[IndexMap]) -> None:
    a, b, c = maps
    assert same(a.then(b).then(c), a.then(b.then(c)))


@Quick
@given(several(1))
def test_the_identity_and_the_inverse(maps: list[IndexMap]) -> None:
    (a,) = maps
    unit = identity(a.size)
    assert unit.is_identity
    assert same(a.then(unit), a) and same(unit.then(a), a)
    assert a.then(a.inverse).is_identity and a.inverse.then(a).is_identity
    assert same(a.inverse.inverse, a)
    assert a.is_identity == same(a, unit)


@Quick
@given(several(2))
def test_the_inverse_of_a_composition_is_reversed(maps: list[IndexMap]) -> None:
    a, b = maps
    assert same(a.then(b).inverse, b.inverse.then(a.inverse))


@Quick
@given(several(2))
def test_composition_is_gathering_in_turn(maps: list[IndexMap]) -> None:
    a, b = maps
    x = torch.arange(a.size) + 100
    assert torch.equal(x[a.perm][b.perm], x[a.then(b).perm])
    assert torch.equal(x[a.perm][a.inverse.perm], x)


@Quick
@given(Perms, st.sampled_from([torch.int32, torch.int64]))
def test_invert_undoes(order: list[int], dtype: torch.dtype) -> None:
    perm = torch.tensor(order, dtype=dtype)
    back = invert(perm)
    assert back.dtype is dtype
    assert back[perm.long()].tolist() == list(range(len(order)))
    assert all(order[back[j]] == j for j in range(len(order)))


# -- parts of a map --------------------------------------------------------------------------------


@st.composite
def block_maps(draw: st.DrawFn) -> tuple[int, list[int], list[list[int]]]:
    side, count = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    outer = draw(st.permutations(range(count)))
    inner = [list(draw(st.permutations(range(side)))) for _ in range(count)]
    return side, list(outer), inner


@Quick
@given(block_maps())
def test_blocks_splits_what_was_put_together(parts: tuple[int, list[int], list[list[int]]]) -> None:
    side, outer, inner = parts
    perm = [o * side + c for o, row in zip(outer, inner, strict=True) for c in row]
    split = IndexMap.of(perm).blocks(side)
    assert split is not None
    assert split.outer.tolist() == outer and split.inner.tolist() == inner


@Quick
@given(several(1), st.integers(1, 6))
def test_blocks_is_none_exactly_where_a_block_is_torn(maps: list[IndexMap], side: int) -> None:
    (a,) = maps
    order = a.perm.tolist()
    starts = range(0, a.size, side)
    torn = a.size % side or any(len({j // side for j in order[s : s + side]}) > 1 for s in starts)
    split = a.blocks(side)
    assert (split is None) == bool(torn)
    if split is not None:
        assert torch.equal((split.outer[:, None] * side + split.inner).flatten(), a.perm)


@Quick
@given(st.integers(1, 30), st.integers(0, 60))
def test_shifts_are_recognised_and_add_up(size: int, step: int) -> None:
    shifted = IndexMap.of((torch.arange(size) + step) % size)
    assert shifted.shift == step % size
    assert shifted.then(shifted).shift == 2 * step % size
    assert shifted.inverse.shift == -step % size


@Quick
@given(several(1))
def test_shift_is_none_for_every_other_map(maps: list[IndexMap]) -> None:
    (a,) = maps
    shifts = [[(j + s) % a.size for j in range(a.size)] for s in range(a.size)]
    order = a.perm.tolist()
    assert a.shift == (shifts.index(order) if order in shifts else None)


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ([0, 0, 1], "starting [0, 0, 1]"),
        ([1, 2, 3], "starting [1, 2, 3]"),
        ([-1, 0, 1], "starting [-1, 0, 1]"),
        ([[0, 1], [1, 0]], "shape (2, 2)"),
        (3, "shape ()"),
    ],
    ids=str,
)
def test_what_is_no_permutation_is_refused(given: Any, shown: str) -> None:
    with pytest.raises(ValueError, match=r"^Expected a permutation of 0\.\.n-1") as error:
        IndexMap.of(torch.tensor(given))
    assert shown in str(error.value)
    assert str(error.value).endswith("Pass each index once.")


def test_fractions_are_refused_and_not_cut() -> None:
    with pytest.raises(ValueError, match="Expected a permutation"):
        IndexMap.of(torch.tensor([0.2, 1.9]))


def test_a_map_does_not_change_with_the_tensor_that_it_was_made_from() -> None:
    perm = torch.tensor([1, 0])
    index_map = IndexMap.of(perm)
    perm[0] = 0
    assert index_map.perm.tolist() == [1, 0]


def test_a_map_lies_on_the_cpu_in_int64() -> None:
    perm = IndexMap.of(torch.tensor([1, 0], dtype=torch.int32)).perm
    assert perm.dtype is torch.int64 and perm.device.type == "cpu"
