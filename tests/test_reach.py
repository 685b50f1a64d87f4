"""Ranks of reachable directions: what the theory predicts, and where masks are not the theory."""

import pytest
import torch

from padst_compiler.reach import reachable_ranks
from padst_compiler.span_budget import budgets, span
from padst_compiler.structures import NM, Block, Diagonal, FanIn, Shape, Structure, Unstructured

STRUCTURES: list[Structure] = [Block(16), Diagonal(), NM(m=8), FanIn()]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
def test_the_rank_grows_by_the_span_with_permutations_and_stays_without(
    structure: Structure, seed: int
) -> None:
    shape = Shape(96, 96)
    for sparsity in (0.75, 0.9):
        r = span(structure, shape, structure.kept(shape, sparsity))
        ranks = reachable_ranks(structure, 96, sparsity, 8, seed=seed)
        assert ranks == [int(u) for u in budgets(96, [r] * 8, [True] * 8)]
        for mode in ("general", "tied"):
            still = reachable_ranks(
                structure, 96, sparsity, 8, permutation="identity", mode=mode, seed=seed
            )
            assert still == [int(r)] * 8


def test_tied_inputs_overlap_so_random_permutations_need_more_layers() -> None:
    """In the mean d_0 (1 - (1 - r / d_0)^l), the coupon collector's."""
    runs = [reachable_ranks(Block(16), 64, 0.75, 6, mode="tied", seed=seed) for seed in range(40)]
    means = torch.tensor(runs, dtype=torch.float64).mean(dim=0)
    expected = [64 * (1 - (1 - 16 / 64) ** layers) for layers in range(1, 7)]
    assert means.tolist() == pytest.approx(expected, abs=1.5)
    assert max(run[3] for run in runs) < 64  # the theory's L_overhead is 4


@pytest.mark.parametrize("structure", [NM(m=8), FanIn(), Unstructured(), Diagonal()], ids=str)
def test_masks_that_are_not_tied_span_everything_in_one_layer(structure: Structure) -> None:
    for permutation in ("random", "identity"):
        ranks = reachable_ranks(structure, 64, 0.75, 2, permutation=permutation, mode="free")
        assert ranks[0] >= 60 and ranks[1] == 64


def test_the_seed_decides_and_the_global_generator_is_left_alone() -> None:
    state = torch.get_rng_state()
    one, two = (reachable_ranks(Block(8), 64, 0.9, 4, mode="tied", seed=5) for _ in range(2))
    assert one == two and torch.equal(torch.get_rng_state(), state)


def test_what_is_unknown_or_does_not_tile_is_refused() -> None:
    with pytest.raises(ValueError, match="Expected mode general or tied or free"):
        reachable_ranks(Block(8), 64, 0.5, 2, mode="loose")
    with pytest.raises(ValueError, match="Expected permutation random or identity"):
        reachable_ranks(Block(8), 64, 0.5, 2, permutation="none")
    with pytest.raises(ValueError, match="Expected"):
        reachable_ranks(Block(7), 64, 0.5, 2)
