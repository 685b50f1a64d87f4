"""The span budget of structured layers: how many directions a depth can cut (arXiv 2510.14812).

With ReLU the number of linear regions is at least ``prod_l sum_{j <= k_l} C(n_l, j)``, for n_l
neurons that cut the input along k_l independent directions, ``k_l = min(n_l, u_l)``:

    dense, unstructured          u_l = d_0, the inputs of the network
    structured, no permutation   u_l = min(d_0, r): it stalls
    one permutation per layer    u_l = min(d_0, u_{l-1} + r): dense again after ceil(d_0 / r) layers

``r`` is the span of a layer's mask: how many inputs one neuron reads, and one block of them for
blocks. That is the *tied* family of the theory, in which all neurons of a layer cut along the same
r directions. The masks that are trained here are not tied; ``reach`` measures what that changes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

from padst_compiler.structures import Block, Diagonal, Shape, Structure, Unstructured

__all__ = ["budgets", "log2_regions", "overhead", "span"]


def span(structure: Structure, shape: Shape, kept: int, inputs: int | None = None) -> Fraction:
    """Return r, the dimensions that the mask of one layer spans.

    ============================  ===================================================
    block                         the inputs of one block
    diagonal                      K, the number of diagonals
    N:M, constant fan-in          ``alpha d_0`` with alpha = N / M or k / inputs
    unstructured                  d_0
    ============================  ===================================================

    Any other structure counts by its density, as N:M does.

    Args:
        structure: the family of masks.
        shape: the layer's.
        kept: units that each group keeps.
        inputs: d_0, of the network; by default the layer's own.

    Returns:
        An exact fraction: where M does not divide d_0, r is none whole.

    Example:
        >>> from padst_compiler.structures import Diagonal
        >>> square = Shape(768, 768)
        >>> [str(span(Diagonal(), square, Diagonal().kept(square, s))) for s in (0.9, 0.95)]
        ['77', '39']
    """
    inputs = shape.in_features if inputs is None else inputs
    groups, _ = structure.table(shape)
    nnz = groups * kept * structure.unit_size(shape)
    if isinstance(structure, Unstructured):
        return Fraction(inputs)
    if isinstance(structure, Block):
        return Fraction(structure.sides[1])
    if isinstance(structure, Diagonal):
        return Fraction(nnz, min(shape.out_features, shape.in_features))
    return Fraction(nnz, shape.numel) * inputs


def overhead(inputs: int, r: Fraction | int) -> int:
    """Return L_overhead, the layers until dense factors return: ``ceil(d_0 / r)``.

    Args:
        inputs: d_0.
        r: the span of every layer, above 0.

    Example:
        >>> [overhead(768, r) for r in (308, 231, 154, 77, 39)]
        [3, 4, 5, 10, 20]
        >>> [overhead(768, block) for block in (16, 32, 64)]
        [48, 24, 12]
    """
    return math.ceil(Fraction(inputs) / r)


def budgets(inputs: int, spans: Sequence[Fraction | int], mixes: Sequence[bool]) -> list[Fraction]:
    """Return u_l of every layer: ``min(d_0, u_{l-1} + r_l)`` where it mixes, else what it had.

    Args:
        inputs: d_0.
        spans: r of every layer.
        mixes: whether a layer reads its inputs in a new order. A first layer has its own r, and one
            that does not mix at least its own.

    Example:
        >>> [int(u) for u in budgets(10, [4, 4, 4], [True] * 3)]
        [4, 8, 10]
        >>> [int(u) for u in budgets(10, [4, 4, 4], [False] * 3)]
        [4, 4, 4]
    """
    u, found = Fraction(0), []
    for r, mixing in zip(spans, mixes, strict=True):
        u = min(Fraction(inputs), u + r if mixing else max(u, Fraction(r)))
        found.append(u)
    return found


@lru_cache(maxsize=256)
def log2_regions(neurons: int, directions: int) -> float:
    """Return log2 of one layer's factor, ``sum_{j <= k} C(n, j)``.

    Args:
        neurons: n.
        directions: k; from n on the factor is ``2^n``.

    Example:
        >>> log2_regions(10, 10), log2_regions(10, 0)
        (10.0, 0.0)
    """
    if directions >= neurons:
        return float(neurons)
    term = total = 1
    for j in range(1, directions + 1):
        term = term * (neurons - j + 1) // j
        total += term
    return math.log2(total)
