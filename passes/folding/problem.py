"""The question that a graph asks: which order for every index space, at what cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import fx

from padst_compiler.index_map import IndexMap
from padst_compiler.passes.folding.factors import Field
from padst_compiler.passes.folding.spaces import Axis

if TYPE_CHECKING:
    from padst_compiler.passes.folding.rewriting import Rewriter

__all__ = ["ANY", "Coupling", "Edge", "Edit", "Endpoint", "Gather", "Problem", "apart"]

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
    """Two fields of (heads, features) whose heads must keep one order."""

    one: Field
    two: Field


@dataclass
class Problem:
    """All of it."""

    edges: list[Edge] = field(default_factory=list)
    endpoints: list[Endpoint] = field(default_factory=list)
    couplings: list[Coupling] = field(default_factory=list)


def apart(sizes: tuple[int, int], how: str) -> Allows:
    """Return which orders of ``heads x features`` allow that the two are used apart.

    Args:
        sizes: heads, features of each.
        how: "heads" where whole heads are told apart and features follow them; "common" where
            features are told apart for all heads alike; "outer" where only heads may move, "inner"
            where only features within their head may.

    Example:
        >>> swap = IndexMap.of([2, 3, 1, 0])
        >>> [apart((2, 2), how)(swap) for how in ("heads", "common", "outer", "inner")]
        [True, False, False, False]
    """
    heads, features = sizes

    def allows(order: IndexMap) -> bool:
        split = order.blocks(features)
        if split is None:
            return False
        if how == "common":
            return bool((split.inner == split.inner[0]).all())
        if how == "outer":
            return bool((split.inner == torch.arange(features)).all())
        return how == "heads" or bool((split.outer == torch.arange(heads)).all())

    return allows
