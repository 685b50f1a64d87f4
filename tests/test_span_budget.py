"""The span budget: the published numbers, and a plain recurrence in whole numbers."""

import math
import random
from fractions import Fraction

import pytest

from padst_compiler.span_budget import budgets, log2_regions, overhead, span
from padst_compiler.structures import NM, Block, Diagonal, FanIn, Shape, Structure, Unstructured

SQUARE = Shape(768, 768)


@pytest.mark.parametrize(
    ("sparsity", "diagonals", "layers"),
    [(0.6, 308, 3), (0.7, 231, 4), (0.8, 154, 5), (0.9, 77, 10), (0.95, 39, 20)],
)
def test_diagonals_at_768_as_published(sparsity: float, diagonals: int, layers: int) -> None:
    r = span(Diagonal(), SQUARE, Diagonal().kept(SQUARE, sparsity))
    assert r == diagonals and overhead(768, r) == layers
    alpha = Fraction(round(20 * (1 - sparsity)), 20)  # the same for N:M at this sparsity
    assert overhead(768, alpha * 768) == layers


@pytest.mark.parametrize(("size", "layers"), [(16, 48), (32, 24), (64, 12)])
def test_blocks_at_768_as_published(size: int, layers: int) -> None:
    for sparsity in (0.6, 0.9):  # one block counts, however many there are
        r = span(Block(size), SQUARE, Block(size).kept(SQUARE, sparsity))
        assert r == size and overhead(768, r) == layers


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (1, 8), (2, 16), (3, 16), (3, 8)])
def test_nm_needs_m_over_n_layers(n: int, m: int) -> None:
    structure = NM(m=m, n=n)
    r = span(structure, SQUARE, structure.kept(SQUARE, 0.5))
    assert overhead(768, r) == math.ceil(m / n) == -(-m // n)


def test_fan_in_counts_as_nm_and_unstructured_as_dense() -> None:
    assert span(FanIn(), SQUARE, 77) == 77 and overhead(768, 77) == 10
    bands = Diagonal(band=16)  # 5 bands of 16 diagonals
    assert span(bands, SQUARE, bands.kept(SQUARE, 0.9)) == 80
    assert span(Block(64, 16), SQUARE, 5) == 16  # of 16 inputs
    wide = Shape(3072, 3072)
    assert span(FanIn(), wide, 308, inputs=768) == 77  # alpha d_0, d_0 of the network
    assert span(Unstructured(), SQUARE, 100) == 768


@pytest.mark.parametrize("structure", [Block(8), Diagonal(), NM(m=8), FanIn()], ids=str)
def test_200_random_chains_against_a_plain_recurrence(structure: Structure) -> None:
    draw = random.Random(0)
    for _ in range(200):
        inputs = draw.choice([64, 128, 256])
        shape = Shape(inputs, inputs)
        kept = [structure.kept(shape, draw.uniform(0.3, 0.98)) for _ in range(8)]
        spans = [span(structure, shape, k) for k in kept]
        mixes = [draw.random() < 0.5 for _ in kept]
        u, expected = 0, []
        for r, mixing in zip(spans, mixes, strict=True):
            assert r == int(r)
            u = min(inputs, u + int(r)) if mixing else min(inputs, max(u, int(r)))
            expected.append(u)
        assert budgets(inputs, spans, mixes) == expected
        same = [spans[0]] * 300
        reached = budgets(inputs, same, [True] * 300).index(Fraction(inputs)) + 1
        assert reached == overhead(inputs, spans[0])


def test_regions_are_the_sum_of_binomials() -> None:
    for n in (1, 5, 12, 40):
        for k in range(n + 1):
            exact = sum(math.comb(n, j) for j in range(k + 1))
            assert log2_regions(n, k) == pytest.approx(math.log2(exact))
    assert log2_regions(4096, 2048) < 4096
