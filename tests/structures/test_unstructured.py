import torch

from padst_compiler.index_map import IndexMap
from padst_compiler.structures import Shape, Unstructured


def test_the_numbers_of_the_docstring() -> None:
    assert Unstructured().kept(Shape(4, 5), 0.9) == 2
    assert Unstructured().actual_sparsity(Shape(4, 5), 2) == 0.9


def test_the_largest_weights_stay_wherever_they_are() -> None:
    dense = torch.tensor([[0.0, 9.0, -8.0], [1.0, 0.0, 2.0]])
    indices = Unstructured().select(dense, 3)
    assert indices.tolist() == [[1, 2, 5]]  # row * inputs + column
    assert Unstructured().pack(dense, indices).tolist() == [[9.0, -8.0, 2.0]]


def test_a_row_may_be_left_without_weights() -> None:
    dense = torch.ones(3, 4)
    dense[1] = 0.0
    mask = Unstructured().mask(Unstructured().select(dense, 8), Shape(3, 4))
    assert mask.sum(dim=1).tolist() == [4, 0, 4]


def test_more_weights_than_int32_can_number_are_refused() -> None:
    refusal = Unstructured().refusal(Shape(2**16, 2**15))
    assert refusal is not None
    assert refusal.startswith("Expected at most 2147483647 weights") and "fan_in" in refusal
    assert Unstructured().refusal(Shape(2**16, 2**15 - 1)) is None


def test_the_family_contains_every_permuted_member() -> None:
    shuffle = IndexMap.of(torch.randperm(8))
    assert Unstructured().absorbs_columns(shuffle, Shape(4, 8))
    assert Unstructured().absorbs_rows(shuffle, Shape(8, 4))
    assert Unstructured().vacuous_sides == frozenset({"input", "output"})
