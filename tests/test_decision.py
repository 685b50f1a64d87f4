import pytest
import torch
from torch import nn

from padst_compiler.config import SparseConfig
from padst_compiler.decision import as_refusal, decide
from padst_compiler.index_map import IndexMap
from padst_compiler.layers import SparseLinear
from padst_compiler.permutation import FixedPermutation
from padst_compiler.sites import Site, discover
from padst_compiler.structures import Block, Shape


def decided(config: SparseConfig, *shapes: tuple[int, int]) -> list[Site]:
    sites = [
        Site(f"{n}", "linear", shape[0] * shape[1], Shape(*shape), requested=True, config=config)
        for n, shape in enumerate(shapes)
    ]
    decide(sites)
    return sites


SIDES = [
    ("block", "auto", (96, 64), "learned", "input"),
    ("block", "auto", (64, 96), "learned", "output"),
    ("block", "auto", (64, 64), "learned", "input"),
    ("block", "output", (96, 64), "learned", "output"),
    ("nm", "auto", (32, 64), "learned", "input"),  # its rows absorb every permutation
    ("nm", "output", (32, 64), "none", "output"),
    ("fan_in", "auto", (32, 64), "none", "output"),
    ("unstructured", "input", (32, 64), "none", "input"),
    ("diagonal", "auto", (32, 64), "learned", "output"),
]


@pytest.mark.parametrize(("structure", "side", "shape", "permutation", "chosen"), SIDES)
def test_sides(
    structure: str, side: str, shape: tuple[int, int], permutation: str, chosen: str
) -> None:
    (site,) = decided(SparseConfig(structure, 0.5, side=side), shape)
    assert (site.decision, site.permutation, site.side) == ("sparse", permutation, chosen)
    assert ("nothing to learn" in site.reason) == (permutation == "none")


def test_a_vacuous_permutation_can_be_forced_or_drawn() -> None:
    (forced,) = decided(SparseConfig("fan_in", 0.5, force_permutation=True), (32, 64))
    assert (forced.permutation, forced.reason) == ("learned", "")
    (drawn,) = decided(SparseConfig("fan_in", 0.5, "random"), (32, 64))
    assert drawn.permutation == "random"
    (none,) = decided(SparseConfig("block", 0.5, "none"), (32, 64))
    assert (none.permutation, none.reason) == ("none", "")


def test_what_is_asked_and_what_is_reached_are_both_kept() -> None:
    (site,) = decided(SparseConfig("block:16", 0.9), (64, 64))
    assert (site.kept, site.sparsity, site.actual_sparsity) == (1, 0.9, 0.75)
    (own,) = decided(SparseConfig("nm:2:4", 0.9), (64, 64))
    assert (own.kept, own.actual_sparsity) == (2, 0.5)


def test_sizes_that_do_not_tile_are_refused_with_the_cure() -> None:
    (site,) = decided(SparseConfig("block:32"), (48, 96))
    assert (site.decision, site.refused) == ("dense", True)
    assert "Use size 48 or 24" in site.reason
    assert as_refusal(site) == site.reason


def test_nothing_to_remove_is_dense() -> None:
    (site,) = decided(SparseConfig("block:32", 0.9), (64, 32))
    assert site.refused and "keeps 1 of 1 candidates" in site.reason
    (zero,) = decided(SparseConfig("block:7", 0.0), (64, 32))
    assert (zero.decision, zero.refused) == ("dense", False)
    assert zero.reason == "sparsity 0: nothing to remove"
    (full,) = decided(SparseConfig("fan_in:64"), (32, 64))
    assert full.refused


def test_erk_spreads_over_the_sites_of_one_config_that_fit() -> None:
    shapes = [(64, 64), (256, 64), (256, 256), (65, 64)]
    sites = decided(SparseConfig("fan_in", 0.8, distribution="erk"), *shapes)
    assert [site.decision for site in sites[:3]] == ["sparse"] * 3
    assert sites[0].sparsity < sites[1].sparsity < sites[2].sparsity
    uneven = decided(SparseConfig("block:32", 0.75, distribution="erk"), *shapes)
    assert uneven[3].refused and uneven[3].sparsity == 0.0
    zeros = sum(site.weights * site.sparsity for site in uneven[:3])
    assert zeros == pytest.approx(0.75 * sum(site.weights for site in uneven[:3]))


def test_erk_may_leave_small_layers_dense() -> None:
    config = SparseConfig("fan_in", 0.5, distribution="erk")
    small, large = decided(config, (16, 16), (512, 512))
    assert (small.decision, small.refused) == ("dense", False)
    assert small.reason == "erk leaves it dense" and large.decision == "sparse"
    rounded = decided(SparseConfig("nm:2", 0.3, distribution="erk"), (64, 64), (96, 96))[0]
    assert "keeps 2 of 2" in rounded.reason and not rounded.refused


def test_obstacles_of_requested_sites_are_refusals() -> None:
    site = Site("fc", "linear", 64, Shape(8, 8), obstacle="no.", config=SparseConfig())
    decide([site])
    assert site.refused and site.decision == "dense"
    assert as_refusal(site).endswith("Got one that cannot: no.")


@pytest.mark.parametrize("hard", [True, False])
def test_sparse_layers_are_described(hard: bool) -> None:
    layer = nn.Linear(8, 8)
    perm = FixedPermutation(IndexMap.of(list(range(8)))) if hard else None
    SparseLinear.adopt(layer, Block(4), torch.zeros(2, 1, dtype=torch.int32), perm, "output")
    (site,) = discover(layer)
    decide([site])
    assert (site.decision, site.structure, site.kept) == ("sparse", Block(4), 1)
    assert (site.permutation, site.side) == ("hard" if hard else "none", "output")
    assert site.actual_sparsity == 0.5
