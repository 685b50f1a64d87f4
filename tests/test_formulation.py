import pytest
import torch

from padst_compiler.formulation import WEIGHT_READ, Formulation, Geometry, gemm, moved
from padst_compiler.structures import NM, Block, Diagonal, FanIn, Shape, Structure, Unstructured


@pytest.mark.parametrize(
    "structure", [Block(8), NM(8), Diagonal(), FanIn(), Unstructured()], ids=lambda s: s.name
)
@pytest.mark.parametrize("shape", [Shape(64, 32), Shape(32, 64), Shape(32, 32)], ids=str)
@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_a_geometry_counts_the_stored_weights(
    structure: Structure, shape: Shape, sparsity: float
) -> None:
    dense = torch.randn(shape.out_features, shape.in_features)
    kept = structure.kept(shape, sparsity)
    values = structure.pack(dense, structure.select(dense, kept))
    g = Geometry(structure, shape, kept, 4, torch.float32, "cpu", frozen=True)
    assert g.nnz == values.numel()


def test_a_geometry_knows_the_bytes_of_a_number() -> None:
    for dtype, item in ((torch.float64, 8), (torch.float32, 4), (torch.bfloat16, 2)):
        assert Geometry(FanIn(), Shape(4, 4), 1, 1, dtype, "cpu", frozen=True).item == item


def test_a_product_costs_its_operations_and_at_least_reading_its_weight() -> None:
    launch = gemm(0, 0, 0)
    assert gemm(1000, 20, 30) - launch == pytest.approx(2 * 1000 * 20 * 30)
    assert gemm(1, 200, 300) - launch == pytest.approx(WEIGHT_READ * 200 * 300)
    assert gemm(100, 20, 30, batch=7) - launch == pytest.approx(7 * (gemm(100, 20, 30) - launch))
    assert gemm(1000, 20, 30, efficiency=0.5) - launch == pytest.approx(4 * 1000 * 20 * 30)


def test_moving_costs_more_out_of_cache_and_less_in_half_precision() -> None:
    launch = moved(0, 4)
    assert moved(2000, 4) - launch == pytest.approx(2 * (moved(1000, 4) - launch))
    assert moved(1000, 2) - launch == pytest.approx((moved(1000, 4) - launch) / 2)
    large = 2**24
    assert moved(large, 4) - launch > 2 * (moved(large / 2**10, 4) - launch) * 2**9


def test_every_call_costs_a_launch() -> None:
    assert gemm(0, 0, 0) == moved(0, 4) > 0


def test_a_formulation_is_a_value() -> None:
    one = Formulation("dense", torch.add, lambda g: None)
    assert one == Formulation("dense", torch.add, one.cost)
    assert one.cost(Geometry(FanIn(), Shape(4, 4), 1, 1, torch.float32, "cpu", frozen=True)) is None
