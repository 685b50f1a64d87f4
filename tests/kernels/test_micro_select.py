from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from torch.nn import functional as F

from padst_compiler.formulation import Geometry
from padst_compiler.kernel_ops import PICKED_SUMS
from padst_compiler.kernels import CANDIDATES, install, micro_select
from padst_compiler.kernels.micro_select import FAN_IN_FORM, NM_FORM, laid_out
from padst_compiler.ops import LINEAR
from padst_compiler.structures import NM, FanIn, Shape, Structure

from .stored import weights


@pytest.fixture(autouse=True)
def lowered() -> None:
    install()
    torch._dynamo.reset()


CASES = [
    (NM(16), Shape(64, 48)),
    (NM(10, 1), Shape(32, 60)),
    (NM(32, 3), Shape(48, 64)),
    (FanIn(), Shape(32, 50)),
]


@pytest.mark.parametrize(("structure", "shape"), CASES, ids=str)
def test_formulations_are_the_operators(structure: Structure, shape: Shape) -> None:
    values, indices, dense = weights(structure, shape, torch.float64)
    x, bias = (
        torch.randn(2, 5, shape.in_features).double(),
        torch.randn(shape.out_features).double(),
    )
    way = NM_FORM if isinstance(structure, NM) else FAN_IN_FORM
    y = way.run(x, values, indices, bias, shape.out_features)
    torch.testing.assert_close(y, x @ dense.t() + bias)


@pytest.mark.parametrize(
    ("structure", "shape"),
    [CASES[0], *(pytest.param(*case, marks=pytest.mark.slow) for case in CASES[1:])],
    ids=str,
)
def test_a_kernel_reads_through_maps_and_what_follows_is_fused(
    structure: Structure, shape: Shape
) -> None:
    values, indices, dense = weights(structure, shape)
    narrow = indices.to(torch.uint8 if isinstance(structure, NM) else torch.int32)
    parts = laid_out(values, narrow, 16)
    groups = indices.shape[1] if isinstance(structure, NM) else 1
    x, p = torch.randn(2, 19, shape.in_features), torch.randperm(shape.in_features)
    q, bias = torch.randperm(shape.out_features), torch.randn(shape.out_features)

    def run(x: Tensor, p: Tensor | None, q: Tensor | None) -> Tensor:
        return F.gelu(PICKED_SUMS(x, *parts, groups, p, q) + bias) + 1.0

    for maps in ((None, None), (p, q)):
        y, codes = run_and_get_code(torch.compile(run), x, *maps)
        expected = (
            x.double() @ dense.t() if maps[0] is None else x.double()[..., p] @ dense.t()[:, q]
        )
        expected = F.gelu(expected + bias) + 1.0
        torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
        assert "".join(codes).count("async_compile.cpp_pybinding(") == 1


@pytest.mark.slow
def test_what_the_kernel_does_not_do_calls_the_operator() -> None:
    values, indices, dense = weights(NM(16), Shape(32, 48), torch.float64)
    parts = laid_out(values, indices.to(torch.uint8), 32)
    x = torch.randn(3, 48).double()
    y, codes = run_and_get_code(torch.compile(lambda x: PICKED_SUMS(x, *parts, 3, None, None)), x)
    torch.testing.assert_close(y, x @ dense.t())
    assert "torch.ops.padst.picked_sums.default(" in "".join(codes)


def geometry(structure: Structure, **changed: Any) -> Geometry:
    shape = changed.pop("shape", Shape(768, 768))
    known: dict[str, Any] = {"tokens": 197, "frozen": True, "dtype": torch.float32, "device": "cpu"}
    known["kept"] = structure.kept(shape, 0.9)
    return Geometry(structure=structure, shape=shape, **(known | changed))


def test_costs_say_where_the_kernels_apply(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    nm, few = CANDIDATES[LINEAR["nm"]], CANDIDATES[LINEAR["fan_in"]]
    for ways, here, others in (
        (nm, geometry(NM(16)), [geometry(NM(48)), geometry(FanIn())]),
        (few, geometry(FanIn(), tokens=1), [geometry(FanIn(), tokens=32), geometry(NM(16))]),
    ):
        cost, usual = ways[0].cost(here), ways[-1].cost(here)
        assert cost is not None and usual is not None and cost < 0.8 * usual
        structure = here.structure
        others += [
            geometry(structure, dtype=torch.float64),
            geometry(structure, device="cuda"),
            geometry(structure, shape=Shape(760, 768)),
        ]
        assert [ways[0].cost(other) for other in others] == [None] * len(others)
    training = micro_select.NM_FORM.cost(geometry(NM(16), frozen=False))
    frozen = micro_select.NM_FORM.cost(geometry(NM(16)))
    assert training is not None and frozen is not None and training > frozen
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert micro_select.NM_FORM.cost(geometry(NM(16))) is None
