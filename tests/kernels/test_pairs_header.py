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

SIDES = [(16, 1), (16, 8), (32, 16), (64, 4), (128, 32), (48, 6), (8, 3), (4, 2)]  # in words


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return what compiles the driver in one of the ways, once each."""
    sides = " ".join(f"SIDES({outputs}, {words})" for outputs, words in SIDES)
    headers = ("vectors.h", "turn.h", "sums.h", "block.h")
    cases = f"#define MATH Pairs\n#define ALL_SIDES {sides}"
    return builder(shared(tmp_path_factory, "pairs"), headers, cases, "block_driver.cpp")


def bf16(rng: np.random.Generator, *shape: int) -> npt.NDArray[np.uint16]:
    """Return random numbers of bf16, by their bits."""
    return (rng.standard_normal(shape).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def exact(numbers: npt.NDArray[np.uint16]) -> npt.NDArray[np.float64]:
    return (numbers.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


Indices = npt.NDArray[np.int32]


class Problem:
    """One random call of a kernel, and what float64 says of it."""

    def __init__(self, rng: np.random.Generator, threads: int = 1) -> None:
        kind, (out, words) = int(rng.integers(3)), SIDES[rng.integers(len(SIDES))]
        r, c = {"linear": (out, 2 * words), "dx": (2 * words, out), "dw": (out, words)}[KINDS[kind]]
        rows, columns = (int(n) for n in rng.integers(1, 6, 2))
        kept, tokens = int(rng.integers(0, columns + 1)), int(rng.integers(1, 90))
        picked = [rng.permutation(columns)[:kept] for _ in range(rows)]
        indices = np.stack(picked).reshape(rows, kept).astype(np.int32)
        self.numbers = [kind, out, words, tokens, rows, kept, columns]
        if KINDS[kind] == "dw":
            self._gradient(rng, indices, (r, c), columns, tokens, threads)
        else:
            self._sums(rng, indices, (r, c), columns, tokens, threads)

    def _sums(
        self, rng: np.random.Generator, indices: Indices, sides: tuple[int, int], *sizes: int
    ) -> None:
        columns, tokens, threads = sizes
        (r, c), (rows, kept), dx = sides, indices.shape, KINDS[self.numbers[0]] == "dx"
        values, dense = bf16(rng, rows, kept, c, r), np.zeros((rows * r, columns * c))
        for at in range(rows):
            for slot, column in enumerate(indices[at]):
                here = np.s_[at * r : (at + 1) * r], np.s_[column * c : (column + 1) * c]
                dense[here] = exact(values[at, slot]).T
        matrix = dense.T if dx else dense
        outputs, inputs = matrix.shape
        read, moved = int(rng.choice([0, 1, 3])), bool(rng.integers(2))  # here, apart, through
        features = 2 * int(rng.integers(1, 200)) if read == 3 else inputs
        x = bf16(rng, tokens, features)
        in_map = rng.integers(0, features, inputs) if read == 3 else np.arange(features)
        self.expected = exact(x)[:, in_map] @ matrix.T
        if not dx:
            values = values.reshape(rows, kept, c // 2, 2, r).swapaxes(-1, -2)
        self.numbers += [features // 2, read, features // 2, moved, threads]
        self.bytes = struct.pack("12i", *self.numbers)
        self.bytes += x.tobytes() + values.tobytes() + indices.tobytes()
        self.bytes += in_map.tobytes() if read == 3 else b""
        if moved:
            to = rng.permutation(outputs)
            self.bytes += to.tobytes()
            self.expected = self.expected[:, to]

    def _gradient(
        self, rng: np.random.Generator, indices: Indices, sides: tuple[int, int], *sizes: int
    ) -> None:
        columns, tokens, threads = sizes
        (r, c), rows = sides, indices.shape[0]
        x, grad = bf16(rng, tokens, columns * c), bf16(rng, tokens, rows * r)
        whole = exact(x).T @ exact(grad)  # (inputs, outputs)
        blocks = whole.reshape(columns, c, rows, r).transpose(2, 0, 1, 3)
        self.expected = np.take_along_axis(blocks, indices[:, :, None, None], axis=1)
        self.numbers += [columns * c, 0, columns * c, 0, threads]
        self.bytes = struct.pack("12i", *self.numbers)
        for numbers in (x, grad):  # to a whole number of floats
            self.bytes += numbers.tobytes() + b"\0\0" * (numbers.size % 2)
        self.bytes += indices.tobytes()


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
