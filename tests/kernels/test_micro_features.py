from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from torch.nn import functional as F

from padst_compiler.formulation import Geometry
from padst_compiler.kernel_ops import GATHERED_SUMS
from padst_compiler.kernels import CANDIDATES, install
from padst_compiler.kernels.micro_features import FAN_IN_FORM, NM_FORM
from padst_compiler.ops import LINEAR
from padst_compiler.structures import NM, FanIn, Shape, Structure

from .stored import weights


@pytest.fixture(autouse=True)
def lowered() -> None:
    install()
    torch._dynamo.reset()


@pytest.mark.parametrize("structure", [FanIn(), NM(10)], ids=str)
def test_formulations_are_the_operators(structure: Structure) -> None:
    shape = Shape(32, 60)
    values, indices, dense = weights(structure, shape, torch.float64)
    x, bias = torch.randn(2, 5, 60).double(), torch.randn(32).double()
    way = NM_FORM if isinstance(structure, NM) else FAN_IN_FORM
    y = way.run(x, values, indices, bias, 32)
    torch.testing.assert_close(y, x @ dense.t() + bias)


@pytest.mark.parametrize("tokens", [(37,), pytest.param((2, 3, 32), marks=pytest.mark.slow)])
def test_a_kernel_reads_through_maps_and_what_follows_is_fused(tokens: tuple[int, ...]) -> None:
    values, indices, dense = weights(FanIn(), Shape(48, 50))
    inputs, bias = indices.to(torch.int32), torch.randn(48)
    x, p, q = torch.randn(*tokens, 50), torch.randperm(50), torch.randperm(48)

    def run(x: Tensor, p: Tensor | None, q: Tensor | None) -> Tensor:
        return F.gelu(GATHERED_SUMS(x, values, inputs, p, q) + bias) + 1.0

    for maps in ((None, None), (p, q)):
        y, codes = run_and_get_code(torch.compile(run), x, *maps)
        moved, weight = (x, dense) if maps[0] is None else (x[..., p], dense[q])
        expected = F.gelu(moved.double() @ weight.t() + bias) + 1.0
        torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
        assert "".join(codes).count("async_compile.cpp_pybinding(") == 1


@pytest.mark.parametrize("why", ["float64", pytest.param("odd", marks=pytest.mark.slow)])
def test_what_the_kernel_does_not_do_calls_the_operator(why: str) -> None:
    dtype = torch.float64 if why == "float64" else torch.float32
    values, indices, dense = weights(FanIn(), Shape(32 if why == "float64" else 30, 48), dtype)
    x, inputs = torch.randn(9, 48, dtype=dtype), indices.to(torch.int32)
    run = torch.compile(lambda x: GATHERED_SUMS(x, values, inputs, None, None))
    y, codes = run_and_get_code(run, x)
    torch.testing.assert_close(y.double(), x.double() @ dense.t(), rtol=1e-5, atol=1e-5)
    assert "torch.ops.padst.gathered_sums.default(" in "".join(codes)


def test_costs_say_where_the_kernel_applies() -> None:
    def geometry(structure: Structure, **changed: Any) -> Geometry:
        shape = changed.pop("shape", Shape(768, 768))
        known: dict[str, Any] = {"tokens": 197, "frozen": True, "kept": structure.kept(shape, 0.9)}
        known |= {"dtype": torch.float32, "device": "cpu"} | changed
        return Geometry(structure=structure, shape=shape, **known)

    for structure in (FanIn(), NM(48)):
        ways = CANDIDATES[LINEAR[structure.name]]
        (way,) = (w for w in ways if w.name == "feature_kernel")
        cost, usual = way.cost(geometry(structure)), ways[-1].cost(geometry(structure))
        assert cost is not None and usual is not None and cost < 0.8 * usual
        for other in (
            geometry(structure, dtype=torch.float64),
            geometry(structure, device="cuda"),
            geometry(structure, shape=Shape(776, 768)),
            geometry(structure, tokens=1),
        ):
            assert way.cost(other) is None
