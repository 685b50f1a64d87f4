"""The C++ kernels of gradients alone: random shapes against float64, sanitizers, narrow vectors."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from padst_compiler.structures import NM, Diagonal, FanIn, Shape, Structure

from .test_block_header import SLOW, assert_right, assert_same, builder, shared

KINDS = ("dx", "dw", "diagonal", "picked")
WIDTHS = (64, 48, 16, 4)  # stored at once
PICKED = [(16, 2, 12), (16, 1, 3), (10, 2, 7), (32, 3, 4), (4, 2, 9), (8, 5, 2), (32, 12, 1)]
HEADERS = (
    *("vectors.h", "turn.h", "sums.h", "features.h", "feature_gradient.h", "diagonal_gradient.h"),
    *("select.h", "select_gradient.h"),
)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return what compiles the driver in one of the ways, once each."""
    forms = (f"FORM({at}, {', '.join(map(str, form))})" for at, form in enumerate(PICKED))
    cases = f"#define ALL_FORMS {' '.join(forms)}"
    return builder(shared(tmp_path_factory, "gradients"), HEADERS, cases, "gradients_driver.cpp")


class Problem:
    """One random call of a kernel, and what float64 says of it."""

    def __init__(self, rng: np.random.Generator, kind: str, threads: int = 1) -> None:
        form, shape, structure = self.layer(rng, kind)
        tokens = int(rng.choice([1, int(rng.integers(1, 80)), int(rng.integers(200, 460))]))
        torch.manual_seed(int(rng.integers(1 << 30)))
        dense = torch.randn(shape.out_features, shape.in_features)
        indices = structure.select(dense, structure.kept(shape, float(rng.uniform(0.3, 0.95))))
        if not isinstance(structure, Diagonal):  # in any order
            indices = indices[..., torch.randperm(indices.shape[-1])].contiguous()
        values = structure.pack(dense, indices)
        o, i = shape.out_features, shape.in_features
        groups = indices.shape[1] if isinstance(structure, NM) else 1
        through, moved = (kind == "dx" and bool(b) for b in rng.integers(0, 2, 2))
        features = int(rng.integers(1, 2 * o)) if through else o
        x, x_memory = self.rows(rng, tokens, i)
        grad, grad_memory = self.rows(rng, tokens, features)
        in_map, out_map = rng.integers(0, features, o), rng.permutation(i)
        if kind == "dx":
            weight = structure.unpack(values.double(), indices, shape).numpy()
            y = (grad[:, in_map] if through else grad).astype(np.float64) @ weight
            self.expected = y[:, out_map] if moved else y
        else:
            full = torch.from_numpy(grad.T.astype(np.float64) @ x.astype(np.float64))
            self.expected = structure.pack(full, indices).numpy()
        numbers = [KINDS.index(kind), form, tokens, o, i, groups, indices.shape[-1]]
        numbers += [x_memory[1], grad_memory[1], features, 0, through, moved, threads]
        self.bytes = struct.pack("14i", *map(int, numbers))
        self.bytes += b"" if kind == "dx" else x_memory[0].tobytes()
        self.bytes += grad_memory[0].tobytes() + indices.to(torch.int32).numpy().tobytes()
        if kind == "dx":
            self.bytes += values.numpy().tobytes() + (in_map.tobytes() if through else b"")
            self.bytes += out_map.tobytes() if moved else b""

    @staticmethod
    def layer(rng: np.random.Generator, kind: str) -> tuple[int, Shape, Structure]:
        """Return a form of the kernel, and a layer that it is for."""
        many = 16 * int(rng.integers(1, 40))
        if kind == "picked":
            at = int(rng.integers(len(PICKED)))
            width, each, groups = PICKED[at]
            return at, Shape(16 * int(rng.integers(1, 6)), width * groups), NM(width, each)
        if kind == "diagonal":
            n = int(rng.choice(WIDTHS))
            sides = [n * int(rng.integers(1, 4))]
            sides.append(sides[0] + int(rng.choice([0, int(rng.integers(0, 150))])))
            first = int(rng.integers(2))
            return n, Shape(sides[first], sides[1 - first]), Diagonal()
        other = int(rng.choice([int(rng.integers(1, 60)), int(rng.integers(800, 1000))]))
        outputs, inputs = (other, many) if kind == "dx" else (16 * int(rng.integers(1, 5)), other)
        width = next(m for m in (10, 7, 4, 3, 2, 1) if inputs % m == 0)
        return 0, Shape(outputs, inputs), FanIn() if rng.integers(2) else NM(width)

    @staticmethod
    def rows(
        rng: np.random.Generator, tokens: int, features: int
    ) -> tuple[np.ndarray[tuple[int, int]], tuple[np.ndarray[tuple[int]], int]]:
        """Return random rows, and the memory that they lie in with how far they are apart."""
        row = features + int(rng.integers(0, 20))
        memory = rng.standard_normal((tokens - 1) * row + features).astype(np.float32)
        return np.lib.stride_tricks.as_strided(memory, (tokens, features), (4 * row, 4)), (
            memory,
            row,
        )


def some_of(kind: str, count: int, seed: int = 0, threads: int = 1) -> list[Problem]:
    rng = np.random.default_rng(seed)
    return [Problem(rng, kind, threads) for _ in range(count)]


@pytest.mark.parametrize("kind", KINDS)
def test_five_hundred_random_shapes_agree_with_float64(
    built: Callable[[str], Path], kind: str
) -> None:
    assert_right(built("native"), some_of(kind, 500))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("build", SLOW)
def test_other_builds_agree_too(built: Callable[[str], Path], kind: str, build: str) -> None:
    assert_right(built(build), some_of(kind, 150))


@pytest.mark.parametrize("kind", KINDS)
def test_the_number_of_threads_changes_no_bit(built: Callable[[str], Path], kind: str) -> None:
    assert_same(built("native"), lambda threads: some_of(kind, 40, 1, threads))
