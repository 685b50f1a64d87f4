"""What every dimension of a tensor runs over: factors of index spaces.

A view of 768 features as 12 heads of 64 keeps one order of 768: its two dimensions are the two
factors of one field. So transpositions and views move factors about, and an order that mixes the
heads stays possible until somebody uses heads or their features apart.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import sympy

from padst_compiler.passes.folding.spaces import Axis, Size, Space, leaves, total

__all__ = [
    "Dims",
    "Factor",
    "Field",
    "divider",
    "fields_of",
    "fresh",
    "regroup",
    "renewed",
    "settled",
]


@dataclass(eq=False)
class Field:
    """An axis read in mixed radix, the most significant factor first."""

    axis: Axis
    sizes: tuple[Size, ...]

    @property
    def whole(self) -> Factor:
        """The only factor of a field that is not divided."""
        assert len(self.sizes) == 1
        return Factor(self, 0)

    @property
    def key(self) -> tuple[Axis, tuple[Size, ...]]:
        """What makes two fields the same."""
        return leaves(self.axis), self.sizes


@dataclass(frozen=True)
class Factor:
    """Factor ``at`` of a field."""

    field: Field
    at: int

    @property
    def size(self) -> Size:
        """How many values it takes."""
        return self.field.sizes[self.at]

    @property
    def is_whole(self) -> bool:
        """Whether it is the field."""
        return len(self.field.sizes) == 1

    def same(self, other: Factor) -> bool:
        """Whether both are the same factor of the same order."""
        return self.at == other.at and self.field.key == other.field.key


Dims: TypeAlias = tuple[tuple[Factor, ...], ...]
"""For every dimension of a tensor its factors; none where its size is 1."""


def fresh(shape: Sequence[Size]) -> Dims:
    """Return new spaces for every dimension."""
    return tuple(() if n == 1 else (Field((Space(n),), (n,)).whole,) for n in shape)


def fields_of(dims: Iterable[tuple[Factor, ...]]) -> dict[Field, list[int]]:
    """Return the fields in ``dims`` with the factors of each that occur, in order."""
    found: dict[Field, list[int]] = {}
    for factors in dims:
        for factor in factors:
            found.setdefault(factor.field, []).append(factor.at)
    return found


def renewed(dims: Dims) -> Dims:
    """Return ``dims`` with field objects of its own, so that one tensor can stand in twice."""
    copies = {field: Field(field.axis, field.sizes) for field in fields_of(dims)}
    return tuple(tuple(Factor(copies[f.field], f.at) for f in factors) for factors in dims)


def settled(dims: Dims) -> Dims:
    """Return ``dims`` with every field whose factors lie side by side, in order, made whole."""
    joined: dict[Field, Field] = {}
    for factors in dims:
        for start, factor in enumerate(factors):
            parts = len(factor.field.sizes)
            run = factors[start : start + parts]
            if parts > 1 and [(f.field, f.at) for f in run] == [
                (factor.field, at) for at in range(parts)
            ]:
                joined[factor.field] = Field(factor.field.axis, (total(leaves(factor.field.axis)),))
    if not joined:
        return dims
    return tuple(
        tuple(
            Factor(joined[f.field], 0) if f.field in joined else f
            for f in factors
            if f.field not in joined or f.at == 0
        )
        for factors in dims
    )


def regroup(
    dims: Dims, shape: Sequence[Size], fix: Callable[[Sequence[Factor]], None] | None = None
) -> Dims | None:
    """Return what the dimensions of a view run over; None where no factors say it.

    Args:
        dims: of the tensor that is viewed.
        shape: of the view, as many elements.
        fix: is told the factors before and after where none say it for a run of dimensions, as 2 x
            3 seen as 3 x 2; the other dimensions are regrouped. Without it the answer is None.

    Example:
        >>> (rows,), (columns,) = dims = fresh([4, 6])
        >>> heads = regroup(dims, [4, 2, 3])
        >>> [[f.size for f in factors] for factors in heads], heads[1][0].field is heads[2][0].field
        ([[4], [2], [3]], True)
    """
    if 0 in shape:
        return None  # nothing is moved, and a size of nothing says nothing
    queue = [factor for factors in dims for factor in factors]
    done: list[list[Factor]] = []
    at = 0
    while len(done) < len(shape):
        size = shape[len(done)]
        taken: list[Factor] = []
        product: Size = 1
        while product != size:
            factor = queue[at] if at < len(queue) else None
            if factor is not None and _divides(product * factor.size, size):
                taken.append(factor)
                product, at = product * factor.size, at + 1
                continue
            first = _first(factor, product, size)
            if factor is None or first is None:
                break
            divide = divider(factor, first)
            queue = [new for old in queue for new in divide(old)]
            done = [[new for old in part for new in divide(old)] for part in done]
            taken = [new for old in taken for new in divide(old)]
            at = sum(map(len, done)) + len(taken)
        else:
            done.append(taken)
            continue
        start = at - len(taken)
        met = _meeting([f.size for f in queue[start:]], shape[len(done) :])
        if fix is None or met is None:
            return None
        made = fresh(shape[len(done) : len(done) + met[1]])
        mine = [f for factors in made for f in factors]
        fix([*queue[start : start + met[0]], *mine])
        queue[start : start + met[0]] = mine
        done += [list(factors) for factors in made]
        at = start + len(mine)
    return None if at < len(queue) else settled(tuple(tuple(part) for part in done))


def _first(factor: Factor | None, product: Size, size: Size) -> int | None:
    """Return by what to divide a factor so that its first part completes ``size``."""
    if factor is None or not (isinstance(product, int) and isinstance(size, int)):
        return None
    first, here = size // product, factor.size
    divides = size % product == 0 and isinstance(here, int) and here % first == 0
    return first if divides else None


def _meeting(one: Sequence[Size], two: Sequence[Size]) -> tuple[int, int] | None:
    """Return the fewest leading sizes of both with one product."""
    sums = [list(itertools.accumulate(sizes, lambda a, b: a * b)) for sizes in (one, two)]
    for i, product in enumerate(sums[0]):
        for j, other in enumerate(sums[1]):
            if product == other:
                return i + 1, j + 1
    return None


def divider(factor: Factor, first: int) -> Callable[[Factor], list[Factor]]:
    """Return what replaces each factor when one is divided in ``first`` and the rest."""
    field, at = factor.field, factor.at
    assert isinstance(factor.size, int)
    sizes = (*field.sizes[:at], first, factor.size // first, *field.sizes[at + 1 :])
    new = Field(field.axis, sizes)

    def divide(old: Factor) -> list[Factor]:
        if old.field is not field:
            return [old]
        if old.at == at:
            return [Factor(new, at), Factor(new, at + 1)]
        return [Factor(new, old.at + (old.at > at))]

    return divide


def _divides(part: Size, size: Size) -> bool:
    if isinstance(part, int) and isinstance(size, int):
        return size % part == 0
    return bool((sympy.sympify(size) / part).is_integer)
