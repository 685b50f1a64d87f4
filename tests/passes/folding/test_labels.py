from typing import Any, cast

import pytest
import sympy
import torch

from padst_compiler.index_map import IndexMap
from padst_compiler.passes.folding.factors import Field
from padst_compiler.passes.folding.labels import MOST, Labels, identity, joined, key_of
from padst_compiler.passes.folding.problem import Coupling, Edge, Problem
from padst_compiler.passes.folding.spaces import Axis, Space

NODE = cast(Any, None)
SWAP, TURN = IndexMap.of([1, 0, 2]), IndexMap.of([1, 2, 0])


def edge(source: Axis, target: Axis, perm: IndexMap) -> Edge:
    return Edge(NODE, source, target, perm, 1.0)


def tried(problem: Problem, space: Space) -> list[list[int]]:
    return [order.perm.tolist() for order in Labels(problem).of[space]]


def test_one_map_gives_each_side_the_order_behind_it() -> None:
    a, b = Space(3), Space(3)
    problem = Problem(edges=[edge((a,), (b,), TURN)])
    assert [0, 1, 2] == tried(problem, a)[0] == tried(problem, b)[0]
    assert TURN.perm.tolist() in tried(problem, a)
    assert TURN.inverse.perm.tolist() in tried(problem, b)


def test_a_chain_gives_the_end_the_product_of_its_maps() -> None:
    a, b, c = Space(3), Space(3), Space(3)
    problem = Problem(edges=[edge((a,), (b,), TURN), edge((b,), (c,), SWAP)])
    assert TURN.then(SWAP).perm.tolist() in tried(problem, a)
    assert TURN.then(SWAP).inverse.perm.tolist() in tried(problem, c)


def test_an_axis_of_several_spaces_wishes_for_what_cancels_its_map() -> None:
    a, b, c = Space(1), Space(2), Space(3)
    problem = Problem(edges=[edge((a, b), (c,), TURN)])
    labels = Labels(problem)
    assert list(labels.of) == [c]
    assert TURN.inverse.perm.tolist() in [o.perm.tolist() for o in labels.of[c]]


def test_a_coupling_lifts_the_order_of_heads_and_ignores_mixed_ones() -> None:
    a, b, q, r = Space(4), Space(4), Space(6), Space(4)
    heads, mixed = IndexMap.of([2, 3, 0, 1]), IndexMap.of([1, 2, 3, 0])
    couplings = [Coupling(Field((a,), (2, 2)), Field((q,), (2, 3)))]
    problem = Problem(edges=[edge((a,), (b,), heads)], couplings=couplings)
    assert tried(problem, q) == [[0, 1, 2, 3, 4, 5], [3, 4, 5, 0, 1, 2]]
    problem = Problem(edges=[edge((a,), (r,), mixed)], couplings=couplings)
    # Turned twice the map keeps heads whole; once it mixes them.
    assert q not in Labels(problem).of


def test_many_maps_stay_within_the_limit() -> None:
    source = torch.Generator().manual_seed(0)
    hub, problem = Space(8), Problem()
    for _ in range(2 * MOST):
        perm = IndexMap(torch.randperm(8, generator=source))
        problem.edges.append(edge((hub,), (Space(8),), perm))
    labels = Labels(problem)
    assert max(len(orders) for orders in labels.of.values()) == MOST
    assert all(orders[0].is_identity for orders in labels.of.values())


def test_identity_joined_and_key_of() -> None:
    assert identity(3).is_identity
    assert joined([SWAP]) is SWAP
    assert joined([SWAP, TURN]).perm.tolist() == [1, 0, 2, 4, 5, 3]
    assert key_of(SWAP) == key_of(SWAP.inverse) != key_of(TURN)
    with pytest.raises(AssertionError):
        identity(sympy.Symbol("s0"))
