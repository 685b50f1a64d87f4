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


def test_a_band_is_adjacent_offsets_and_a_class_is_every_gth() -> None:
    shape = Shape(12, 8)
    slots = torch.tensor([[2, 0]])
    assert Diagonal(band=3).indices_of(slots, shape).tolist() == [[6, 7, 8, 0, 1, 2]]
    assert Diagonal(modulus=4).indices_of(slots, shape).tolist() == [[2, 6, 10, 0, 4, 8]]
    assert Diagonal(band=3).table(shape) == (1, 4)
    assert Diagonal(modulus=4).table(shape) == (1, 4)
    assert Diagonal(band=3).actual_sparsity(shape, 2) == pytest.approx(0.5)
    assert Diagonal(modulus=4).actual_sparsity(shape, 1) == pytest.approx(0.75)
    assert repr(Diagonal(modulus=4)) == "Diagonal(modulus=4)"


@pytest.mark.parametrize(
    ("structure", "shape", "said"),
    [
        (Diagonal(band=5), Shape(12, 8), "larger side divisible by the band 5. Got 12x8"),
        (Diagonal(band=2, modulus=2), Shape(8, 8), "Expected band or modulus. Got both, 2 and 2"),
        (Diagonal(modulus=8), Shape(16, 12), "divisible by the modulus 8. Got 16x12"),
        (Diagonal(band=0), Shape(8, 8), "at least 1. Got Diagonal(band=0)"),
        (Diagonal(modulus=-2), Shape(8, 8), "at least 1. Got Diagonal(modulus=-2)"),
    ],
    ids=str,
)
def test_what_does_not_tile_is_refused(structure: Diagonal, shape: Shape, said: str) -> None:
    refusal = structure.refusal(shape)
    assert refusal is not None and said in refusal


@pytest.mark.parametrize(
    "shape", [Shape(12, 12), Shape(12, 24), Shape(24, 12), Shape(6, 12)], ids=str
)
@pytest.mark.parametrize("modulus", [2, 3, 6])
def test_residue_classes_are_dense_blocks_in_the_order_of_residues(
    shape: Shape, modulus: int
) -> None:
    structure = Diagonal(modulus=modulus)
    rows, columns = structure.residue_orders(shape)
    for kept in range(1, modulus + 1):
        dense = torch.randn(shape.out_features, shape.in_features)
        indices = structure.select(dense, kept)
        values = structure.pack(dense, indices)
        weight = structure.unpack(values, indices, shape)
        ordered = weight[rows.perm][:, columns.perm]
        high, wide = shape.out_features // modulus, shape.in_features // modulus
        tiles = ordered.view(modulus, high, modulus, wide).transpose(1, 2) != 0
        full, some = tiles.all(dim=(2, 3)), tiles.any(dim=(2, 3))
        assert torch.equal(full, some)  # a block is dense or empty
        assert (full.sum(dim=0) == kept).all() and (full.sum(dim=1) == kept).all()
        block, packed, places = structure.as_blocks(values, indices, shape)
        assert block.refusal(shape) is None and block.sides == (high, wide)
        assert torch.equal(block.unpack(packed, places, shape), ordered)
        assert packed.numel() == values.numel()


@pytest.mark.parametrize("shape", [Shape(24, 24), Shape(24, 12), Shape(12, 24)], ids=str)
@pytest.mark.parametrize("structure", [Diagonal(band=4), Diagonal(modulus=4)], ids=str)
def test_whole_units_are_kept_and_their_scores_are_norms(structure: Diagonal, shape: Shape) -> None:
    for _ in range(20):
        dense = torch.randn(shape.out_features, shape.in_features, dtype=torch.float64)
        scores = structure.unit_scores(dense)[0]
        for unit in range(scores.numel()):
            one = structure.indices_of(torch.tensor([[unit]]), shape)
            norm = dense[structure.mask(one, shape)].norm()
            torch.testing.assert_close(scores[unit].double(), norm, rtol=1e-5, atol=1e-6)
        indices = structure.select(dense, 2)
        best = scores.topk(2).indices.sort().values
        assert structure.slots(indices, shape).tolist() == [best.tolist()]
