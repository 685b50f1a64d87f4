import pytest
import torch

from padst_compiler.index_map import IndexMap
from padst_compiler.structures import Block, Shape


def test_the_numbers_of_the_docstring_and_of_the_method() -> None:
    assert Block(32).kept(Shape(3072, 768), 0.9) == 2  # of 24 block columns
    assert Block(32).actual_sparsity(Shape(3072, 768), 2) == 1 - 2 / 24
    # 768 inputs have 12 blocks of 64 per row: 95 % cannot be reached.
    assert Block(64).table(Shape(768, 768)) == (12, 12)
    assert Block(64).kept(Shape(768, 768), 0.95) == 1
    assert Block(64).actual_sparsity(Shape(768, 768), 1) == pytest.approx(1 - 1 / 12)


def test_a_row_of_blocks_is_one_dense_matrix_without_a_copy() -> None:
    structure, shape = Block(4), Shape(8, 16)
    dense = torch.randn(8, 16)
    indices = structure.select(dense, 2)
    values = structure.pack(dense, indices)
    matrix = values.view(2, 2 * 4, 4)  # (o/b, k*b, b): inputs before outputs
    for row in range(2):
        columns = torch.cat([torch.arange(4) + 4 * int(c) for c in indices[row]])
        assert torch.equal(matrix[row], dense[4 * row : 4 * row + 4][:, columns].t())
    assert structure.unit(shape) == (4, 4)


def test_every_row_of_blocks_keeps_the_same_number() -> None:
    structure, dense = Block(8), torch.randn(64, 48)
    dense[:8] *= 100.0  # a strong row of blocks gets no more than the others
    mask = structure.mask(structure.select(dense, 2), Shape(64, 48))
    assert (mask.view(8, 8, 6, 8).any(dim=3).any(dim=1).sum(dim=1) == 2).all()


def test_scores_are_frobenius_norms() -> None:
    dense = torch.zeros(4, 8)
    dense[0, 0], dense[1, 1], dense[3, 7] = 3.0, 4.0, -2.0
    assert Block(2).unit_scores(dense).tolist() == [[5.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 2.0]]


@pytest.mark.parametrize(
    ("size", "shape", "said"),
    [
        (16, Shape(770, 770), "Got 770x770. Pad the layer, or leave the layer dense."),
        (32, Shape(48, 96), "Got 48x96. Use size 48 or 24, or leave the layer dense."),
        (64, Shape(96, 96), "Use size 48 or 32"),
        (5, Shape(10, 12), "divisible by the block size 5. Got 10x12. Pad"),
        (0, Shape(8, 8), "at least 1. Got 0. Use 16, 32 or 64."),
        (-4, Shape(8, 8), "at least 1. Got -4."),
    ],
    ids=str,
)
def test_a_refusal_names_the_size_that_fits(size: int, shape: Shape, said: str) -> None:
    refusal = Block(size).refusal(shape)
    assert refusal is not None and said in refusal
    assert refusal.startswith("Expected ")


def test_the_size_that_a_refusal_names_fits() -> None:
    for out_features, in_features in ((96, 72), (64, 48), (100, 60), (56, 40)):
        shape = Shape(out_features, in_features)
        refusal = Block(512).refusal(shape)
        assert refusal is not None
        named = refusal.partition("Use size ")[2].partition(",")[0].split(" or ")
        assert named and all(Block(int(size)).refusal(shape) is None for size in named)


def test_whole_blocks_and_shuffles_within_them_are_absorbed() -> None:
    structure, shape = Block(3), Shape(6, 9)
    blocks = [6, 7, 8, 0, 1, 2, 3, 4, 5]
    within = [2, 0, 1, 3, 5, 4, 6, 7, 8]
    across = [3, 1, 2, 0, 4, 5, 6, 7, 8]
    assert structure.absorbs_columns(IndexMap.of(blocks), shape)
    assert structure.absorbs_columns(IndexMap.of(within), shape)
    assert structure.absorbs_columns(IndexMap.of(blocks).then(IndexMap.of(within)), shape)
    assert not structure.absorbs_columns(IndexMap.of(across), shape)


def test_a_block_of_one_weight_leaves_a_permutation_nothing_to_learn() -> None:
    # As the docstring of vacuous_sides says, and as absorbs_columns and absorbs_rows answer.
    shuffle = IndexMap.of(torch.randperm(8))
    assert Block(1).absorbs_columns(shuffle, Shape(8, 8))
    assert Block(1).absorbs_rows(shuffle, Shape(8, 8))
    assert Block(1).vacuous_sides == frozenset({"input", "output"})
    assert Block(2).vacuous_sides == frozenset()


def test_dx_adds_what_several_blocks_of_a_column_give() -> None:
    structure = Block(2)
    indices = torch.tensor([[1], [1]], dtype=torch.int32)  # both rows of blocks read column 1
    values = torch.ones(2, 1, 2, 2)
    dx = structure.linear_dx(torch.ones(1, 4), values, indices, in_features=6)
    assert dx.tolist() == [[0.0, 0.0, 4.0, 4.0, 0.0, 0.0]]
