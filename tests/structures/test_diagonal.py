from itertools import combinations
from math import gcd

import pytest
import torch

from padst_compiler.index_map import IndexMap
from padst_compiler.structures import Diagonal, Shape


def test_the_numbers_of_the_method() -> None:
    # DynaDiag's code rounds up: K = ceil(int((1 - s) * R * C) / min(R, C)).
    wanted = {0.6: 308, 0.7: 231, 0.8: 154, 0.9: 77, 0.95: 39}
    assert {s: Diagonal().kept(Shape(768, 768), s) for s in wanted} == wanted
    assert Diagonal().kept(Shape(10, 10), 0.7) == 3  # (1 - 0.7) * 10 is a little more than 3


@pytest.mark.parametrize(
    ("shape", "candidates", "length"),
    [(Shape(4, 4), 4, 4), (Shape(6, 4), 6, 4), (Shape(4, 6), 6, 4)],
    ids=str,
)
def test_there_are_as_many_offsets_as_the_longer_side(
    shape: Shape, candidates: int, length: int
) -> None:
    assert Diagonal().table(shape) == (1, candidates)
    assert Diagonal().unit(shape) == (length,)
    # Each weight of the layer lies on exactly one diagonal.
    every = torch.arange(candidates, dtype=torch.int32)[None]
    rows, columns = Diagonal().coordinates(every, shape)
    flat = (rows * shape.in_features + columns).flatten().sort().values
    assert torch.equal(flat, torch.arange(shape.numel))


def test_tall_wraps_around_the_rows_and_wide_around_the_columns() -> None:
    one = torch.tensor([[2]], dtype=torch.int32)
    tall = Diagonal().mask(one, Shape(4, 3)).nonzero().tolist()
    wide = Diagonal().mask(one, Shape(3, 4)).nonzero().tolist()
    assert sorted(tall) == [[0, 2], [2, 0], [3, 1]]  # rows (c + 2) mod 4
    assert sorted(wide) == [[0, 2], [1, 3], [2, 0]]  # columns (r + 2) mod 4


def test_exactly_k_diagonals_are_kept() -> None:
    shape = Shape(24, 16)
    indices = Diagonal().select(torch.randn(24, 16), 5)
    mask = Diagonal().mask(indices, shape)
    assert int(mask.sum()) == 5 * 16
    assert (mask.sum(dim=0) == 5).all()  # every input is read by K outputs


def test_the_transpose_is_the_diagonal_of_the_negated_offset() -> None:
    offsets = torch.tensor([[1, 4]], dtype=torch.int32)
    negated = (-offsets) % 7
    mask = Diagonal().mask(offsets, Shape(7, 7))
    assert torch.equal(Diagonal().mask(negated, Shape(7, 7)), mask.t())


def test_nothing_is_refused() -> None:
    assert all(Diagonal().refusal(Shape(o, i)) is None for o in (1, 3, 8) for i in (1, 5, 8))


def test_shifts_are_absorbed_where_the_diagonals_wrap() -> None:
    shift, size = IndexMap.of([2, 3, 0, 1]), 4
    assert Diagonal().absorbs_columns(shift, Shape(size, size))
    assert Diagonal().absorbs_rows(shift, Shape(size, size))
    assert Diagonal().absorbs_columns(shift, Shape(3, size))
    assert not Diagonal().absorbs_columns(shift, Shape(5, size))
    assert Diagonal().absorbs_rows(shift, Shape(size, 3))
    assert not Diagonal().absorbs_rows(shift, Shape(size, 5))
    assert Diagonal().vacuous_sides == frozenset()


@pytest.mark.parametrize("factor", [a for a in range(9) if gcd(a, 9) == 1])
def test_a_multiplication_on_both_sides_preserves_the_family_but_no_side_offers_it(
    factor: int,
) -> None:
    # i -> a i mod n on rows and columns at once maps offset d to offset d / a: design.md, section
    # 3. absorbs_* answers for one side at a time, so this is not used yet.
    size, shape = 9, Shape(9, 9)
    stride = torch.arange(size) * factor % size
    masks = {
        offsets: Diagonal().mask(torch.tensor([offsets], dtype=torch.int32), shape)
        for offsets in combinations(range(size), 2)
    }
    for (first, second), mask in masks.items():
        back = pow(factor, -1, size)
        moved = tuple(sorted((first * back % size, second * back % size)))
        assert torch.equal(mask[stride][:, stride], masks[moved[0], moved[1]])
    assert Diagonal().absorbs_columns(IndexMap.of(stride), shape) is (factor == 1)
    assert Diagonal().absorbs_rows(IndexMap.of(stride), shape) is (factor == 1)
