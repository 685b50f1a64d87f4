"""Where a layer starts: masks drawn evenly, permutations as asked for, the largest weights."""

import pytest
import torch
from torch import nn

from padst_compiler.config import SparseConfig
from padst_compiler.decision import decide
from padst_compiler.permutation import FixedPermutation, SoftPermutation
from padst_compiler.sites import Site
from padst_compiler.starts import Start, prepare, random_topology, weight_of
from padst_compiler.structures import Shape, Unstructured


def site(config: SparseConfig, name: str = "fc", shares: str = "") -> Site:
    module = nn.Linear(32, 64)
    made = Site(name, "linear", 64 * 32, Shape(64, 32), config=config, module=module)
    decide([made])
    made.shares = shares
    return made


def start(config: SparseConfig) -> tuple[Site, Start]:
    return prepare([site(config)])[0]


def test_topologies_are_drawn_evenly() -> None:
    site = Site("fc", "linear", 400, Shape(20, 20))
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(400)
    for _ in range(500):
        indices = random_topology(Unstructured(), 100, site, generator)
        assert indices.dtype is torch.int32 and bool((indices.diff() > 0).all())
        counts[indices.long().flatten()] += 1
    assert counts.sum() == 500 * 100
    # Each weight is kept in a quarter of the draws: mean 125, deviation 9.7.
    assert counts.min() > 75 and counts.max() < 175


@pytest.mark.parametrize("permutation", ["none", "random", "learned", "clos", "low_rank:4"])
def test_the_permutation_is_the_one_that_was_asked_for(permutation: str) -> None:
    _, made = start(SparseConfig("nm:8", permutation=permutation))
    kind = {"none": type(None), "random": FixedPermutation}.get(permutation, SoftPermutation)
    assert isinstance(made.permutation, kind) and made.values is None


def test_siblings_that_share_get_one_module_and_own_masks() -> None:
    config = SparseConfig("nm:8", permutation="learned", share=True)
    starts = [s for _, s in prepare([site(config, "k", "q"), site(config, "q")])]
    assert starts[0].permutation is starts[1].permutation is not None
    assert not torch.equal(starts[0].indices, starts[1].indices)


def test_a_frozen_owner_trains_what_a_trained_sibling_shares() -> None:
    config = SparseConfig("nm:8", permutation="learned", share=True)
    owner, sibling = site(config, "q"), site(config, "k", "q")
    weight_of(owner).requires_grad_(False)
    (_, first), _ = prepare([owner, sibling])
    assert first.permutation is not None
    assert all(p.requires_grad for p in first.permutation.parameters())


@pytest.mark.parametrize("permutation", ["none", "random", "learned", "magnitude"])
def test_the_largest_weights_are_taken_over_as_they_are(permutation: str) -> None:
    made, (indices, found, values) = start(
        SparseConfig("nm:8", permutation=permutation, init="magnitude")
    )
    assert values is not None and made.structure is not None and made.shape is not None
    matrix = made.structure.unpack(values, indices, made.shape)
    if isinstance(found, FixedPermutation):
        matrix = matrix @ found.matrix()
    kept = matrix != 0
    assert torch.equal(matrix[kept], weight_of(made).detach()[kept])
    assert (found is None) == (permutation == "none")


def test_gmp_and_dynadiag_start_with_more_than_they_keep() -> None:
    for config in (
        SparseConfig("fan_in", start_sparsity=0.0),
        SparseConfig("dynadiag", permutation="none"),
    ):
        made, (indices, _, _) = start(config)
        assert made.structure is not None and made.shape is not None
        assert indices.shape[1] == made.structure.table(made.shape)[1] > made.kept
