"""Choose an order for every space: the least bytes moved.

What fixes or follows an order is a cost of one space, a map or a coupling a cost of two; the sum is
minimised for each group of spaces that these join.
"""

from __future__ import annotations

from collections.abc import Iterable

import networkx as nx
import numpy as np

from padst_compiler.index_map import IndexMap
from padst_compiler.passes.folding.labels import Labels, identity, joined, key_of
from padst_compiler.passes.folding.pieces import pieces
from padst_compiler.passes.folding.problem import ANY, Coupling, Edge, Endpoint, Problem, held_by
from padst_compiler.passes.folding.solver import LARGE, Table, minimise
from padst_compiler.passes.folding.spaces import Axis, Space, leaves, total

__all__ = ["Orders", "choose"]

IN_PLACE = 0.9  # a map that stays costs less than one elsewhere: it fuses, and nothing is rebuilt


class Orders:
    """The orders of spaces; the identity where none was chosen."""

    def __init__(self) -> None:
        """Start with the identity everywhere."""
        self._of: dict[Space, IndexMap] = {}

    def set(self, space: Space, order: IndexMap) -> None:
        """Choose an order."""
        self._of[space] = order

    def of(self, axis: Axis) -> IndexMap:
        """Return the order of an axis, that of its spaces one after the other."""
        spaces = leaves(axis)
        if not any(space in self._of for space in spaces):
            size = total(spaces)
            return identity(size if isinstance(size, int) else 0)
        return joined([self._of.get(space) or identity(space.size) for space in spaces])

    def moves(self, axis: Axis) -> bool:
        """Whether an axis has another order than before."""
        return any(s in self._of and not self._of[s].is_identity for s in leaves(axis))


def choose(problem: Problem) -> Orders:
    """Return the orders of least cost."""
    orders = Orders()
    problem = Problem(pieces(problem.edges), problem.endpoints, problem.couplings)
    tried = Labels(problem)
    spaces = list(tried.of)
    if not spaces:
        return orders
    place = {space: at for at, space in enumerate(spaces)}
    unary: list[Table] = [_start(tried.of[space]) for space in spaces]
    pairs: dict[tuple[int, int], Table] = {}
    for endpoint in problem.endpoints:
        axis = leaves(endpoint.axis)
        for space in dict.fromkeys(axis):
            if space in place:
                unary[place[space]] += _endpoint(endpoint, axis, space, tried.of[space])
    for edge in problem.edges:
        _add_edge(edge, tried, place, unary, pairs)
    for coupling in problem.couplings:
        _add_coupling(coupling, tried, place, unary, pairs)
    for group in nx.connected_components(_graph(len(spaces), pairs)):
        members = sorted(group)
        index = {at: i for i, at in enumerate(members)}
        inside = {(index[i], index[j]): t for (i, j), t in pairs.items() if i in index}
        found = minimise([unary[at] for at in members], inside)
        for at, value in zip(members, found, strict=True):
            orders.set(spaces[at], tried.of[spaces[at]][value])
    return orders


def _endpoint(endpoint: Endpoint, axis: Axis, space: Space, orders: list[IndexMap]) -> Table:
    """Return what each order of a space costs at an endpoint."""
    cost = np.zeros(len(orders))
    if not all(isinstance(s.size, int) for s in axis):  # an order needs numbers
        return np.array([0.0 if order.is_identity else LARGE for order in orders])
    if endpoint.allows is ANY:
        return cost
    otherwise = LARGE if endpoint.gather is None else endpoint.gather.bytes
    for at, order in enumerate(orders):
        if not order.is_identity:
            whole = _with(axis, space, order)
            allowed = endpoint.allows is not None and endpoint.allows(whole)
            cost[at] = 0.0 if allowed else otherwise
    return cost


def _add_edge(
    edge: Edge,
    tried: Labels,
    place: dict[Space, int],
    unary: list[Table],
    pairs: dict[tuple[int, int], Table],
) -> None:
    """Add what the residue of a map costs."""
    source, target = leaves(edge.source), leaves(edge.target)
    cost = IN_PLACE * edge.bytes
    one = source[0] if len(source) == 1 else None
    two = target[0] if len(target) == 1 else None
    if one is not None and two is not None and one is not two:
        keys = {key_of(order): at for at, order in enumerate(tried.of[one])}
        table = np.full((len(tried.of[one]), len(tried.of[two])), cost)
        for at, order in enumerate(tried.of[two]):
            match = keys.get(key_of(edge.perm.then(order)))
            if match is not None:
                table[match, at] = 0.0
        _add_pair(pairs, place[one], place[two], table)
    elif one is None and two is not None:
        for at, order in enumerate(tried.of[two]):
            unary[place[two]][at] += 0.0 if edge.perm.then(order).is_identity else cost
    elif two is None and one is not None:
        for at, order in enumerate(tried.of[one]):
            unary[place[one]][at] += 0.0 if key_of(order) == key_of(edge.perm) else cost


def _add_coupling(
    coupling: Coupling,
    tried: Labels,
    place: dict[Space, int],
    unary: list[Table],
    pairs: dict[tuple[int, int], Table],
) -> None:
    """Forbid that the heads of two fields come in different orders."""
    one, two = leaves(coupling.one.axis), leaves(coupling.two.axis)
    single = len(one) == len(two) == 1
    if single and one[0] is two[0]:
        moved = [
            [held_by(order, field.sizes, held) for order in tried.of.get(one[0], ())]
            for field, held in coupling.sides
        ]
        if one[0] in place:
            alike = [a is not None and a == b for a, b in zip(*moved, strict=True)]
            unary[place[one[0]]] += np.where(alike, 0.0, LARGE)
        return
    if single and one[0] in place and two[0] in place:
        moved = [
            [held_by(order, field.sizes, held) for order in tried.of[leaves(field.axis)[0]]]
            for field, held in coupling.sides
        ]
        table = np.where([[a is not None and a == b for b in moved[1]] for a in moved[0]], 0, LARGE)
        _add_pair(pairs, place[one[0]], place[two[0]], table)
        return
    for field, held in coupling.sides:
        axis = leaves(field.axis)
        for space in dict.fromkeys(axis):
            if space in place:
                whole = [_with(axis, space, order) for order in tried.of[space]]
                still = [held_by(order, field.sizes, held) == b"" for order in whole]
                unary[place[space]] += np.where(still, 0.0, LARGE)


def _with(axis: Axis, space: Space, order: IndexMap) -> IndexMap:
    """Return the order of an axis of which only one space moves."""
    if not all(isinstance(s.size, int) for s in axis):
        return order  # alone: no other has numbers
    return joined([order if s is space else identity(s.size) for s in axis])


def _add_pair(pairs: dict[tuple[int, int], Table], i: int, j: int, table: Table) -> None:
    key, given = ((i, j), table) if i < j else ((j, i), table.T)
    pairs[key] = pairs[key] + given if key in pairs else given


def _start(orders: list[IndexMap]) -> Table:
    # Of equal costs the identity is the better one.
    return np.array([0.0 if order.is_identity else 1e-3 for order in orders])


def _graph(count: int, pairs: Iterable[tuple[int, int]]) -> nx.Graph:
    graph = nx.Graph()
    graph.add_nodes_from(range(count))
    graph.add_edges_from(pairs)
    return graph
