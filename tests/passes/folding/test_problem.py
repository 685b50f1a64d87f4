import itertools

import pytest
import torch

from padst_compiler.index_map import IndexMap
from padst_compiler.passes.folding.problem import ANY, Problem, apart

HEADS, FEATURES = 2, 3


def keeps(order: IndexMap, how: str) -> bool:
    """Say the same of a tensor of heads x features, by what stands where."""
    table = order.perm.view(HEADS, FEATURES)
    head, feature = table // FEATURES, table % FEATURES
    whole = bool((head == head[:, :1]).all())
    alike = bool((feature == feature[0]).all())
    if how == "heads":
        return whole
    if how == "common":
        return whole and alike
    if how == "outer":
        return whole and bool((feature == torch.arange(FEATURES)).all())
    return whole and bool((head[:, 0] == torch.arange(HEADS)).all())


@pytest.mark.parametrize("how", ["heads", "common", "outer", "inner"])
def test_apart_allows_what_the_definition_says_for_every_order(how: str) -> None:
    allows = apart((HEADS, FEATURES), how)
    orders = [IndexMap.of(list(p)) for p in itertools.permutations(range(HEADS * FEATURES))]
    allowed = [allows(order) for order in orders]
    assert allowed == [keeps(order, how) for order in orders]
    assert 1 < sum(allowed) < len(orders)


def test_any_allows_every_order_and_a_problem_starts_empty() -> None:
    problem = Problem()
    assert ANY(IndexMap.of([1, 0]))
    assert (problem.edges, problem.endpoints, problem.couplings) == ([], [], [])
