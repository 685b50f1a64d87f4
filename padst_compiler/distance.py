"""How far a permutation is from the identity, and from all that its structure absorbs.

A structure absorbs a group G of permutations of an axis: with g in G, ``S g`` is again in the
family, so what P does beyond the nearest g is all that P adds. Both distances count features:

    raw       the share of features that P moves
    modulo    the smallest share that ``P g`` moves, over the absorbed g

============================  ======================================================================
absorbed                      modulo
============================  ======================================================================
blocks of b moved whole, and  the share of features that leave their block, blocks renamed at best:
shuffled within (block, N:M)  linear assignment on the ``(n / b)^2`` table of who goes where
cyclic shifts (diagonal)      the share that the nearest shift does not explain
shuffles within residue       the share that the nearest shift of all classes does not explain
classes (diagonal, modulus)
every permutation             0
none but the identity         raw
============================  ======================================================================

What is absorbed is asked of the structure itself (``absorbs_columns``, ``absorbs_rows``).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from padst_compiler.index_map import IndexMap
from padst_compiler.structures import Shape, Structure

__all__ = [
    "moved",
    "moved_between_blocks",
    "moved_between_residues",
    "moved_modulo",
    "moved_off_shift",
]


def moved(perm: IndexMap) -> float:
    """Return the share of features that ``perm`` moves, the distance to the identity.

    Example:
        >>> moved(IndexMap.of([1, 0, 2, 3]))
        0.5
    """
    return float((perm.perm != torch.arange(perm.size)).double().mean()) if perm.size else 0.0


def moved_between_blocks(perm: IndexMap, side: int) -> float:
    """Return the share of features that leave their block, blocks renamed at best.

    It is the smallest ``moved(perm g)`` over all g that move whole blocks and shuffle within them.
    With ``t[u, v]`` features of block u coming from block v, g keeps ``t[u, g(u)]`` in place.

    Args:
        perm: of a number of features that ``side`` divides.
        side: features in a block.

    Raises:
        ValueError: ``side`` does not divide the number of features.

    Example:
        >>> moved_between_blocks(IndexMap.of([3, 2, 0, 1]), 2)  # two blocks, swapped and shuffled
        0.0
        >>> moved_between_blocks(IndexMap.of([0, 2, 1, 3]), 2)  # one feature of each exchanged
        0.5
    """
    if side < 1 or perm.size % side:
        raise ValueError(
            f"Expected blocks that tile {perm.size} features. Got blocks of {side}. "
            "Pass the block size of the structure."
        )
    blocks = perm.size // side
    here = torch.arange(perm.size) // side
    pairs = here * blocks + perm.perm // side
    table = pairs.bincount(minlength=blocks * blocks).view(blocks, blocks)
    from scipy.optimize import linear_sum_assignment  # here: it is slow to import

    rows, columns = linear_sum_assignment(table.numpy(), maximize=True)
    return 1.0 - int(table.numpy()[rows, columns].sum()) / perm.size


def moved_off_shift(perm: IndexMap, step: int = 1) -> float:
    """Return the share of features that the nearest cyclic shift does not explain.

    Args:
        perm: of at least one feature.
        step: only shifts by its multiples count; it divides the number of features.

    Example:
        >>> moved_off_shift(IndexMap.of([1, 2, 3, 0]))
        0.0
        >>> moved_off_shift(IndexMap.of([1, 2, 3, 0]), step=2)
        1.0
    """
    shifts = (perm.perm - torch.arange(perm.size)) % perm.size
    best = shifts.bincount(minlength=perm.size)[::step].max()
    return 1.0 - int(best) / perm.size


def moved_between_residues(perm: IndexMap, modulus: int) -> float:
    """Return the share of features whose residue class moves otherwise than the others' do.

    Args:
        perm: of a number of features that ``modulus`` divides.
        modulus: the number of classes; feature j is in class ``j mod modulus``.

    Example:
        >>> moved_between_residues(IndexMap.of([3, 0, 1, 2]), 2)  # both classes move on by one
        0.0
        >>> moved_between_residues(IndexMap.of([1, 0, 2, 3]), 2)
        0.5
    """
    shifts = (perm.perm - torch.arange(perm.size)) % modulus
    return 1.0 - int(shifts.bincount().max()) / perm.size


def moved_modulo(perm: IndexMap, structure: Structure, shape: Shape, side: str) -> float:
    """Return the smallest share of features that ``perm`` moves beyond what ``structure`` absorbs.

    It is 0 exactly where the structure absorbs ``perm``: then the permutation adds nothing.

    Args:
        perm: of ``in_features`` or ``out_features``, by ``side``.
        structure: the family of masks.
        shape: the layer's.
        side: "input" for ``S (P x)``, "output" for ``P (S x)``.

    Example:
        >>> from padst_compiler.structures import Block, FanIn
        >>> far = IndexMap.of([0, 2, 1, 3])
        >>> shape = Shape(4, 4)
        >>> [moved_modulo(far, kind, shape, "input") for kind in (Block(2), FanIn())]
        [0.5, 0.0]
    """
    if side in structure.vacuous_sides:
        return 0.0
    absorbs = structure.absorbs_columns if side == "input" else structure.absorbs_rows

    def asks(candidate: IndexMap) -> bool:
        return absorbs(candidate, shape)

    if perm.is_identity or asks(perm):
        return 0.0
    found = [moved(perm)]
    found += [moved_between_blocks(perm, block) for block in _blocks(perm.size, asks)]
    found += [moved_between_residues(perm, number) for number in _moduli(perm.size, asks)]
    if (step := _shift_step(perm.size, asks)) is not None:
        found.append(moved_off_shift(perm, step))
    return min(found)


def _blocks(size: int, absorbs: Callable[[IndexMap], bool]) -> list[int]:
    """Return the block sizes whose whole group is absorbed, by the four elements that generate it.

    A swap and a cycle generate the shuffles of the first block, and those of whole blocks.
    """
    return [
        block
        for block in _divisors(size)[1:-1]
        if absorbs(_swap(size, 1))
        and absorbs(_cycle(size, block, 1))
        and absorbs(_swap(size, block))
        and absorbs(_cycle(size, size, block))
    ]


def _moduli(size: int, absorbs: Callable[[IndexMap], bool]) -> list[int]:
    """Return the moduli whose classes may be shuffled within and shifted alike."""
    if not absorbs(_cycle(size, size, 1)):
        return []
    found = []
    for modulus in _divisors(size)[1:-1]:
        order = torch.arange(size).view(-1, modulus)
        swap, cycle = order.clone(), order.clone()
        swap[:2, 0], cycle[:, 0] = order[:2, 0].flip(0), order[:, 0].roll(1)
        if all(absorbs(IndexMap(table.flatten())) for table in (swap, cycle)):
            found.append(modulus)
    return found


def _shift_step(size: int, absorbs: Callable[[IndexMap], bool]) -> int | None:
    """Return the smallest absorbed shift: shifts that are absorbed form a group, its multiples."""
    for step in _divisors(size)[:-1]:
        if absorbs(_cycle(size, size, step)):
            return step
    return None


def _swap(size: int, length: int) -> IndexMap:
    """Exchange the first two runs of ``length`` features."""
    order = torch.arange(size)
    return IndexMap(torch.cat([order[length : 2 * length], order[:length], order[2 * length :]]))


def _cycle(size: int, among: int, step: int) -> IndexMap:
    """Shift the first ``among`` features by ``step``, around."""
    order = torch.arange(size)
    return IndexMap(torch.cat([order[:among].roll(-step), order[among:]]))


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
