"""The question that a graph asks: which order for every index space, at what cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import torch
from torch import Tensor, fx

from padst_compiler.index_map import IndexMap
from padst_compiler.passes.folding.factors import Field
from padst_compiler.passes.folding.spaces import Axis, Size, Space, leaves

if TYPE_CHECKING:
    from padst_compiler.passes.folding.rewriting import Rewriter

__all__ = [
    "ANY",
    "Coupling",
    "Edge",
    "Edit",
    "Endpoint",
    "Gather",
    "Near",
    "Problem",
    "apart",
    "held_by",
    "lifted",
    "project",
]

T = TypeVar("T")
Edit: TypeAlias = "Callable[[Rewriter, IndexMap], None]"
Allows: TypeAlias = Callable[[IndexMap], bool]


def ANY(order: IndexMap) -> bool:  # noqa: N802 - a constant that is a function
    """Allow every order."""
    del order
    return True


@dataclass(frozen=True)
class Gather:
    """Where data could be moved: after ``node``, or before ``reader`` reads it."""

    node: fx.Node
    dim: int
    reader: fx.Node | None = None
    bytes: float = 0.0


@dataclass(eq=False)
class Endpoint:
    """What fixes the order of an axis, or follows it.

    Attributes:
        axis: whose order.
        why: said where it stands in a map's way.
        allows: the orders that it follows at no cost; none but the identity by default.
        edit: makes it follow.
        gather: the data movement that would help where it does not.
        absorbs: what is said where it followed a map: the rows of a layer.
    """

    axis: Axis
    why: str
    allows: Allows | None = None
    edit: Edit | None = None
    gather: Gather | None = None
    absorbs: str = ""


@dataclass(eq=False)
class Edge:
    """A permutation in the graph: ``target[j] = source[perm[j]]``."""

    node: fx.Node
    source: Axis
    target: Axis
    perm: IndexMap
    bytes: float


@dataclass(eq=False)
class Coupling:
    """Digits of two fields that must move in one way, seeing no other digit.

    ``held`` and ``other`` name them in one sequence; by default the heads of (heads, features).
    """

    one: Field
    two: Field
    held: tuple[int, ...] = (0,)
    other: tuple[int, ...] = (0,)

    @property
    def sides(self) -> tuple[tuple[Field, tuple[int, ...]], tuple[Field, tuple[int, ...]]]:
        """Both fields with their digits."""
        return (self.one, self.held), (self.two, self.other)


def held_by(order: IndexMap, sizes: Sequence[Size], held: Sequence[int]) -> bytes | None:
    """Return how an order moves digits: b"" for not at all, None where it sees others."""
    numbers = [n for n in sizes if isinstance(n, int)]
    if len(numbers) < len(sizes):
        return b"" if order.is_identity else None
    moved = project(order, numbers, held)
    if moved is None:
        return None
    still = bool((moved == torch.arange(len(moved))).all())
    return b"" if still else moved.numpy().tobytes()


@dataclass
class Problem:
    """All of it."""

    edges: list[Edge] = field(default_factory=list)
    endpoints: list[Endpoint] = field(default_factory=list)
    couplings: list[Coupling] = field(default_factory=list)


class Near:
    """Finds what of a problem stands at some spaces: a search for every map would be quadratic."""

    def __init__(self, problem: Problem) -> None:
        self._endpoints = _by_space((e, (e.axis,)) for e in problem.endpoints)
        self._edges = _by_space((e, (e.source, e.target)) for e in problem.edges)

    def endpoints(self, spaces: Iterable[Space]) -> list[Endpoint]:
        """Return the endpoints at any of the spaces, in the order of the problem."""
        return _found(self._endpoints, spaces)

    def edges(self, spaces: Iterable[Space]) -> list[Edge]:
        """Return the maps that start or end at any of the spaces, in the order of the problem."""
        return _found(self._edges, spaces)


def _by_space(items: Iterable[tuple[T, tuple[Axis, ...]]]) -> dict[Space, dict[int, T]]:
    found: dict[Space, dict[int, T]] = {}
    for at, (item, axes) in enumerate(items):
        for axis in axes:
            for space in leaves(axis):
                found.setdefault(space, {})[at] = item
    return found


def _found(index: dict[Space, dict[int, T]], spaces: Iterable[Space]) -> list[T]:
    near = [found for space in spaces for found in index.get(space, {}).items()]
    return [item for _, item in sorted(dict(near).items())]


def project(order: IndexMap, sizes: Sequence[int], held: Sequence[int]) -> Tensor | None:
    """Return how an order moves the digits ``held``, where it moves them without seeing the others.

    Args:
        order: of ``sizes`` read as one number in mixed radix.
        sizes: of the digits, the most significant first.
        held: digits, in the sequence in which the result reads them.

    Example:
        >>> swap = IndexMap.of([2, 3, 1, 0])
        >>> project(swap, (2, 2), [0]).tolist(), project(swap, (2, 2), [1])
        ([1, 0], None)
    """
    places = _places(sizes, held)
    number = torch.empty(order.size, dtype=torch.int64)
    number[places] = torch.arange(len(places)).unsqueeze(1)
    moved = number[order.perm][places]
    return moved[:, 0].contiguous() if bool((moved == moved[:, :1]).all()) else None


def lifted(perm: Tensor, sizes: Sequence[int], held: Sequence[int]) -> Tensor:
    """Return the map that moves the digits ``held`` by ``perm`` and no other.

    Example:
        >>> lifted(torch.tensor([1, 0]), (2, 2), [0]).tolist()
        [2, 3, 0, 1]
    """
    places = _places(sizes, held)
    moved = torch.empty(places.numel(), dtype=torch.int64)
    moved[places] = places[perm]
    return moved


def _places(sizes: Sequence[int], held: Sequence[int]) -> Tensor:
    """Return all places, in a row those of which the digits ``held`` are the same."""
    rest = [at for at in range(len(sizes)) if at not in held]
    count = math.prod(sizes[at] for at in held)
    every = torch.arange(math.prod(sizes)).view(tuple(sizes))
    return every.permute(*held, *rest).reshape(count, -1)


def apart(sizes: Sequence[int], held: Sequence[int], how: str) -> Allows:
    """Return which orders allow that the digits ``held`` are used apart from the others.

    Args:
        sizes: of the digits.
        held: digits.
        how: "any" where they may move, but must not see the others; "still" where they stay, and
            the others may move in another way for each; "alone" where the others must not see them.

    Example:
        >>> swap = IndexMap.of([0, 1, 3, 2])
        >>> [apart((2, 2), [0], how)(swap) for how in ("any", "still", "alone")]
        [True, True, False]
    """
    rest = [at for at in range(len(sizes)) if at not in held]

    def allows(order: IndexMap) -> bool:
        moved = project(order, sizes, held)
        if moved is None or how == "any":
            return moved is not None
        if how == "alone" and project(order, sizes, rest) is None:
            return False
        return bool((moved == torch.arange(len(moved))).all())

    return allows
