"""Divide the factors of paired dimensions until they lie side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

from torch import fx

from padst_compiler.passes.folding.factors import Factor, divider

__all__ = ["Side", "refined"]

Side: TypeAlias = tuple[tuple[Factor, ...], "fx.Node | None", int]
"""The factors of one dimension of one operand; no operand where the result runs over them too.

Data that is moved back before its reader leaves the reader's result in the old order: so it helps
only where the result does not run over these factors.
"""


def refined(pairs: Sequence[tuple[Side, Side]]) -> list[tuple[Side, Side]]:
    """Return ``pairs`` with factors divided where that makes the sizes of both sides equal.

    A factor is divided wherever it stands. Sizes that no division makes equal are left.

    Example:
        >>> from padst_compiler.passes.folding.factors import fresh
        >>> (four,), (two,), (more,) = fresh([4, 2, 2])
        >>> ((one, other),) = refined([(((four,), None, 0), ((two, more), None, 0))])
        >>> [f.size for f in one[0]], [f.size for f in other[0]]
        ([2, 2], [2, 2])
    """
    sides = [list(side[0]) for pair in pairs for side in pair]
    at = 0
    while at < len(sides):
        found = _uneven(sides[at], sides[at + 1])
        if found is None:
            at += 2
        else:
            divide = divider(*found)
            sides = [[new for old in side for new in divide(old)] for side in sides]
            at = 0
    return [
        ((tuple(sides[2 * i]), *one[1:]), (tuple(sides[2 * i + 1]), *two[1:]))
        for i, (one, two) in enumerate(pairs)
    ]


def _uneven(one: Sequence[Factor], two: Sequence[Factor]) -> tuple[Factor, int] | None:
    """Return the first factor that is too large, and by what to divide it."""
    for f, g in zip(one, two, strict=False):
        if f.size != g.size:
            if not isinstance(f.size, int) or not isinstance(g.size, int):
                return None
            large, small = (f, g) if f.size > g.size else (g, f)
            assert isinstance(large.size, int) and isinstance(small.size, int)
            return None if large.size % small.size else (large, small.size)
    return None
