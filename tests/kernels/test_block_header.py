"""The C++ block kernels alone: random shapes against float64, sanitizers, narrow vectors."""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pytest

HERE = Path(__file__).resolve().parent
KERNELS = HERE.parent.parent / "kernels"
SIDES = [(4, 4), (8, 8), (16, 16), (32, 32), (64, 64), (128, 128), (16, 8), (8, 24), (48, 12)]
SIDES += [(columns, rows) for rows, columns in SIDES if rows != columns]
KINDS = ("linear", "dx", "dw")
THROUGH = 2  # a map
BUILDS = {
    "native": ["-O1", "-march=native"],  # the quickest to build
    "optimized": ["-O3", "-march=native"],
    "avx2": ["-O1", "-mavx2", "-mfma"],
    "portable": ["-O1"],
    "cooperlake": ["-O3", "-march=cooperlake", "-S"],  # has AVX-512 BF16; text, not a program
    "sanitized": ["-O1", "-g", "-march=native", "-fsanitize=address,undefined"],
}
SLOW = ["avx2", "portable", "sanitized", pytest.param("optimized", marks=pytest.mark.exhaustive)]
Array = npt.NDArray[np.float32]


def shared(factory: pytest.TempPathFactory, name: str) -> Path:
    """Return a folder that the processes of a run have in common."""
    own = factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / name
    folder.mkdir(exist_ok=True)
    return folder


def builder(folder: Path, headers: Sequence[str], cases: str, driver: str) -> Callable[[str], Path]:
    """Return what compiles a driver in one of the ways, once each: others wait for the first."""

    def build(name: str) -> Path:
        texts = [(KERNELS / header).read_text("utf-8") for header in headers]
        texts += [cases, *((HERE / name).read_text("utf-8") for name in ("driver.h", driver))]
        source, program = folder / f"{name}.cpp", folder / name
        flags = ["-std=c++17", "-Wall", "-Werror", "-ffast-math", "-fopenmp"]
        # fast-math without its ban on infinities, as Inductor compiles; and GCC 12 finds its
        # own _mm512_undefined_epi32 uninitialised
        flags += ["-fno-finite-math-only", "-Wno-maybe-uninitialized", *BUILDS[name]]
        compiler = shutil.which("g++")
        assert compiler is not None
        with (folder / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not program.exists():
                source.write_text("\n".join(["#include <cstring>", *texts]), "utf-8")
                made = program.with_suffix(".made")
                subprocess.run([compiler, *flags, str(source), "-o", str(made)], check=True)
                made.rename(program)
        return program

    return build


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return what compiles the driver in one of the ways, once each."""
    sides = " ".join(f"SIDES({rows}, {columns})" for rows, columns in SIDES)
    headers, cases = ("vectors.h", "turn.h", "sums.h", "block.h"), f"#define ALL_SIDES {sides}"
    return builder(shared(tmp_path_factory, "block"), headers, cases, "block_driver.cpp")


class Solved(Protocol):
    """A call of a kernel as bytes, and what float64 says of it."""

    bytes: bytes
    expected: npt.NDArray[np.float64]


class Problem:
    """One random call of a kernel, and what float64 says of it."""

    def __init__(self, rng: np.random.Generator, kind: str, threads: int = 1) -> None:
        self.kind = kind
        r, c = SIDES[rng.integers(len(SIDES))]
        rows, columns = (int(n) for n in rng.integers(1, 6, 2))
        kept = int(rng.integers(0 if kind == "linear" else 1, columns + 1))
        tokens = int(rng.integers(1, 90))
        read = 0 if kind == "dw" else int(rng.integers(3))
        i, o = columns * c, rows * r
        wide = o if kind == "dx" else i
        features = int(rng.integers(1, 2 * wide)) if read == THROUGH else wide
        row = features + int(rng.integers(0, 20))
        memory = rng.standard_normal((tokens - 1) * row + features).astype(np.float32)
        x = np.lib.stride_tricks.as_strided(memory, (tokens, features), (4 * row, 4))
        x = x.astype(np.float64)
        through = rng.integers(0, features, wide)
        moved = kind != "dw" and bool(rng.integers(2))
        x = x[:, through] if read == THROUGH else x
        indices = np.stack([rng.permutation(columns)[:kept] for _ in range(rows)])
        indices = indices.reshape(rows, kept).astype(np.int32)
        values = rng.standard_normal((rows, kept, c, r)).astype(np.float32)
        other = rng.standard_normal((tokens, o)).astype(np.float32)
        dense = np.zeros((o, i))
        self.expected = np.zeros((rows, kept, c, r))
        for at in range(rows):
            for slot, column in enumerate(indices[at]):
                here = np.s_[at * r : (at + 1) * r], np.s_[column * c : (column + 1) * c]
                dense[here] = values[at, slot].T
                if kind == "dw":
                    gradient = other.astype(np.float64).T @ x
                    self.expected[at, slot] = gradient[here].T
        weights: Array = values
        out, inner = r, c
        if kind == "linear":
            self.expected = x @ dense.T
        elif kind == "dx":
            self.expected = x @ dense
            out, inner = c, r
        else:
            weights = other
        numbers = (KINDS.index(kind), out, inner, tokens, rows, kept, columns, row, read, features)
        self.bytes = struct.pack("12i", *map(int, numbers), moved, threads) + memory.tobytes()
        self.bytes += weights.tobytes() + indices.tobytes()
        self.bytes += through.tobytes() if read == THROUGH else b""
        if moved:
            to = rng.permutation(self.expected.shape[1])
            self.bytes += to.tobytes()
            self.expected = self.expected[:, to]


def run(program: Path, problems: Sequence[Solved]) -> list[Array]:
    """Return what the driver computes for each problem."""
    done = subprocess.run(
        [str(program)], input=b"".join(p.bytes for p in problems), capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    flat = np.frombuffer(done.stdout, np.float32)
    sizes = np.cumsum([p.expected.size for p in problems])
    assert len(flat) == sizes[-1]
    parts = np.split(flat, sizes[:-1])
    return [part.reshape(p.expected.shape) for part, p in zip(parts, problems, strict=True)]


def assert_right(program: Path, problems: Sequence[Solved]) -> None:
    """Compare what the driver computes with float64."""
    for problem, y in zip(problems, run(program, problems), strict=True):
        scale = max(1.0, float(np.abs(problem.expected).max(initial=0.0)))
        np.testing.assert_allclose(y, problem.expected, rtol=0.0, atol=2e-6 * scale)


def assert_same(program: Path, problems: Callable[[int], Sequence[Solved]]) -> None:
    """Compare the same problems on one, two and three threads, bit for bit."""
    one, *others = (run(program, problems(threads)) for threads in (1, 2, 3))
    for other in others:
        for expected, y in zip(one, other, strict=True):
            np.testing.assert_array_equal(expected, y)


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
