import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from padst_compiler.distribution import DISTRIBUTIONS, erk, uniform
from padst_compiler.structures import Shape

SHAPES = st.lists(
    st.builds(Shape, st.integers(1, 900), st.integers(1, 900)), min_size=1, max_size=8
)


def overall(shapes: list[Shape], sparsities: list[float]) -> float:
    zeros = sum(shape.numel * s for shape, s in zip(shapes, sparsities, strict=True))
    return zeros / sum(shape.numel for shape in shapes)


def erk_by_bisection(shapes: list[Shape], sparsity: float) -> list[float]:
    """Return the definition: density min(1, eps (o + i) / (o i)) with eps found by halving."""

    def densities(eps: float) -> list[float]:
        return [min(1.0, eps * (s.out_features + s.in_features) / s.numel) for s in shapes]

    low, high = 0.0, float(sum(shape.numel for shape in shapes))
    for _ in range(200):
        eps = (low + high) / 2
        kept = sum(s.numel * d for s, d in zip(shapes, densities(eps), strict=True))
        wanted = (1 - sparsity) * sum(shape.numel for shape in shapes)
        low, high = (eps, high) if kept < wanted else (low, eps)
    return [1 - density for density in densities(high)]


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.floats(0.0, 0.99))
def test_erk_is_its_definition(shapes: list[Shape], sparsity: float) -> None:
    assert erk(shapes, sparsity) == pytest.approx(erk_by_bisection(shapes, sparsity), abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(SHAPES, st.floats(0.0, 0.99), st.sampled_from(sorted(DISTRIBUTIONS)))
def test_every_distribution_keeps_the_total(
    shapes: list[Shape], sparsity: float, name: str
) -> None:
    sparsities = DISTRIBUTIONS[name](shapes, sparsity)
    assert all(0.0 <= s < 1.0 for s in sparsities)
    assert overall(shapes, sparsities) == pytest.approx(sparsity, abs=1e-9)


def test_layers_above_one_become_dense_in_turn() -> None:
    shapes = [Shape(8, 8), Shape(32, 32), Shape(512, 512)]
    sparsities = erk(shapes, 0.8)
    assert sparsities[:2] == [0.0, 0.0] and sparsities[2] > 0.8


def test_convolutions_count_the_axes_of_their_kernel() -> None:
    shapes = [Shape(64, 32 * 9, (3, 3)), Shape(64, 64, (1, 1)), Shape(64, 640)]
    densities = [1.0 - s for s in erk(shapes, 0.9)]
    dims = [64 + 32 + 3 + 3, 64 + 64 + 1 + 1, 64 + 640]
    ratios = [d * s.numel / n for d, s, n in zip(densities, shapes, dims, strict=True)]
    assert ratios == pytest.approx([ratios[0]] * 3)  # density = eps * sum(dims) / prod(dims)


def test_nothing_asked_is_dense() -> None:
    assert erk([Shape(4, 4), Shape(64, 2)], 0.0) == [0.0, 0.0]
    assert uniform([Shape(4, 4)], 0.0) == [0.0]
    assert erk([], 0.5) == uniform([], 0.5) == []
