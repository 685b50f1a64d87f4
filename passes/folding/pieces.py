"""Take maps apart that keep the parts of an axis where they are: one map a part."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from padst_compiler.index_map import IndexMap
from padst_compiler.passes.folding.problem import Edge
from padst_compiler.passes.folding.spaces import Axis, cut_at, leaves

__all__ = ["pieces"]


def pieces(edges: Sequence[Edge]) -> list[Edge]:
    """Cut both sides of maps where one side is cut, and return the maps of the parts.

    A map is taken apart only where it carries what lies before a cut to what lies before it: then
    the order of either side is that of its parts one after the other, and so is what is left.

    Example:
        >>> import torch
        >>> from torch import fx
        >>> from padst_compiler.passes.folding.spaces import Space
        >>> both, perm = (Space(2), Space(2)), IndexMap.of([1, 0, 2, 3])
        >>> edge = Edge(fx.Graph().placeholder("x"), both, (Space(4),), perm, 8.0)
        >>> [part.perm.perm.tolist() for part in pieces([edge])]
        [[1, 0], [0, 1]]
    """
    cut = True
    while cut:
        cut = False
        for edge in edges:
            stops = _stops(edge)
            before = len(leaves(edge.source)) + len(leaves(edge.target))
            if stops and cut_at(edge.source, stops) and cut_at(edge.target, stops):
                cut |= len(leaves(edge.source)) + len(leaves(edge.target)) > before
    return [part for edge in edges for part in _parts(edge, _stops(edge))]


def _stops(edge: Edge) -> list[int]:
    """Return the cuts of either side that a map keeps."""
    cuts: set[int] = set()
    for axis in (edge.source, edge.target):
        sizes = [space.size for space in leaves(axis) if isinstance(space.size, int)]
        if len(sizes) < len(leaves(axis)):
            return []
        cuts |= set(itertools.accumulate(sizes))
    furthest = edge.perm.perm.cummax(0).values if edge.perm.size else edge.perm.perm
    return sorted(b for b in cuts if 0 < b < edge.perm.size and int(furthest[b - 1]) == b - 1)


def _parts(edge: Edge, stops: Sequence[int]) -> list[Edge]:
    if not stops:
        return [edge]
    found, size = [], edge.perm.size
    for start, stop in itertools.pairwise([0, *stops, size]):
        perm = IndexMap(edge.perm.perm[start:stop] - start)
        source, target = (_between(axis, start, stop) for axis in (edge.source, edge.target))
        found.append(Edge(edge.node, source, target, perm, edge.bytes * (stop - start) / size))
    return found


def _between(axis: Axis, start: int, stop: int) -> Axis:
    found, at = [], 0
    for space in leaves(axis):
        assert isinstance(space.size, int)
        if start <= at < stop:
            found.append(space)
        at += space.size
    return tuple(found)
