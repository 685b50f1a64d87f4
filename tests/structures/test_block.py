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


def test_rectangular_blocks_have_rows_of_outputs_and_columns_of_inputs() -> None:
    structure, shape = Block(2, 4), Shape(4, 8)
    dense = torch.arange(32.0).view(4, 8)
    indices = torch.tensor([[1], [0]], dtype=torch.int32)
    values = structure.pack(dense, indices)
    assert values.shape == (2, 1, 4, 2)  # inputs before outputs
    assert torch.equal(values[0, 0], dense[:2, 4:].t())
    assert torch.equal(values[1, 0], dense[2:, :4].t())
    assert (structure.table(shape), structure.unit(shape)) == ((2, 2), (4, 2))


def test_free_blocks_go_where_the_weight_is_largest() -> None:
    structure, dense = Block(4, balanced=False), torch.randn(16, 24)
    dense[:4] *= 100.0
    kept = structure.kept(Shape(16, 24), 0.75)
    assert kept == 6  # of 4 x 6 blocks: the first row of blocks has them all
    assert structure.select(dense, kept).tolist() == [[0, 1, 2, 3, 4, 5]]
    mask = structure.mask(structure.select(dense, kept), Shape(16, 24))
    assert mask[:4].all() and not mask[4:].any()


@pytest.mark.parametrize("size", [8, 16, 32, 64, 128])
@pytest.mark.parametrize("columns", [None, 8, 128])
@pytest.mark.parametrize("balanced", [True, False])
def test_the_sparsity_reached_is_that_of_the_mask(
    size: int, columns: int | None, balanced: bool
) -> None:
    structure, shape = Block(size, columns, balanced), Shape(256, 384)
    for sparsity in (0.5, 0.8, 0.9, 0.95):
        kept = structure.kept(shape, sparsity)
        mask = structure.mask(structure.select(torch.randn(256, 384), kept), shape)
        reached = structure.actual_sparsity(shape, kept)
        assert reached == pytest.approx(1.0 - mask.double().mean().item(), abs=1e-12)
        groups, candidates = structure.table(shape)
        one = 1.0 / candidates  # what one more unit in each group changes
        assert abs(reached - sparsity) <= one / 2 + 1e-9 or kept == 1
        assert groups == (1 if not balanced else 256 // size)


def test_equal_blocks_are_equal_however_they_are_written() -> None:
    assert Block(16, 16) == Block(16) and hash(Block(16, 16)) == hash(Block(16))
    assert Block(16, 8) != Block(16) and Block(16, balanced=False) != Block(16)
    assert repr(Block(16, 8, False)) == "Block(size=16, columns=8, balanced=False)"


@pytest.mark.parametrize("structure", [Block(1, 4), Block(4, 1), Block(0, 4), Block(4, 3)], ids=str)
def test_the_sides_of_rectangular_blocks(structure: Block) -> None:
    refusal = structure.refusal(Shape(8, 8))
    said = {1: None, 0: "at least 1. Got 0:4", 4: None}[structure.size]
    said = "block size 4:3. Got 8x8. Use size 8 or 4" if structure.columns == 3 else said
    assert (refusal is None) == (said is None) and (said or "") in (refusal or "")
    vacuous = {(1, 4): {"output"}, (4, 1): {"input"}}.get(structure.sides, set())
    assert structure.vacuous_sides == vacuous


def test_random_structures_multiply_as_their_dense_weight_does() -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    for _ in range(200):
        structure = Block(draw(1, 5), draw(1, 5), bool(draw(0, 2)))
        shape = Shape(structure.sides[0] * draw(1, 5), structure.sides[1] * draw(1, 5))
        scores = torch.rand(structure.table(shape), generator=generator)
        slots = scores.topk(draw(1, scores.shape[1] + 1), dim=1).indices
        indices = structure.indices_of(slots, shape)
        values = torch.randn(*indices.shape, *structure.unit(shape), dtype=torch.float64)
        weight = torch.zeros(shape.out_features, shape.in_features, dtype=torch.float64)
        for group, units in enumerate(slots.tolist()):
            for at, unit in enumerate(units):
                row, column = (
                    (group, unit)
                    if structure.balanced
                    else divmod(unit, shape.in_features // structure.sides[1])
                )
                (r, c), block = structure.sides, values[group, at].t()
                weight[row * r : row * r + r, column * c : column * c + c] = block
        x = torch.randn(draw(0, 4), shape.in_features, dtype=torch.float64)
        y = structure.linear(x, values, indices, shape.out_features)
        torch.testing.assert_close(y, x @ weight.t())
        grad = torch.randn_like(y)
        dx = structure.linear_dx(grad, values, indices, shape.in_features)
        torch.testing.assert_close(dx, grad @ weight)
        dw = structure.linear_dw(grad, x, indices)
        torch.testing.assert_close(dw, structure.pack(grad.t() @ x, indices))
        assert torch.equal(structure.pack(weight, indices), values)
