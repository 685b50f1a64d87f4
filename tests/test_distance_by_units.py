"""Distances against a symmetry group that is found from the units alone, not from ``absorbs_*``."""

from __future__ import annotations

import itertools

import pytest
import torch

from padst_compiler.distance import moved, moved_modulo
from padst_compiler.index_map import IndexMap
from padst_compiler.structures import NM, Block, Diagonal, FanIn, Shape, Structure, Unstructured


def maps_onto_itself(structure: Structure, shape: Shape, perm: list[int], side: str) -> bool:
    """Say whether a permutation takes every unit to a unit: from masks, not from ``absorbs``.

    A family is all unions of units with k per group, so it is kept where every group's units go to
    one group's units.
    """
    groups, candidates = structure.table(shape)
    images = {}
    for group, candidate in itertools.product(range(groups), range(candidates)):
        images[unit(structure, shape, group, candidate)] = group
    homes: dict[int, set[int]] = {}
    for positions, group in images.items():
        if side == "input":  # column j of S P is column c with perm[c] = j
            moved = frozenset((r, perm[c]) for r, c in positions)
        else:  # row j of P S is row perm[j]
            moved = frozenset((perm.index(r), c) for r, c in positions)
        if moved not in images:
            return False
        homes.setdefault(group, set()).add(images[moved])
    return all(len(targets) == 1 for targets in homes.values())


def unit(
    structure: Structure, shape: Shape, group: int, candidate: int
) -> frozenset[tuple[int, int]]:
    o, i = shape.out_features, shape.in_features
    if isinstance(structure, Block):
        rows, columns = structure.sides
        if not structure.balanced:
            group, candidate = divmod(candidate, i // columns)
        corner = itertools.product(range(rows), range(columns))
        return frozenset((group * rows + r, candidate * columns + c) for r, c in corner)
    if isinstance(structure, NM):
        row, run = divmod(group, i // structure.m)
        return frozenset({(row, run * structure.m + candidate)})
    if isinstance(structure, Diagonal):
        if o >= i:
            return frozenset(((c + candidate) % o, c) for c in range(i))
        return frozenset((r, (r + candidate) % i) for r in range(o))
    if isinstance(structure, FanIn):
        return frozenset({(group, candidate)})
    return frozenset({divmod(candidate, i)})


CASES = [
    (Block(size=2), Shape(6, 6), "input"),
    (Block(size=3), Shape(3, 6), "input"),
    (Block(size=2), Shape(6, 4), "output"),
    (Block(size=1), Shape(4, 4), "input"),
    (Block(size=2, columns=3), Shape(4, 6), "input"),
    (Block(size=2, columns=3), Shape(4, 6), "output"),
    (Block(size=3, columns=2, balanced=False), Shape(6, 6), "input"),
    (Block(size=2, balanced=False), Shape(6, 4), "output"),
    (NM(m=2), Shape(3, 6), "input"),
    (NM(m=3), Shape(3, 6), "input"),
    (NM(m=6), Shape(3, 6), "input"),
    (NM(m=2), Shape(4, 4), "output"),
    (Diagonal(), Shape(6, 6), "input"),
    (Diagonal(), Shape(5, 5), "output"),
    (Diagonal(), Shape(3, 6), "input"),
    (Diagonal(), Shape(6, 3), "output"),
    (Diagonal(), Shape(6, 4), "input"),  # wraps around the rows: no shift of columns is absorbed
    (Diagonal(), Shape(4, 6), "output"),
    (FanIn(), Shape(3, 5), "input"),
    (FanIn(), Shape(5, 3), "output"),
    (Unstructured(), Shape(3, 5), "input"),
]


@pytest.mark.parametrize(("structure", "shape", "side"), CASES)
def test_it_is_the_minimum_over_the_symmetry_group(
    structure: Structure, shape: Shape, side: str
) -> None:
    size = shape.in_features if side == "input" else shape.out_features
    everything = list(itertools.permutations(range(size)))
    group = [g for g in everything if maps_onto_itself(structure, shape, list(g), side)]
    assert tuple(range(size)) in group
    picks = torch.Generator().manual_seed(0)
    for n in torch.randperm(len(everything), generator=picks)[:200].tolist():
        perm = everything[n]
        least = min(sum(perm[g[j]] != j for j in range(size)) for g in group)
        found = moved_modulo(IndexMap.of(list(perm)), structure, shape, side)
        assert found == pytest.approx(least / size, abs=1e-12), perm
        assert moved(IndexMap.of(list(perm))) == pytest.approx(
            sum(a != b for a, b in enumerate(perm)) / size
        )


@pytest.mark.parametrize(("structure", "shape", "side"), CASES)
def test_the_identity_is_at_zero(structure: Structure, shape: Shape, side: str) -> None:
    size = shape.in_features if side == "input" else shape.out_features
    assert moved_modulo(IndexMap(torch.arange(size)), structure, shape, side) == 0.0
