"""Pairs of bf16 in the C++ kernel: random shapes against float64, and the instruction itself.

The build for this machine multiplies with AVX-512 BF16 where the machine does; elsewhere only the
compiler is asked for it.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from .test_block_header import KINDS, SLOW, assert_right, assert_same, builder, shared

LINEAR = KINDS.index("linear")
SIDES = [(16, 2), (16, 16), (32, 32), (64, 8), (128, 64), (48, 12), (8, 6), (4, 4)]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return what compiles the driver in one of the ways, once each."""
    sides = " ".join(f"SIDES({rows}, {columns // 2})" for rows, columns in SIDES)
    headers = ("vectors.h", "turn.h", "sums.h", "block.h")
    cases = f"#define MATH Pairs\n#define ALL_SIDES {sides}"
    return builder(shared(tmp_path_factory, "pairs"), headers, cases, "block_driver.cpp")


def bf16(rng: np.random.Generator, *shape: int) -> npt.NDArray[np.uint16]:
    """Return random numbers of bf16, by their bits."""
    return (rng.standard_normal(shape).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def exact(numbers: npt.NDArray[np.uint16]) -> npt.NDArray[np.float64]:
    return (numbers.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


class Problem:
    """One random call of the kernel, and what float64 says of it."""

    def __init__(self, rng: np.random.Generator, threads: int = 1) -> None:
        r, c = SIDES[rng.integers(len(SIDES))]
        rows, columns = (int(n) for n in rng.integers(1, 6, 2))
        kept, tokens = int(rng.integers(0, columns + 1)), int(rng.integers(1, 90))
        read, moved = int(rng.choice([0, 1, 3])), bool(rng.integers(2))  # here, apart, through
        features = 2 * int(rng.integers(1, 200)) if read == 3 else columns * c
        x, values = bf16(rng, tokens, features), bf16(rng, rows, kept, c, r)
        in_map = rng.integers(0, features, columns * c) if read == 3 else np.arange(features)
        picked = [rng.permutation(columns)[:kept] for _ in range(rows)]
        indices = np.stack(picked).reshape(rows, kept).astype(np.int32)
        dense = np.zeros((rows * r, columns * c))
        for at in range(rows):
            for slot, column in enumerate(indices[at]):
                here = np.s_[at * r : (at + 1) * r], np.s_[column * c : (column + 1) * c]
                dense[here] = exact(values[at, slot]).T
        self.expected = exact(x)[:, in_map] @ dense.T
        pairs = values.reshape(rows, kept, c // 2, 2, r).swapaxes(-1, -2)
        row = features // 2
        numbers = (LINEAR, r, c // 2, tokens, rows, kept, columns, row, read, row, moved, threads)
        self.bytes = struct.pack("12i", *numbers)
        self.bytes += x.tobytes() + pairs.tobytes() + indices.tobytes()
        self.bytes += in_map.tobytes() if read == 3 else b""
        if moved:
            to = rng.permutation(rows * r)
            self.bytes += to.tobytes()
            self.expected = self.expected[:, to]


def some(count: int, seed: int = 0, threads: int = 1) -> list[Problem]:
    rng = np.random.default_rng(seed)
    return [Problem(rng, threads) for _ in range(count)]


def test_five_hundred_random_shapes_agree_with_float64(built: Callable[[str], Path]) -> None:
    assert_right(built("native"), some(500))


@pytest.mark.slow
@pytest.mark.parametrize("build", SLOW)
def test_other_builds_agree_too(built: Callable[[str], Path], build: str) -> None:
    assert_right(built(build), some(150))


def test_the_number_of_threads_changes_no_bit(built: Callable[[str], Path]) -> None:
    assert_same(built("native"), lambda threads: some(40, 1, threads))


@pytest.mark.slow
def test_a_machine_that_has_the_instruction_gets_it(built: Callable[[str], Path]) -> None:
    """Of full vectors every product is one: what is left of fp32 is for the narrow blocks."""
    text = built("cooperlake").read_text("utf-8")
    assert text.count("vdpbf16ps") > 500
    assert text.count("vfmadd") < text.count("vdpbf16ps") and "zmm" in text
