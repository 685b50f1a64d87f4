"""Symmetries as sets: which weights a family reaches with a permutation, and which without.

Everything is written down, mask by mask: a family of masks is a set of sets of places. Nothing of
the library's own rules is used but ``absorbs_columns`` and ``absorbs_rows``, which are judged.
"""

from collections.abc import Iterator
from itertools import combinations, permutations, product

import pytest

from padst_compiler.index_map import IndexMap
from padst_compiler.structures import NM, Block, Diagonal, FanIn, Shape, Structure, Unstructured

Place = tuple[int, int]
Mask = frozenset[Place]


def units(structure: Structure, o: int, i: int) -> list[list[Mask]]:
    """Return the places of every candidate, by group; from the papers' words."""
    rows, columns = range(o), range(i)
    if isinstance(structure, Block):
        b = structure.size
        parts = [(range(r, r + b), range(c, c + b)) for r in rows[::b] for c in columns[::b]]
        flat = [frozenset(product(*part)) for part in parts]
        return [flat[at : at + i // b] for at in range(0, len(flat), i // b)]
    if isinstance(structure, NM):
        m = structure.m
        return [[frozenset({(r, c + j)}) for j in range(m)] for r in rows for c in columns[::m]]
    if isinstance(structure, Diagonal):
        if o >= i:
            return [[frozenset(((c + d) % o, c) for c in columns) for d in range(o)]]
        return [[frozenset((r, (r + d) % i) for r in rows) for d in range(i)]]
    if isinstance(structure, FanIn):
        return [[frozenset({(r, c)}) for c in columns] for r in rows]
    assert isinstance(structure, Unstructured)
    return [[frozenset({place}) for place in product(rows, columns)]]


def family(structure: Structure, shape: Shape, kept: int) -> set[Mask]:
    groups = units(structure, shape.out_features, shape.in_features)
    choices = [[frozenset().union(*c) for c in combinations(group, kept)] for group in groups]
    return {frozenset().union(*parts) for parts in product(*choices)}


def moved(mask: Mask, order: tuple[int, ...], side: str) -> Mask:
    """Return the mask of ``P S`` (rows) or ``S P`` (columns), where ``(P x)_j = x_order[j]``."""
    if side == "columns":  # column j of S reads input order[j]
        return frozenset((r, order[c]) for r, c in mask)
    back = {source: at for at, source in enumerate(order)}
    return frozenset((back[r], c) for r, c in mask)


def absorbed(masks: set[Mask], size: int, side: str) -> Iterator[tuple[int, ...]]:
    for order in permutations(range(size)):
        if all(moved(mask, order, side) in masks for mask in masks):
            yield order


# Families in which every permutation that is absorbed has to be known to be: not all kept, more
# than one row and column, and for diagonals a square.
EXACT: list[tuple[Structure, Shape, int]] = [
    (Block(2), Shape(4, 6), 1),
    (Block(2), Shape(6, 4), 1),
    (Block(3), Shape(6, 6), 1),
    (NM(2), Shape(2, 6), 1),
    (NM(3), Shape(2, 6), 2),
    (Diagonal(), Shape(5, 5), 1),
    (Diagonal(), Shape(5, 5), 2),
    (Diagonal(), Shape(6, 6), 2),
    (FanIn(), Shape(3, 5), 2),
    (FanIn(), Shape(5, 3), 1),
    (Unstructured(), Shape(2, 5), 3),
    (Unstructured(), Shape(5, 2), 4),
]


@pytest.mark.parametrize("side", ["rows", "columns"])
@pytest.mark.parametrize(("structure", "shape", "kept"), EXACT, ids=str)
def test_exactly_the_absorbed_permutations_map_the_family_onto_itself(
    structure: Structure, shape: Shape, kept: int, side: str
) -> None:
    masks = family(structure, shape, kept)
    size = shape.out_features if side == "rows" else shape.in_features
    free = set(absorbed(masks, size, side))
    said = structure.absorbs_rows if side == "rows" else structure.absorbs_columns
    assert free == {o for o in permutations(range(size)) if said(IndexMap.of(list(o)), shape)}
    vacuous = {"rows": "output", "columns": "input"}[side] in structure.vacuous_sides
    assert (len(free) == len(list(permutations(range(size))))) == vacuous
    for order in free:  # a finite family that goes into itself goes onto itself
        assert {moved(mask, order, side) for mask in masks} == masks


VACUOUS: list[tuple[Structure, Shape, int]] = [
    (FanIn(), Shape(2, 4), 2),
    (FanIn(), Shape(3, 3), 1),
    (Unstructured(), Shape(2, 3), 2),
    (Unstructured(), Shape(3, 3), 4),
]
USEFUL: list[tuple[Structure, Shape, int]] = [
    (Block(2), Shape(4, 4), 1),
    (NM(2), Shape(2, 4), 1),
    (Diagonal(), Shape(4, 4), 1),
]


def reachable(structure: Structure, shape: Shape, kept: int, permuted: bool) -> set[Mask]:
    """Return the supports of all weights ``S P``: the values in them are free either way."""
    masks = family(structure, shape, kept)
    orders = permutations(range(shape.in_features)) if permuted else [tuple(range(99))]
    return {moved(mask, order, "columns") for order in orders for mask in masks}


@pytest.mark.parametrize(("structure", "shape", "kept"), VACUOUS, ids=str)
def test_a_column_permutation_reaches_no_new_weight_in_fan_in_and_unstructured_layers(
    structure: Structure, shape: Shape, kept: int
) -> None:
    assert reachable(structure, shape, kept, True) == reachable(structure, shape, kept, False)


@pytest.mark.parametrize(("structure", "shape", "kept"), USEFUL, ids=str)
def test_it_reaches_more_in_the_others(structure: Structure, shape: Shape, kept: int) -> None:
    assert reachable(structure, shape, kept, True) > reachable(structure, shape, kept, False)


def test_shifts_and_units_act_on_both_sides_of_a_square_diagonal_family() -> None:
    """``i -> a i mod n`` on both sides keeps the family; on one side alone it does not."""
    n = 5
    masks = family(Diagonal(), Shape(n, n), 2)
    for a, shift in product(range(1, n), range(n)):
        order = tuple((a * j + shift) % n for j in range(n))
        back = tuple(order.index(j) for j in range(n))  # (r, c) goes to (order[r], order[c])
        both = {moved(moved(mask, order, "columns"), back, "rows") for mask in masks}
        assert both == masks
        assert ({moved(mask, order, "columns") for mask in masks} == masks) == (a == 1)
