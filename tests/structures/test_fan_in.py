import pytest
import torch

from padst_compiler.index_map import IndexMap
from padst_compiler.structures import FanIn, Shape


def test_the_numbers_of_the_docstring() -> None:
    assert FanIn().kept(Shape(64, 768), 0.9) == 77
    assert FanIn(k=5).kept(Shape(64, 768), 0.9) == 5  # k wins over the sparsity
    assert FanIn().kept(Shape(64, 768), 0.9999) == 1
    assert FanIn().actual_sparsity(Shape(64, 768), 77) == pytest.approx(1 - 77 / 768)


def test_every_output_reads_exactly_k_inputs() -> None:
    dense = torch.randn(16, 24)
    dense[3] *= 100.0
    mask = FanIn().mask(FanIn().select(dense, 4), Shape(16, 24))
    assert (mask.sum(dim=1) == 4).all()


def test_indices_are_the_inputs_of_an_output() -> None:
    dense = torch.tensor([[0.0, 5.0, -9.0], [1.0, 0.0, 2.0]])
    indices = FanIn().select(dense, 2)
    assert indices.tolist() == [[1, 2], [0, 2]]
    assert FanIn().pack(dense, indices).tolist() == [[5.0, -9.0], [1.0, 2.0]]


@pytest.mark.parametrize("k", [0, -1, 9])
def test_a_refusal_names_the_cure(k: int) -> None:
    assert FanIn(k=k).refusal(Shape(4, 8)) == (
        f"Expected 0 < k <= in_features. Got k = {k} and 4x8. Use a smaller k, or leave it out."
    )
    assert FanIn(k=8).refusal(Shape(4, 8)) is None


def test_the_family_contains_every_permuted_member() -> None:
    shuffle = IndexMap.of(torch.randperm(8))
    assert FanIn().absorbs_columns(shuffle, Shape(4, 8))
    assert FanIn().absorbs_rows(shuffle, Shape(8, 4))
    assert FanIn().vacuous_sides == frozenset({"input", "output"})
