"""Distances of permutations against a search of the whole symmetry group, on small sizes."""

import itertools

import pytest
import torch

from padst_compiler.distance import moved, moved_between_blocks, moved_modulo, moved_off_shift
from padst_compiler.index_map import IndexMap
from padst_compiler.structures import NM, Block, Diagonal, FanIn, Shape, Structure, Unstructured

EVERY = [list(p) for p in itertools.permutations(range(6))]
CASES: list[tuple[Structure, Shape]] = [
    (Block(2), Shape(6, 6)),
    (Block(3), Shape(6, 6)),
    (Block(1), Shape(6, 6)),
    (NM(m=2), Shape(4, 6)),
    (NM(m=3), Shape(6, 6)),
    (Diagonal(), Shape(6, 6)),
    (Diagonal(), Shape(4, 6)),
    (Diagonal(), Shape(6, 4)),
    (Diagonal(band=2), Shape(6, 6)),
    (Diagonal(modulus=3), Shape(6, 6)),
    (Diagonal(modulus=2), Shape(6, 6)),
    (Block(2, 3), Shape(6, 6)),
    (Block(3, 2, balanced=False), Shape(6, 6)),
    (FanIn(), Shape(6, 6)),
    (Unstructured(), Shape(6, 6)),
]


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize(("structure", "shape"), CASES, ids=str)
def test_the_distance_is_the_least_over_everything_absorbed(
    structure: Structure, shape: Shape, side: str
) -> None:
    """The group by brute force: all 720 permutations that the structure says it absorbs."""
    size = shape.in_features if side == "input" else shape.out_features
    every = EVERY if size == 6 else [list(p) for p in itertools.permutations(range(size))]
    absorbs = structure.absorbs_columns if side == "input" else structure.absorbs_rows
    group = [p for p in every if absorbs(IndexMap.of(p), shape)]
    assert structure.refusal(shape) is None and list(range(size)) in group
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(every), generator=generator)[:60].tolist()
    for perm in [every[n] for n in chosen] + group[:20]:
        least = min(sum(perm[g[j]] != j for j in range(size)) for g in group) / size
        found = moved_modulo(IndexMap.of(perm), structure, shape, side)
        assert found == pytest.approx(least), perm
        assert (found == 0.0) == (perm in group)
        assert found <= moved(IndexMap.of(perm))


def test_200_random_permutations_against_a_plain_search_of_block_names() -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(200):
        perm = torch.randperm(12, generator=generator).tolist()
        for block in (2, 3, 4, 6):
            names = range(12 // block)
            stays = max(
                sum(perm[j] // block == name[j // block] for j in range(12))
                for name in itertools.permutations(names)
            )
            found = moved_between_blocks(IndexMap.of(perm), block)
            assert found == pytest.approx(1 - stays / 12)
        best = max(sum(perm[j] == (j + s) % 12 for j in range(12)) for s in range(12))
        assert moved_off_shift(IndexMap.of(perm)) == pytest.approx(1 - best / 12)


def test_raw_counts_what_moves() -> None:
    assert moved(IndexMap.of([0, 1, 2, 3])) == 0.0
    assert moved(IndexMap.of([2, 1, 0, 3])) == 0.5
    assert moved(IndexMap.of([1, 2, 3, 0])) == 1.0


def test_a_random_permutation_of_a_wide_layer_is_far() -> None:
    perm = IndexMap.of(torch.randperm(768, generator=torch.Generator().manual_seed(0)))
    shape = Shape(768, 768)
    far = [moved_modulo(perm, kind, shape, "input") for kind in (Block(16), Diagonal(), NM(m=4))]
    assert min(far) > 0.7 and max(far) < 1.0


def test_blocks_that_do_not_tile_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Expected blocks that tile 4 features. Got blocks of 3"):
        moved_between_blocks(IndexMap.of([1, 0, 2, 3]), 3)
