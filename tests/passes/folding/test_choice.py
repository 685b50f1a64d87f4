import itertools
import random
from typing import Any, cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from padst_compiler.index_map import IndexMap
from padst_compiler.passes.folding.choice import IN_PLACE, Orders, choose
from padst_compiler.passes.folding.factors import Field
from padst_compiler.passes.folding.labels import Labels, identity
from padst_compiler.passes.folding.problem import ANY, Coupling, Edge, Endpoint, Gather, Problem
from padst_compiler.passes.folding.spaces import Space

NODE = cast(Any, None)
FORBIDDEN = 1e12
Assignment = dict[Space, torch.Tensor]


def cost(problem: Problem, orders: Assignment) -> float:
    """Return the bytes that an assignment moves: data[s] of a map's source against its target."""
    spent = 0.0
    for edge in problem.edges:
        source, target = (orders[space] for (space,) in (edge.source, edge.target))
        if not torch.equal(source, edge.perm.perm[target]):
            spent += IN_PLACE * edge.bytes
    for endpoint in problem.endpoints:
        order = IndexMap(orders[endpoint.axis[0]])
        if order.is_identity or (endpoint.allows is not None and endpoint.allows(order)):
            continue
        spent += FORBIDDEN if endpoint.gather is None else endpoint.gather.bytes
    for coupling in problem.couplings:
        one, two = (
            orders[field.axis[0]].view(2, -1) // int(field.sizes[1])
            for field in (coupling.one, coupling.two)
        )
        same = torch.equal(one[:, 0], two[:, 0]) and bool(
            (one == one[:, :1]).all() and (two == two[:, :1]).all()
        )
        spent += 0.0 if same else FORBIDDEN
    return spent


def made(seed: int, *, most: int, size: int, tree: bool) -> tuple[Problem, list[Space]]:
    """Return a random problem; endpoints of trees follow all orders or none."""
    rng, source = random.Random(seed), torch.Generator().manual_seed(seed)
    problem = Problem()
    spaces = [Space(size) for _ in range(rng.randint(2, most))]
    links = [(rng.randrange(at), at) for at in range(1, len(spaces))]
    if not tree:
        pairs = list(itertools.permutations(range(len(spaces)), 2))
        links += rng.choices(pairs, k=rng.randint(0, 4))
    for i, j in links:
        perm = IndexMap(torch.randperm(size, generator=source))
        one, two = rng.sample([spaces[i], spaces[j]], 2)
        problem.edges.append(Edge(NODE, (one,), (two,), perm, float(rng.randint(1, 9))))
    for space in spaces:
        for _ in range(rng.randint(0, 2)):
            gather = Gather(NODE, 0, None, float(rng.randint(1, 9)))
            followed = {tuple(torch.randperm(size, generator=source).tolist()) for _ in range(2)}
            some = lambda order, f=followed: tuple(order.perm.tolist()) in f  # noqa: E731
            allows = rng.choice([None, ANY] if tree else [None, ANY, some])
            given = rng.choice([None, gather])
            problem.endpoints.append(Endpoint((space,), "", allows, gather=given))
    if not tree and size == 4 and rng.random() < 0.5:
        fields = [Field((space,), (2, 2)) for space in rng.sample(spaces, 2)]
        problem.couplings.append(Coupling(fields[0], fields[1]))
    return problem, spaces


def chosen(problem: Problem, spaces: list[Space]) -> float:
    orders = choose(problem)
    return cost(problem, {space: orders.of((space,)).perm for space in spaces})


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_on_trees_no_order_at_all_is_cheaper_of_size_2(seed: int) -> None:
    problem, spaces = made(seed, most=8, size=2, tree=True)
    check_all(problem, spaces, 2)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_on_trees_no_order_at_all_is_cheaper_of_size_3(seed: int) -> None:
    problem, spaces = made(seed, most=4, size=3, tree=True)
    check_all(problem, spaces, 3)


def check_all(problem: Problem, spaces: list[Space], size: int) -> None:
    every = [torch.tensor(p) for p in itertools.permutations(range(size))]
    found = itertools.product(every, repeat=len(spaces))
    least = min(cost(problem, dict(zip(spaces, orders, strict=True))) for orders in found)
    assert chosen(problem, spaces) == pytest.approx(least)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([2, 3, 4]))
def test_on_any_graph_no_order_that_is_tried_is_cheaper(seed: int, size: int) -> None:
    problem, spaces = made(seed, most={2: 8, 3: 5, 4: 4}[size], size=size, tree=False)
    tried = Labels(problem).of
    options = [[order.perm for order in tried.get(s, [identity(size)])] for s in spaces]
    options = [some[: 4 if size > 2 else 2] for some in options]
    found = itertools.product(*options)
    least = min(cost(problem, dict(zip(spaces, orders, strict=True))) for orders in found)
    assert chosen(problem, spaces) <= least + 1e-2  # a tie is broken by less than this


def test_what_costs_nothing_to_keep_is_kept() -> None:
    a, b = Space(3), Space(3)
    perm = IndexMap.of([1, 2, 0])
    orders = choose(Problem(edges=[Edge(NODE, (a,), (b,), perm, 8.0)]))
    moving = [space for space in (a, b) if orders.moves((space,))]
    assert len(moving) == 1  # one side is enough


def test_a_map_that_nothing_follows_stays() -> None:
    a, b = Space(3), Space(3)
    fixed = [Endpoint((space,), "fixed") for space in (a, b)]
    edges = [Edge(NODE, (a,), (b,), IndexMap.of([1, 2, 0]), 8.0)]
    orders = choose(Problem(edges, fixed))
    assert not orders.moves((a,)) and not orders.moves((b,))


def test_a_smaller_movement_elsewhere_is_chosen() -> None:
    a, b = Space(3), Space(3)
    small = Gather(NODE, 0, None, 1.0)
    fixed = [Endpoint((a,), "fixed"), Endpoint((b,), "small", gather=small)]
    edges = [Edge(NODE, (a,), (b,), IndexMap.of([1, 2, 0]), 8.0)]
    assert choose(Problem(edges, fixed)).moves((b,))
    assert not choose(Problem([Edge(NODE, (a,), (b,), edges[0].perm, 1.0)], fixed)).moves((b,))


def test_orders_of_an_axis_are_those_of_its_spaces_one_after_the_other() -> None:
    a, b, orders = Space(2), Space(3), Orders()
    assert orders.of((a, b)).is_identity and not orders.moves((a, b))
    orders.set(b, IndexMap.of([2, 0, 1]))
    assert orders.of((a, b)).perm.tolist() == [0, 1, 4, 2, 3]
    assert orders.moves((a, b)) and not orders.moves((a,))
    assert choose(Problem()).of((a,)).is_identity
