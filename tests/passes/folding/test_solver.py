import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from padst_compiler.passes.folding import solver
from padst_compiler.passes.folding.solver import LARGE, Table, energy, minimise

Case = tuple[list[Table], dict[tuple[int, int], Table]]


def case(seed: int, *, variables: int, most: int, whole: bool, density: float = 0.5) -> Case:
    """Return a random problem; a tenth of its pairs forbid something."""
    rng = np.random.default_rng(seed)
    counts = [int(rng.integers(1, most + 1)) for _ in range(int(rng.integers(1, variables + 1)))]

    def table(*shape: int) -> Table:
        made: Table = rng.random(shape) * 100 - 20
        return np.round(made) if whole else made

    unary = [table(n) for n in counts]
    pairs = {}
    for i, j in itertools.combinations(range(len(counts)), 2):
        if rng.random() < density:
            pairs[i, j] = table(counts[i], counts[j])
            if rng.random() < 0.1:
                pairs[i, j][rng.random(pairs[i, j].shape) < 0.3] = LARGE
    return unary, pairs


def best(unary: list[Table], pairs: dict[tuple[int, int], Table]) -> float:
    every = itertools.product(*(range(len(t)) for t in unary))
    return min(energy(unary, pairs, values) for values in every)


def check(found: list[int], unary: list[Table], pairs: dict[tuple[int, int], Table]) -> None:
    least = best(unary, pairs)
    slack = 1e-9 if least < LARGE / 2 else LARGE * 1e-9  # where all is forbidden
    assert energy(unary, pairs, found) == pytest.approx(least, abs=slack)


@settings(max_examples=150)
@given(st.integers(0, 2**32 - 1), st.booleans())
def test_minimise_equals_brute_force(seed: int, whole: bool) -> None:
    unary, pairs = case(seed, variables=6, most=4, whole=whole)
    check(minimise(unary, pairs), unary, pairs)


@settings(max_examples=80)
@given(st.integers(0, 2**32 - 1))
def test_eight_variables_of_two_values_equal_brute_force(seed: int) -> None:
    unary, pairs = case(seed, variables=8, most=2, whole=False)
    check(minimise(unary, pairs), unary, pairs)


@pytest.mark.parametrize("seed", range(6))
def test_eight_variables_of_four_values_equal_brute_force(seed: int) -> None:
    unary, pairs = case(seed, variables=8, most=4, whole=False)
    check(minimise(unary, pairs), unary, pairs)


@settings(max_examples=100)
@given(st.integers(0, 2**32 - 1), st.booleans())
def test_the_cut_is_exact_where_costs_favour_agreement(seed: int, whole: bool) -> None:
    unary, pairs = case(seed, variables=8, most=2, whole=whole)
    for key, table in pairs.items():
        if table.shape == (2, 2) and not solver._submodular(table):
            pairs[key] = table[:, ::-1].copy()
    assert all(map(solver._submodular, pairs.values()))
    check(solver._cut(unary, pairs), unary, pairs)


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1))
def test_elimination_is_exact(seed: int) -> None:
    unary, pairs = case(seed, variables=6, most=4, whole=False, density=0.8)
    found = solver._eliminate(unary, pairs)
    assert found is not None
    check(found, unary, pairs)


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1))
def test_expansion_is_valid_and_never_worse_than_its_starts(seed: int) -> None:
    unary, pairs = case(seed, variables=6, most=4, whole=False)
    found = solver._expand(unary, pairs)
    assert all(0 <= v < len(t) for v, t in zip(found, unary, strict=True))
    starts = ([int(t.argmin()) for t in unary], [0] * len(unary))
    assert energy(unary, pairs, found) <= min(energy(unary, pairs, s) for s in starts)
    assert best(unary, pairs) <= energy(unary, pairs, found) + 1e-9


def test_expansion_leaves_a_local_optimum_that_one_label_alone_does_not() -> None:
    agree = np.where(np.eye(3, dtype=bool), 0.0, 10.0)
    unary = [np.array([0.0, 4.0, 1.0]) for _ in range(4)]
    unary[0] = np.array([20.0, 20.0, 0.0])
    pairs = {(i, i + 1): agree for i in range(3)}
    assert solver._expand(unary, pairs) == [2, 2, 2, 2]


def test_tables_that_grow_too_large_are_not_eliminated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solver, "LIMIT", 8)
    unary, pairs = case(3, variables=6, most=4, whole=False, density=1.0)
    unary = [np.zeros(3) for _ in range(5)]
    different = np.eye(3)
    pairs = dict.fromkeys(itertools.combinations(range(5), 2), different)
    assert solver._eliminate(unary, pairs) is None
    assert energy(unary, pairs, minimise(unary, pairs)) <= 10


def test_nothing_to_choose() -> None:
    assert minimise([], {}) == []
    assert minimise([np.zeros(1)], {}) == [0]
