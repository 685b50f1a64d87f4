"""How far a permutation is from doing nothing: as it is, and up to what its structure absorbs.

With G the permutations that a structure absorbs on one side, ``S P`` and ``S g P`` reach the same
weights for every g in G. So what a layer's permutation adds is its distance to the nearest member
of G, not to the identity:

==================  ==============================================  ==========================
structure           G                                               what is counted
==================  ==============================================  ==========================
block, N:M inputs   whole blocks move, features move within them    features that change block
diagonal            cyclic shifts                                   features off the best shift
a vacuous side      everything                                      nothing: 0
==================  ==============================================  ==========================

The structure itself is asked what it absorbs, never its type.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from padst_compiler.index_map import IndexMap
from padst_compiler.layers import SparseLayer
from padst_compiler.permutation import FixedPermutation, SoftPermutation
from padst_compiler.structures import Shape, Structure

__all__ = ["Distances", "distances", "modulo_symmetry", "to_identity"]


class Distances(NamedTuple):
    """Two shares of features, 0 to 1: those that move, and those that move beyond the symmetry."""

    raw: float
    modulo: float


def to_identity(perm: IndexMap) -> float:
    """Return the share of features that move.

    Example:
        >>> to_identity(IndexMap.of([1, 0, 2, 3]))
        0.5
    """
    return 1.0 - _share(perm.perm == torch.arange(perm.size))


def modulo_symmetry(perm: IndexMap, structure: Structure, shape: Shape, side: str) -> float:
    """Return the smallest distance to identity that ``perm`` has up to the structure's symmetry.

    Args:
        perm: of the features on ``side``.
        structure: whose family it is.
        shape: of the layer.
        side: "input" or "output".

    Raises:
        ValueError: no such side, or ``perm`` is not of its features.

    Example:
        >>> from padst_compiler.structures import Block
        >>> whole = IndexMap.of([2, 3, 1, 0])  # two blocks of two change places
        >>> to_identity(whole), modulo_symmetry(whole, Block(size=2), Shape(4, 4), "input")
        (1.0, 0.0)
    """
    if side not in ("input", "output"):
        raise ValueError(f"Expected side 'input' or 'output'. Got {side!r}. Use the layer's side.")
    size = shape.in_features if side == "input" else shape.out_features
    if perm.size != size:
        raise ValueError(
            f"Expected a permutation of {size} features, the {side} of {shape}. Got {perm.size}. "
            "Use the other side, or the layer's own permutation."
        )
    if side in structure.vacuous_sides:
        return 0.0
    absorbs = structure.absorbs_columns if side == "input" else structure.absorbs_rows
    test = partial(absorbs, shape=shape)
    block = _block(size, test)
    return _off_blocks(perm, block, test) if block > 1 else _off_shift(perm, test)


def distances(layer: SparseLayer) -> Distances | None:
    """Return both distances of a layer's permutation, a soft one decoded; None where it has none.

    Decoding costs a linear assignment where argmax is no permutation: O(n^3) at worst.

    Raises:
        ValueError: a soft permutation holds NaN or infinity.
    """
    if isinstance(layer.permutation, FixedPermutation):
        perm = IndexMap.of(layer.permutation.perm)
    elif isinstance(layer.permutation, SoftPermutation):
        perm = layer.permutation.harden()
    else:
        return None
    modulo = modulo_symmetry(perm, layer.structure, layer.shape, layer.side)
    return Distances(to_identity(perm), modulo)


def _share(hits: Tensor) -> float:
    return int(hits.sum()) / max(1, hits.numel())


def _block(size: int, absorbs: Callable[[IndexMap], bool]) -> int:
    """Return how many features shuffle freely among themselves: the largest block, 1 for none."""
    divisors = (d for d in range(size, 1, -1) if size % d == 0)
    return next((d for d in divisors if absorbs(_swap(size, 0, d - 1, 1))), 1)


def _swap(size: int, first: int, second: int, length: int) -> IndexMap:
    """Exchange two runs of ``length`` features."""
    perm = torch.arange(size)
    perm[first : first + length] += second - first
    perm[second : second + length] += first - second
    return IndexMap(perm)


def _off_blocks(perm: IndexMap, block: int, absorbs: Callable[[IndexMap], bool]) -> float:
    """Return the share of features that change block, blocks renamed as far as they may be."""
    count = perm.size // block
    origin, target = perm.perm // block, torch.arange(perm.size) // block
    pairs = (target * count + origin).bincount(minlength=count * count).view(count, count)
    if count > 1 and absorbs(_swap(perm.size, 0, block, block)):
        from scipy.optimize import linear_sum_assignment  # here: it is slow to import

        rows, columns = linear_sum_assignment(pairs.numpy(), maximize=True)
        return 1.0 - int(pairs[rows, columns].sum()) / perm.size
    return 1.0 - int(pairs.diagonal().sum()) / perm.size


def _off_shift(perm: IndexMap, absorbs: Callable[[IndexMap], bool]) -> float:
    """Return the share of features off the best shift that is absorbed; 0 always is."""
    features = torch.arange(perm.size)
    hits = ((perm.perm - features) % perm.size).bincount(minlength=perm.size)
    for shift in hits.argsort(descending=True, stable=True).tolist():
        if shift == 0 or absorbs(IndexMap((features + shift) % perm.size)):
            return 1.0 - int(hits[shift]) / perm.size
    raise AssertionError("The shift by 0 is among them.")
