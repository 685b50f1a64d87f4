"""Maps that a formula says: they cost no table of indices, and no data dependent load.

A table of numbers is recognised as one of

    affine      perm[j] = (a j + b) mod n            rolls (a = 1), flips (a = -1)
    digits      the digits of j in a mixed radix change places: transposed views, channel shuffles
    blocks      blocks move by such a formula, and each is shuffled within by such a formula

The formula is a sympy expression in ``j``, which composes by substitution.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import sympy
import torch
from torch import Tensor

from padst_compiler.index_map import IndexMap

__all__ = ["J", "Symbolic", "recognise"]

J = sympy.Symbol("j", integer=True, nonnegative=True)


@dataclass(frozen=True)
class Symbolic:
    """A map with its formula.

    Attributes:
        formula: ``perm[j]`` in terms of ``J``.
        moved: computes ``x[..., perm]`` from views, rolls and flips.
    """

    formula: sympy.Expr
    moved: Callable[[Tensor], Tensor]

    def laid_out(self, x: Tensor) -> Tensor:
        """Return ``x[..., perm]`` with the strides that indexing gives."""
        return self.moved(x).contiguous()


def recognise(order: IndexMap) -> Symbolic | None:
    """Return the formula of a map, the simplest first; None for one that has none.

    Example:
        >>> str(recognise(IndexMap.of([2, 3, 0, 1])).formula)
        'Mod(j + 2, 4)'
        >>> shuffle = recognise(IndexMap.of([0, 2, 4, 1, 3, 5]))
        >>> str(shuffle.formula), shuffle.moved(torch.arange(6)).tolist()
        ('2*(Mod(j, 3)) + floor(j/3)', [0, 2, 4, 1, 3, 5])
        >>> recognise(IndexMap.of([0, 3, 1, 2, 5, 4])) is None
        True
    """
    if order.size < 2:
        return None
    return _simple(order) or _blocks(order)


def _affine(order: IndexMap) -> Symbolic | None:
    n, b = order.size, int(order.perm[0])
    a = (int(order.perm[1]) - b) % n
    if a not in (1, n - 1):  # others are as irregular as a table
        return None
    if not torch.equal((a * torch.arange(n) + b) % n, order.perm):
        return None
    if a == 1:
        return Symbolic(sympy.Mod(J + b, n), lambda x: x.roll(-b, -1))
    return Symbolic(sympy.Mod(b - J, n), lambda x: x.flip(-1).roll(b + 1, -1))


def _digits(order: IndexMap) -> Symbolic | None:
    """Recognise digits that change places: sizes and strides, the least significant first."""
    perm, n = order.perm, order.size
    sizes: list[int] = []
    strides: list[int] = []
    done = 1
    while done < n:
        stride = int(perm[done])
        count = 1
        while (count + 1) * done <= n and int(perm[count * done]) == count * stride:
            count += 1
        while count > 1 and n % (done * count):
            count -= 1
        if count < 2:
            return None
        sizes.append(count)
        strides.append(stride)
        done *= count
    places = sorted(range(len(sizes)), key=lambda k: strides[k])
    span = 1
    for k in places:
        if strides[k] != span:
            return None
        span *= sizes[k]
    table = torch.zeros(n, dtype=torch.int64)
    formula: sympy.Expr = sympy.Integer(0)
    below = 1
    for size, stride in zip(sizes, strides, strict=True):
        table += (torch.arange(n) // below) % size * stride
        digit = sympy.floor(J / below)
        formula += stride * (digit if below * size == n else sympy.Mod(digit, size))
        below *= size
    if not torch.equal(table, perm):
        return None
    source = [sizes[k] for k in reversed(places)]  # of x, the most significant digit first
    # Dimension of x that holds each digit of j, the most significant first.
    order_of = [len(sizes) - 1 - places.index(k) for k in reversed(range(len(sizes)))]

    def moved(x: Tensor) -> Tensor:
        lead = x.dim() - 1
        digits = x.unflatten(-1, source)
        placed: Tensor = digits.permute(*range(lead), *(lead + at for at in order_of))
        return placed.flatten(lead)

    return Symbolic(formula, moved)


def _blocks(order: IndexMap) -> Symbolic | None:
    """Recognise blocks that move whole by a formula, or are shuffled within by one, all alike."""
    n = order.size
    for side in (b for b in range(n // 2, 1, -1) if n % b == 0):
        split = order.blocks(side)
        if split is None or not bool((split.inner == split.inner[:1]).all()):
            continue
        outer, inner = _simple(IndexMap(split.outer)), _simple(IndexMap(split.inner[0]))
        if outer is not None and inner is not None:
            return _nested(outer, inner, side)
    return None


def _nested(outer: Symbolic, inner: Symbolic, side: int) -> Symbolic:
    """Return the map that moves blocks by ``outer`` and within each by ``inner``."""
    block, within = sympy.floor(J / side), sympy.Mod(J, side)
    formula = outer.formula.subs(J, block) * side + inner.formula.subs(J, within)

    def moved(x: Tensor) -> Tensor:
        blocks: Tensor = inner.moved(x.unflatten(-1, (-1, side)))
        return outer.moved(blocks.transpose(-1, -2)).transpose(-1, -2).flatten(-2)

    return Symbolic(formula, moved)


def _simple(order: IndexMap) -> Symbolic | None:
    return _affine(order) or _digits(order)
