"""The C++ kernel of two block layers alone: random shapes against float64, sanitizers, threads."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from .test_block_header import SLOW, THROUGH, builder, run, shared

# Outputs and inputs of the blocks of the first layer and of the second, and the hidden features;
# each has one way to read and to store, so that all pairs of those occur.
SIDES = [(n, n, n, n, hidden) for n, hidden in ((4, 20), (8, 24), (16, 48), (32, 96), (64, 128))]
SIDES += [(16, 8, 8, 16, 64), (48, 12, 16, 24, 96), (8, 24, 64, 16, 48), (128, 16, 32, 128, 128)]
FORMS = [(*sides, at % 3, at % 2) for at, sides in enumerate(SIDES)]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return what compiles the driver in one of the ways, once each."""
    forms = " ".join(f"FORM({', '.join(map(str, (at, *f)))})" for at, f in enumerate(FORMS))
    headers = ("vectors.h", "turn.h", "sums.h", "block.h", "mlp.h")
    return builder(
        shared(tmp_path_factory, "mlp"), headers, f"#define ALL_FORMS {forms}", "mlp_driver.cpp"
    )


class Layer:
    """Random blocks, and the matrix of float64 that they stand for."""

    def __init__(self, rng: np.random.Generator, rows: int, columns: int, r: int, c: int) -> None:
        self.kept = int(rng.integers(0, columns + 1))
        picked = [rng.permutation(columns)[: self.kept] for _ in range(rows)]
        self.indices = np.stack(picked).reshape(rows, self.kept).astype(np.int32)
        self.values = rng.standard_normal((rows, self.kept, c, r)).astype(np.float32)
        self.dense = np.zeros((rows * r, columns * c))
        for at in range(rows):
            for slot, column in enumerate(self.indices[at]):
                here = np.s_[at * r : (at + 1) * r], np.s_[column * c : (column + 1) * c]
                self.dense[here] = self.values[at, slot].T


class Problem:
    """One random call of the kernel, and what float64 says of it."""

    def __init__(self, rng: np.random.Generator, threads: int = 1) -> None:
        form = int(rng.integers(len(FORMS)))
        r1, c1, r2, c2, hidden, read, moved = FORMS[form]
        self.whole = r1 == r2  # tiles of both layers are of as many tokens
        columns, outputs = (int(n) for n in rng.integers(1, 6, 2))
        tokens, biased = int(rng.integers(1, 200)), bool(rng.integers(2))
        one = Layer(rng, hidden // r1, columns, r1, c1)
        two = Layer(rng, outputs, hidden // c2, r2, c2)
        wide = columns * c1
        features = int(rng.integers(1, 2 * wide)) if read == THROUGH else wide
        row = features + int(rng.integers(0, 20))
        memory = rng.standard_normal((tokens - 1) * row + features).astype(np.float32)
        x = np.lib.stride_tricks.as_strided(memory, (tokens, features), (4 * row, 4))
        through = rng.integers(0, features, wide)
        x = (x[:, through] if read == THROUGH else x).astype(np.float64)
        bias = rng.standard_normal(hidden if biased else 0).astype(np.float32)
        between = x @ one.dense.T + (bias if biased else 0.0)
        self.expected = np.where(between > 0, between, -0.5 * between) @ two.dense.T
        numbers = (form, tokens, columns, one.kept, two.kept, outputs, row, features)
        self.bytes = struct.pack("10i", *numbers, biased, threads) + memory.tobytes()
        self.bytes += one.values.tobytes() + two.values.tobytes()
        self.bytes += one.indices.tobytes() + two.indices.tobytes() + bias.tobytes()
        self.bytes += through.tobytes() if read == THROUGH else b""
        if moved:
            to = rng.permutation(self.expected.shape[1])
            self.bytes += to.tobytes()
            self.expected = self.expected[:, to]


def assert_right(program: Path, count: int, threads: int = 1) -> list[tuple[Problem, object]]:
    rng = np.random.default_rng(0)
    problems = [Problem(rng, threads) for _ in range(count)]
    results = run(program, problems)
    for problem, y in zip(problems, results, strict=True):
        scale = max(1.0, float(np.abs(problem.expected).max(initial=0.0)))
        np.testing.assert_allclose(y, problem.expected, rtol=0.0, atol=4e-6 * scale)
    return list(zip(problems, results, strict=True))


def test_five_hundred_random_shapes_agree_with_float64(built: Callable[[str], Path]) -> None:
    assert_right(built("native"), 500)


@pytest.mark.slow
@pytest.mark.parametrize("build", SLOW)
def test_other_builds_agree_too(built: Callable[[str], Path], build: str) -> None:
    for threads in (1, 3):
        assert_right(built(build), 150, threads)


def test_the_number_of_threads_changes_no_bit_of_tiles_that_are_alike(
    built: Callable[[str], Path],
) -> None:
    """Threads have whole tiles of the first layer: of the second too, where both are alike."""
    one = assert_right(built("native"), 60)
    assert any(problem.whole for problem, _ in one)
    for threads in (2, 3, 7):
        for (problem, y), (_, other) in zip(
            one, assert_right(built("native"), 60, threads), strict=True
        ):
            if problem.whole:
                np.testing.assert_array_equal(y, other)
