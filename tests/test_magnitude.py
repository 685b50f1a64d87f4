"""One-shot selection keeps the most there is to keep, and finds the permutation that keeps more."""

import itertools

import pytest
import torch
from torch import nn

import padst_compiler as padst
from padst_compiler import SparseConfig
from padst_compiler.magnitude import _deal, find_permutation, select, undo
from padst_compiler.permutation import FixedPermutation
from padst_compiler.structures import NM, Block, Diagonal, FanIn, Shape, Structure

SMALL: list[tuple[Structure, int]] = [(Block(2), 1), (NM(m=3), 1), (Diagonal(), 2), (FanIn(), 2)]


def share_of(structure: Structure, weight: torch.Tensor, kept: int) -> float:
    inside = structure.pack(weight, structure.select(weight, kept))
    return float(inside.square().sum() / weight.square().sum())


@pytest.mark.parametrize(("structure", "kept"), SMALL, ids=str)
@pytest.mark.parametrize("side", ["input", "output"])
def test_it_comes_near_the_best_of_all_permutations(
    structure: Structure, kept: int, side: str
) -> None:
    """Of 720 permutations, 10 matrices for each structure and side."""
    reached, best_found, identity, random = 0.0, 0.0, 0.0, 0.0
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(6, 6, generator=generator, dtype=torch.float64)
        everything = [
            share_of(structure, undo(weight, torch.tensor(perm), side), kept)
            for perm in itertools.permutations(range(6))
        ]
        found = find_permutation(structure, weight, kept, side, generator)
        assert found.share <= max(everything) + 1e-12
        assert found.share >= everything[0] - 1e-12  # the identity is one of the starts
        inside = undo(weight, found.index_map.perm, side)
        assert torch.equal(found.indices, structure.select(inside, kept))
        assert found.share == pytest.approx(share_of(structure, inside, kept))
        reached, best_found = reached + found.share, best_found + max(everything)
        identity, random = identity + everything[0], random + sum(everything) / 720
    assert reached >= identity - 1e-9
    if side not in structure.vacuous_sides:  # else all permutations are equal
        assert reached - random >= 0.5 * (best_found - random)


def test_a_planted_permutation_is_found() -> None:
    found = 0
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        mask = Block(4).select(torch.rand(16, 16, generator=generator), 1)
        weight = torch.randn(16, 16, generator=generator) * Block(4).mask(mask, Shape(16, 16))
        perm = torch.randperm(16, generator=generator)
        hidden = weight[:, perm]
        result = find_permutation(Block(4), hidden, 1, "input", generator, starts=20)
        found += result.share > 0.999
    assert found >= 8


def test_dealing_columns_between_groups_keeps_more_in_wide_layers() -> None:
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand(64, generator=generator).sort(descending=True).values.exp().pow(3)
    weight = torch.randn(48, 64, generator=generator) * scale  # large columns stand together
    plain = share_of(NM(m=4), weight, 1)
    found = find_permutation(NM(m=4), weight, 1, "input", generator, starts=1)
    assert found.share > plain + 0.02
    order = torch.randperm(64, generator=generator)
    for _ in range(20):  # never worse
        new = _deal(weight.square(), order, 4, 1, generator)
        before, after = (share_of(NM(m=4), weight[:, each], 1) for each in (order, new))
        assert after >= before - 1e-7 and sorted(new.tolist()) == list(range(64))
        order = new


def test_selection_keeps_the_largest_units() -> None:
    weight = torch.tensor([[1.0, 2.0, 0.0, 0.0], [0.0, 3.0, 0.0, 4.0]])
    indices, share = select(Block(2), weight, 1)
    assert indices.tolist() == [[1]] and share == pytest.approx(16 / 30)
    assert select(Block(2), torch.zeros(2, 4), 1)[1] == 1.0


def test_weights_that_are_not_finite_are_refused() -> None:
    weight = torch.full((4, 4), torch.nan)
    with pytest.raises(ValueError, match="Expected finite weights for init='magnitude'"):
        find_permutation(Block(2), weight, 1, "input", torch.Generator())


@pytest.mark.parametrize("permutation", ["none", "random", "learned", "magnitude"])
@pytest.mark.parametrize("structure", ["block:4", "nm:4", "diagonal", "fan_in", "unstructured"])
@pytest.mark.parametrize("side", ["input", "output"])
def test_a_sparsified_model_keeps_the_dense_numbers(
    structure: str, permutation: str, side: str
) -> None:
    torch.manual_seed(0)
    first = nn.Linear(16, 24)
    model, dense = nn.Sequential(first, nn.Linear(24, 4)), first.weight.detach().clone()
    config = SparseConfig(structure, 0.75, permutation, side, init="magnitude")
    state = torch.get_rng_state()
    padst.sparsify(model, {"0": config})
    assert torch.equal(state, torch.get_rng_state())
    (layer,) = padst.sparse_layers(model).values()
    weight = layer.weight.detach()
    assert bool(((weight == dense) | (weight == 0)).all())
    assert layer.permutation is None or isinstance(layer.permutation, FixedPermutation)
    asked = permutation in ("learned", "magnitude")
    if asked and side not in layer.structure.vacuous_sides:
        plain = share_of(layer.structure, dense, layer.kept)
        assert float(weight.square().sum() / dense.square().sum()) >= plain
    x = torch.randn(3, 16)
    assert layer.bias is not None
    torch.testing.assert_close(layer(x), x @ weight.t() + layer.bias)


def test_a_permutation_by_magnitude_needs_the_magnitudes() -> None:
    with pytest.raises(ValueError, match="Expected init 'magnitude' with permutation 'magnitude'"):
        SparseConfig(permutation="magnitude")
