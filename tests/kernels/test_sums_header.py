"""The C++ kernels of diagonals, N:M and fan-in alone: random shapes against float64, sanitizers."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from padst_compiler.kernels.micro_diagonal import crossings
from padst_compiler.kernels.micro_select import laid_out
from padst_compiler.structures import NM, Diagonal, FanIn, Shape, Structure

from .test_block_header import SLOW, assert_right, assert_same, builder, shared

# Outputs of a tile and inputs, of a diagonal weight; and of N:M and fan-in.
DIAGONALS = [(32, 64), (16, 50), (8, 30), (4, 7)]
SELECTS: list[tuple[int, int, Structure]] = [
    (32, 64, NM(16, 2)),
    (16, 60, NM(10, 1)),
    (32, 96, NM(32, 3)),
    (8, 48, NM(8, 2)),
    (32, 80, NM(40, 3)),
    (32, 50, FanIn(7)),
]
FORMS = [
    f"DIAGONAL({2 * at + down}, {n}, {inputs}, {str(bool(down)).lower()})"
    for at, (n, inputs) in enumerate(DIAGONALS)
    for down in (0, 1)
]
for at, (n, inputs, kind) in enumerate(SELECTS, start=len(FORMS)):
    if isinstance(kind, NM):
        FORMS.append(f"SELECT({at}, {n}, {inputs}, {kind.m}, {kind.n}, uint8_t)")
    elif isinstance(kind, FanIn):
        FORMS.append(f"SELECT({at}, {n}, {inputs}, {inputs}, {kind.k}, int32_t)")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return what compiles the driver in one of the ways, once each."""
    headers = ("vectors.h", "turn.h", "sums.h", "diagonal.h", "select.h", "features.h")
    cases = f"#define ALL_FORMS {' '.join(FORMS)}"
    return builder(shared(tmp_path_factory, "sums"), headers, cases, "sums_driver.cpp")


class Problem:
    """One random call of a kernel, and what float64 says of it."""

    def __init__(self, rng: np.random.Generator, threads: int = 1) -> None:
        form = int(rng.integers(len(FORMS) + 3))
        tiles, tokens = int(rng.integers(1, 5)), int(rng.integers(1, 40))
        torch.manual_seed(int(rng.integers(1 << 30)))
        if form >= len(FORMS):
            form, n, inputs = 99, 16, int(rng.integers(1, 70))
            kind: Structure = FanIn()
        elif form < 2 * len(DIAGONALS):
            (n, inputs), down = DIAGONALS[form // 2], bool(form % 2)
            tiles += -(-inputs // n) if down else 0  # as many outputs as inputs, at least
            tiles = tiles if down else min(tiles, inputs // n)
            assert tiles, "a wide weight has a tile of outputs"
        else:
            n, inputs, kind = SELECTS[form - 2 * len(DIAGONALS)]
        outputs = tiles * n
        shape = Shape(outputs, inputs)
        structure = Diagonal() if form < 2 * len(DIAGONALS) else kind
        dense = torch.randn(outputs, inputs)
        indices = structure.select(dense, structure.kept(shape, float(rng.uniform(0.3, 0.95))))
        values = structure.pack(dense, indices)
        weight = structure.unpack(values, indices, shape).double().numpy()
        if isinstance(structure, Diagonal):
            offsets = indices[0].long()
            if not down and outputs == inputs:  # square ones are named by their inputs
                weight = np.zeros((outputs, inputs))
                for at, offset in enumerate(offsets.tolist()):
                    rows = np.arange(outputs)
                    weight[rows, (rows + offset) % inputs] += values[0, at].double().numpy()
            sides = (inputs, outputs)
            found = crossings(values[0], offsets, sides, n, down=down)
            parts = [part for part in found if part is not None]
            items = len(parts[0])
        elif form == 99:
            parts = [values, indices.to(torch.int32), torch.tensor([inputs])]
            items = values.numel()
        else:
            narrow = torch.uint8 if isinstance(structure, NM) else torch.int32
            parts = list(laid_out(values, indices.to(narrow), n))
            items = parts[0].numel()
        through, moved = (bool(b) for b in rng.integers(0, 2, 2))
        features = int(rng.integers(1, 2 * inputs)) if through else inputs
        row = features + int(rng.integers(0, 20))
        memory = rng.standard_normal((tokens - 1) * row + features).astype(np.float32)
        x = np.lib.stride_tricks.as_strided(memory, (tokens, features), (4 * row, 4))
        in_map, out_map = rng.integers(0, features, inputs), rng.permutation(outputs)
        x = x[:, in_map] if through else x
        y = x.astype(np.float64) @ weight.T
        self.expected = y[:, out_map] if moved else y
        numbers = (form, outputs, tokens, row, features, items, through, moved, threads)
        self.bytes = struct.pack("9i", *map(int, numbers)) + memory.tobytes()
        self.bytes += b"".join(part.contiguous().numpy().tobytes() for part in parts)
        self.bytes += (in_map.tobytes() if through else b"") + (out_map.tobytes() if moved else b"")


def some(count: int, seed: int = 0, threads: int = 1) -> list[Problem]:
    rng = np.random.default_rng(seed)
    return [Problem(rng, threads) for _ in range(count)]


def test_a_thousand_random_shapes_agree_with_float64(built: Callable[[str], Path]) -> None:
    assert_right(built("native"), some(1000))


@pytest.mark.slow
@pytest.mark.parametrize("build", SLOW)
def test_other_builds_agree_too(built: Callable[[str], Path], build: str) -> None:
    assert_right(built(build), some(300))


def test_the_number_of_threads_changes_no_bit(built: Callable[[str], Path]) -> None:
    assert_same(built("native"), lambda threads: some(80, 1, threads))
