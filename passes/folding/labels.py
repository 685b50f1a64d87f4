"""The orders that are worth trying for every space.

A map between two spaces vanishes where the order of one is that of the other behind the map. So the
orders worth trying for a group of spaces that maps join are those that make one of them the
identity; all others follow from it along the maps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import networkx as nx
import torch

from padst_compiler.index_map import IndexMap
from padst_compiler.passes.folding.problem import Coupling, Edge, Problem, lifted, project
from padst_compiler.passes.folding.spaces import Space, leaves

__all__ = ["Labels", "identity", "joined", "key_of"]

MOST = 96  # orders that one space may choose from
BASES = 6  # orders that one is put together with


class Labels:
    """For every space that a map or a coupling touches the orders to try, the identity first."""

    def __init__(self, problem: Problem) -> None:
        """Find them along the maps."""
        self.of: dict[Space, list[IndexMap]] = {}
        self._seen: dict[Space, set[bytes]] = {}
        graph = nx.MultiGraph()
        wishes: list[tuple[Space, IndexMap]] = []
        for edge in problem.edges:
            source, target = leaves(edge.source), leaves(edge.target)
            if len(source) == len(target) == 1:
                graph.add_edge(source[0], target[0], edge=edge)
            elif len(target) == 1:
                wishes.append((target[0], edge.perm.inverse))
            elif len(source) == 1:
                wishes.append((source[0], edge.perm))
        graph.add_nodes_from(space for space, _ in wishes)
        for group in nx.connected_components(graph):
            self._fill(graph.subgraph(group), [w for w in wishes if w[0] in group])
        for turn in range(4):
            for coupling in problem.couplings[:: 1 if turn % 2 else -1]:
                self._lift(coupling)

    def _fill(self, graph: nx.MultiGraph, wishes: Sequence[tuple[Space, IndexMap]]) -> None:
        spaces = list(graph.nodes)
        root = max(spaces, key=graph.degree)
        along = {root: identity(root.size)}  # the orders that leave no residue on a tree of maps
        for one, two in nx.bfs_edges(graph, root):
            edge: Edge = next(iter(graph.get_edge_data(one, two).values()))["edge"]
            forward = leaves(edge.source)[0] is one
            step = edge.perm.inverse if forward else edge.perm
            along[two] = step.then(along[one])
        shifts = [identity(root.size)]
        shifts += [along[space].inverse for space in spaces]
        shifts += [along[space].inverse.then(order) for space, order in wishes]
        for space in spaces:
            self._add(space, identity(space.size))
            for shift in shifts:
                self._add(space, along[space].then(shift))

    def _add(self, space: Space, order: IndexMap) -> None:
        key, seen = key_of(order), self._seen.setdefault(space, set())
        if key not in seen and len(seen) < MOST:
            seen.add(key)
            self.of.setdefault(space, []).append(order)

    def _lift(self, coupling: Coupling) -> None:
        """Try on either side what moves its digits as an order of the other side moves them."""
        for (field, held), (other, theirs) in (coupling.sides, coupling.sides[::-1]):
            one, two = leaves(field.axis), leaves(other.axis)
            numbers = all(isinstance(n, int) for n in (*field.sizes, *other.sizes))
            if len(one) != 1 or len(two) != 1 or not numbers:
                continue
            sizes: Any = other.sizes
            own: Any = field.sizes
            for order in list(self.of.get(one[0], ())):
                wanted = project(order, own, held)
                if wanted is not None and not order.is_identity:
                    self._add(two[0], identity(two[0].size))
                    for base in self.of[two[0]][:BASES]:
                        present = project(base, sizes, theirs)
                        if present is not None:
                            step = lifted(present.argsort()[wanted], sizes, theirs)
                            self._add(two[0], IndexMap(base.perm[step]))


def joined(orders: Sequence[IndexMap]) -> IndexMap:
    """Return the order of an axis from those of its spaces.

    Example:
        >>> joined([IndexMap.of([1, 0]), IndexMap.of([0, 1])]).perm.tolist()
        [1, 0, 2, 3]
    """
    if len(orders) == 1:
        return orders[0]
    parts, start = [], 0
    for order in orders:
        parts.append(order.perm + start)
        start += order.size
    return IndexMap(torch.cat(parts))


def identity(size: object) -> IndexMap:
    """Return the order that moves nothing; only a number has one."""
    assert isinstance(size, int)
    return IndexMap(torch.arange(size))


def key_of(order: IndexMap) -> bytes:
    """Return what makes two orders equal."""
    return order.perm.numpy().tobytes()
