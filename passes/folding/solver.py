"""Minimise a sum of costs over variables with few values: exactly where that is possible.

Two values a variable and costs that favour agreement: a minimum cut. Else variables are
eliminated one by one, which is exact, while the tables stay small (the graphs of networks are
nearly trees). Else expansion moves, each a minimum cut, from the best start.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import networkx as nx
import numpy as np
import numpy.typing as npt

__all__ = ["LARGE", "energy", "minimise"]

Table = npt.NDArray[np.float64]
LARGE = 1e15
"""The cost of what must not be: finite, so that sums stay ordered."""
LIMIT = 1 << 20  # numbers in a table


def energy(
    unary: Sequence[Table], pairs: Mapping[tuple[int, int], Table], values: Sequence[int]
) -> float:
    """Return the cost of an assignment."""
    alone = sum(float(table[values[at]]) for at, table in enumerate(unary))
    return alone + sum(float(t[values[i], values[j]]) for (i, j), t in pairs.items())


def minimise(unary: Sequence[Table], pairs: Mapping[tuple[int, int], Table]) -> list[int]:
    """Return the values of least cost; the first ones where costs are equal.

    Args:
        unary: for each variable the cost of its values.
        pairs: for pairs of variables ``i < j`` a table of costs.

    Example:
        >>> a, b = np.array([0.0, 3.0]), np.array([2.0, 0.0])
        >>> minimise([a, b], {(0, 1): np.array([[0.0, 5.0], [5.0, 0.0]])})
        [0, 0]
    """
    if all(len(table) <= 2 for table in unary) and all(map(_submodular, pairs.values())):
        return _cut(unary, pairs)
    found = _eliminate(unary, pairs)
    return _expand(unary, pairs) if found is None else found


def _submodular(table: Table) -> bool:
    if table.shape != (2, 2):
        return True
    return bool(table[0, 0] + table[1, 1] <= table[0, 1] + table[1, 0])


def _cut(unary: Sequence[Table], pairs: Mapping[tuple[int, int], Table]) -> list[int]:
    """Return the exact minimum by a cut between the sides 0 and 1."""
    cost = np.zeros((len(unary), 2))
    for at, table in enumerate(unary):
        cost[at, : len(table)] = table
        cost[at, len(table) :] = LARGE
    graph = nx.DiGraph()
    graph.add_nodes_from(["zero", "one"])
    for (i, j), given in pairs.items():
        table = np.pad(given, [(0, 2 - n) for n in given.shape], mode="edge")
        a, b, c, d = (float(x) for x in table.flatten())
        cost[i, 1] += c - a
        cost[j, 1] += d - c
        weight = b + c - a - d
        if weight > 0:  # paid where i is 0 and j is 1
            before = graph.get_edge_data(i, j, {"capacity": 0.0})["capacity"]
            graph.add_edge(i, j, capacity=before + weight)
    for at, (zero, one) in enumerate(cost):
        least = min(zero, one)
        graph.add_edge("zero", at, capacity=one - least)
        graph.add_edge(at, "one", capacity=zero - least)
    _, (side, _) = nx.minimum_cut(graph, "zero", "one")
    return [0 if at in side else 1 for at in range(len(unary))]


def _eliminate(unary: Sequence[Table], pairs: Mapping[tuple[int, int], Table]) -> list[int] | None:
    """Return the exact minimum by min-sum elimination, or None where a table grows too large."""
    tables: list[tuple[tuple[int, ...], Table]] = [((at,), t) for at, t in enumerate(unary)]
    tables += list(pairs.items())
    left, back = set(range(len(unary))), []
    near: dict[int, set[int]] = {at: set() for at in left}
    for i, j in pairs:
        near[i].add(j)
        near[j].add(i)
    while left:
        at = min(left, key=lambda v: (math.prod(len(unary[n]) for n in near[v]), v))
        scope = tuple(sorted(near[at]))
        if math.prod(len(unary[n]) for n in (*scope, at)) > LIMIT:
            return None
        total: Table = np.zeros([len(unary[n]) for n in (*scope, at)])
        for names, table in tables:
            if at in names:
                order = [(*scope, at).index(n) for n in names]
                moved = np.transpose(table, np.argsort(order))
                sizes = [1] * total.ndim
                for axis, length in zip(sorted(order), moved.shape, strict=True):
                    sizes[axis] = length
                total = total + moved.reshape(sizes)
        tables = [(names, table) for names, table in tables if at not in names]
        tables.append((scope, total.min(axis=-1)))
        back.append((at, scope, total.argmin(axis=-1)))
        left.remove(at)
        for n in scope:
            near[n] |= set(scope) - {n}
            near[n].discard(at)
    values = [0] * len(unary)
    for at, scope, best in reversed(back):
        values[at] = int(best[tuple(values[n] for n in scope)])
    return values


def _expand(unary: Sequence[Table], pairs: Mapping[tuple[int, int], Table]) -> list[int]:
    """Improve by expansion moves until none helps: good, not proved best."""
    values = [int(table.argmin()) for table in unary]
    zeros = [0] * len(unary)
    best = energy(unary, pairs, values)
    if (start := energy(unary, pairs, zeros)) < best:
        values, best = zeros, start
    improved = True
    while improved:
        improved = False
        for label in range(max(len(table) for table in unary)):
            own = [
                np.array([t[v], t[label] if label < len(t) else LARGE])
                for t, v in zip(unary, values, strict=True)
            ]
            choice = [
                (v, label if label < len(t) else v) for t, v in zip(unary, values, strict=True)
            ]
            both = {}
            for (i, j), table in pairs.items():
                small = table[np.ix_(choice[i], choice[j])].copy()
                excess = small[0, 0] + small[1, 1] - small[0, 1] - small[1, 0]
                small[0, 1] += max(0.0, excess)  # an upper bound: the real cost decides below
                both[i, j] = small
            moves = _cut(own, both)
            proposed = [choice[at][move] for at, move in enumerate(moves)]
            if (cost := energy(unary, pairs, proposed)) < best:
                values, best, improved = proposed, cost, True
    return values
