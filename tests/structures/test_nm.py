import pytest
import torch

from padst_compiler.index_map import IndexMap
from padst_compiler.structures import NM, Shape


def test_the_numbers_of_the_docstring_and_of_the_method() -> None:
    assert NM(16).kept(Shape(8, 32), 0.9) == 2
    assert NM(m=4, n=2).kept(Shape(8, 32), 0.9) == 2  # n wins over the sparsity
    assert NM(m=4, n=2).actual_sparsity(Shape(8, 32), 2) == 0.5
    assert NM(16).actual_sparsity(Shape(768, 768), 2) == 0.875
    assert NM(32).actual_sparsity(Shape(768, 768), NM(32).kept(Shape(768, 768), 0.9)) == 1 - 3 / 32


def test_every_group_keeps_exactly_n() -> None:
    structure, dense = NM(m=4, n=2), torch.randn(6, 16)
    dense[:, :4] *= 100.0  # a strong group gets no more than the others
    mask = structure.mask(structure.select(dense, 2), Shape(6, 16))
    assert (mask.view(6, 4, 4).sum(dim=2) == 2).all()


def test_indices_are_positions_within_their_group() -> None:
    dense = torch.tensor([[0.0, 9.0, 1.0, 0.0, 7.0, 0.0, 0.0, 8.0]])
    structure = NM(m=4)
    indices = structure.select(dense, 2)
    assert indices.tolist() == [[[1, 2], [0, 3]]]
    assert structure.pack(dense, indices).tolist() == [[[9.0, 1.0], [7.0, 8.0]]]


@pytest.mark.parametrize(
    ("structure", "shape", "said"),
    [
        (NM(16), Shape(8, 40), "divisible by m = 16. Got 8x40. Use m = 10 or 8, or leave"),
        (NM(4), Shape(8, 7), "Got 8x7. Pad the layer, or leave the layer dense."),
        (NM(m=4, n=5), Shape(8, 8), "Expected 0 < n <= m. Got 5:4. Use 2:4, 1:8 or 2:16."),
        (NM(m=4, n=0), Shape(8, 8), "Got 0:4."),
        (NM(m=0), Shape(8, 8), "Expected 0 < n <= m. Got"),
    ],
    ids=str,
)
def test_a_refusal_names_the_cure(structure: NM, shape: Shape, said: str) -> None:
    refusal = structure.refusal(shape)
    assert refusal is not None and said in refusal
    assert refusal.startswith("Expected ")


def test_the_m_that_a_refusal_names_fits() -> None:
    for in_features in (40, 36, 50, 14, 12):
        shape = Shape(3, in_features)
        refusal = NM(512).refusal(shape)
        assert refusal is not None
        named = refusal.partition("Use m = ")[2].partition(",")[0].split(" or ")
        assert all(NM(int(m)).refusal(shape) is None for m in named)


def test_any_number_of_outputs_tiles() -> None:
    assert NM(4).refusal(Shape(7, 8)) is None
    assert NM(4).vacuous_sides == frozenset({"output"})


def test_groups_and_positions_within_them_are_absorbed() -> None:
    structure, shape = NM(m=2), Shape(3, 6)
    assert structure.absorbs_columns(IndexMap.of([5, 4, 0, 1, 3, 2]), shape)
    assert not structure.absorbs_columns(IndexMap.of([0, 2, 1, 3, 4, 5]), shape)
    assert structure.absorbs_rows(IndexMap.of([2, 0, 1]), shape)


def test_the_transpose_is_not_of_the_family() -> None:
    # Two rows may both keep the same input: its transposed row then keeps two of two.
    mask = NM(m=2).mask(torch.tensor([[[0]], [[0]]], dtype=torch.int32), Shape(2, 2))
    assert mask.t().sum(dim=1).tolist() == [2, 0]
