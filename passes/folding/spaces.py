"""Index spaces: sets of positions whose order is free until something fixes it.

Axes of different tensors that must keep one order share a space. An axis is a sequence of spaces
(after a concatenation), and a space is cut in parts where a slice or a split needs it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import sympy
import torch

__all__ = ["Axis", "Size", "Space", "cut_at", "leaves", "size_of", "total", "unify"]

Size: TypeAlias = "int | sympy.Expr"


@dataclass(eq=False)
class Space:
    """One index space; ``merged`` and ``parts`` say what became of it."""

    size: Size
    merged: Space | None = None
    parts: tuple[Space, ...] = ()


Axis: TypeAlias = tuple[Space, ...]


def size_of(length: int | torch.SymInt) -> Size:
    """Return a length as a number or a symbol; comparing these adds no guard to the capture."""
    if isinstance(length, torch.SymInt):
        expression: sympy.Expr = length.node.expr
        return int(expression) if expression.is_number else expression
    return length


def leaves(axis: Iterable[Space]) -> Axis:
    """Return the spaces that stand for ``axis`` now."""
    found: list[Space] = []
    stack = list(reversed(tuple(axis)))
    while stack:
        space = stack.pop()
        if space.merged is not None:
            stack.append(space.merged)
        elif space.parts:
            stack.extend(reversed(space.parts))
        else:
            found.append(space)
    return tuple(found)


def total(axis: Iterable[Space]) -> Size:
    """Return the length of ``axis``."""
    return sum((space.size for space in axis), start=0)


def unify(one: Axis, two: Axis) -> bool:
    """Make two axes keep one order; return whether their sizes allow it.

    Example:
        >>> whole, left, right = Space(6), Space(2), Space(4)
        >>> unify((whole,), (left, right)), leaves((whole,)) == leaves((left, right))
        (True, True)
    """
    if total(one) != total(two):
        return False
    a, b = list(reversed(leaves(one))), list(reversed(leaves(two)))
    while a and b:
        x, y = _top(a), _top(b)
        if x is y or x.size == y.size:
            if x is not y:
                y.merged = x
            a.pop()
            b.pop()
        elif isinstance(x.size, int) and isinstance(y.size, int):
            large, small = (x, y) if x.size > y.size else (y, x)
            assert isinstance(large.size, int) and isinstance(small.size, int)
            large.parts = (Space(small.size), Space(large.size - small.size))
        else:
            return False  # symbols that nobody can order
    return True


def cut_at(axis: Axis, positions: Sequence[int]) -> bool:
    """Cut the spaces of ``axis`` so that ``positions`` lie between them; return whether it worked.

    Example:
        >>> axis = (Space(6),)
        >>> cut_at(axis, [2, 4]), [space.size for space in leaves(axis)]
        (True, [2, 2, 2])
    """
    if not all(isinstance(space.size, int) for space in leaves(axis)):
        return False
    for position in positions:
        start = 0
        for space in leaves(axis):
            assert isinstance(space.size, int)
            if start < position < start + space.size:
                space.parts = (Space(position - start), Space(start + space.size - position))
                break
            start += space.size
    return True


def _top(stack: list[Space]) -> Space:
    """Return the top of a stack of spaces, resolved."""
    stack.extend(reversed(leaves([stack.pop()])))
    return stack[-1]
