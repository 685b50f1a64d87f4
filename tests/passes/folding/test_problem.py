import itertools
from collections.abc import Sequence

import pytest
import sympy
import torch

from padst_compiler.index_map import IndexMap
from padst_compiler.passes.folding.problem import (
    ANY,
    Problem,
    apart,
    held_by,
    lifted,
    project,
)

SIZES = (2, 3)
ORDERS = [IndexMap.of(list(p)) for p in itertools.permutations(range(6))]
CASES = [(held, how) for held in [(0,), (1,), (0, 1), (1, 0)] for how in ("any", "still", "alone")]


def digits(place: int, held: Sequence[int]) -> tuple[int, ...]:
    both = (place // 3, place % 3)
    return tuple(both[at] for at in held)


def moves(order: IndexMap, held: Sequence[int]) -> dict[tuple[int, ...], set[tuple[int, ...]]]:
    """Return from where the digits ``held`` come, for all values of the others."""
    found: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
    for place, source in enumerate(order.perm.tolist()):
        found.setdefault(digits(place, held), set()).add(digits(source, held))
    return found


def keeps(order: IndexMap, held: Sequence[int], how: str) -> bool:
    """Say what ``apart`` says by its definition."""
    table = moves(order, held)
    if any(len(sources) > 1 for sources in table.values()):
        return False
    still = all(sources == {place} for place, sources in table.items())
    rest = [at for at in (0, 1) if at not in held]
    blind = all(len(sources) == 1 for sources in moves(order, rest).values())
    return how == "any" or (still and (how == "still" or blind))


@pytest.mark.parametrize(("held", "how"), CASES)
def test_apart_allows_what_the_definition_says_for_every_order(
    held: tuple[int, ...], how: str
) -> None:
    allows = apart(SIZES, held, how)
    allowed = [allows(order) for order in ORDERS]
    assert allowed == [keeps(order, held, how) for order in ORDERS]
    assert any(allowed)


@pytest.mark.parametrize("held", [(0,), (1,), (0, 1), (1, 0)])
def test_a_projection_is_how_digits_move_and_a_lift_has_it(held: tuple[int, ...]) -> None:
    sizes = [SIZES[at] for at in held]
    every = list(itertools.product(*map(range, sizes)))
    for order in ORDERS:
        found, table = project(order, SIZES, held), moves(order, held)
        if found is None:
            assert any(len(sources) > 1 for sources in table.values())
            continue
        assert [{every[at]} for at in found.tolist()] == [table[place] for place in every]
        again = IndexMap(lifted(found, SIZES, held))
        assert torch.equal(torch.as_tensor(project(again, SIZES, held)), found)
        rest = [at for at in (0, 1) if at not in held]
        assert held_by(again, SIZES, rest) == b""


def test_what_is_held_is_told_apart_by_its_numbers() -> None:
    swap, turn = IndexMap.of([3, 4, 5, 0, 1, 2]), IndexMap.of([1, 2, 0, 4, 5, 3])
    assert held_by(swap, SIZES, [1]) == held_by(turn, SIZES, [0]) == b""
    assert held_by(swap, SIZES, [0]) not in (b"", None)
    assert held_by(IndexMap.of([1, 2, 3, 4, 5, 0]), SIZES, [0]) is None
    size = sympy.Symbol("s")
    assert held_by(IndexMap.of([0, 1]), (size, 1), [0]) == b""
    assert held_by(IndexMap.of([1, 0]), (size, 1), [0]) is None


def test_any_allows_every_order_and_a_problem_starts_empty() -> None:
    problem = Problem()
    assert ANY(IndexMap.of([1, 0]))
    assert (problem.edges, problem.endpoints, problem.couplings) == ([], [], [])
