from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from torch.nn import functional as F

from padst_compiler.formulation import Geometry
from padst_compiler.kernel_ops import DIAGONAL_SUMS
from padst_compiler.kernels import CANDIDATES, install
from padst_compiler.kernels.micro_diagonal import DX_FORM, LINEAR_FORM, crossings
from padst_compiler.ops import LINEAR, LINEAR_DW, LINEAR_DX
from padst_compiler.structures import NM, Diagonal, Shape

from .stored import weights


@pytest.fixture(autouse=True)
def lowered() -> None:
    install()
    torch._dynamo.reset()


SHAPES = [Shape(64, 32), Shape(32, 96), Shape(32, 32), Shape(48, 20), Shape(8, 12)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_formulations_are_the_operators(shape: Shape) -> None:
    values, indices, dense = weights(Diagonal(), shape, torch.float64)
    x, grad = torch.randn(2, 5, shape.in_features), torch.randn(3, shape.out_features)
    x, grad, bias = x.double(), grad.double(), torch.randn(shape.out_features).double()
    y = LINEAR_FORM.run(x, values, indices, bias, shape.out_features)
    torch.testing.assert_close(y, x @ dense.t() + bias)
    if shape.in_features % 4 == 0:
        torch.testing.assert_close(
            DX_FORM.run(grad, values, indices, shape.in_features), grad @ dense
        )


@given(data=st.data())
def test_crossings_hold_every_weight_once(data: st.DataObject) -> None:
    n, tiles, inputs = (data.draw(st.integers(1, most)) for most in (6, 5, 20))
    outputs = n * tiles
    down = data.draw(st.booleans()) if inputs == outputs else outputs > inputs
    offsets = data.draw(st.sets(st.integers(0, max(inputs, outputs) - 1), min_size=1))
    values = torch.randn(len(offsets), min(inputs, outputs))
    given = torch.tensor(sorted(offsets))
    packed, places, starts = crossings(values, given, (inputs, outputs), n, down=down)
    assert packed.shape == (len(places), n) and (starts is None) is not down
    torch.testing.assert_close(packed.sum(), values.sum())
    if starts is not None:
        assert starts[0] == 0 and bool((starts.diff() >= 0).all()) and len(starts) == tiles + 1
        assert int(starts[-1]) == len(packed)
    else:
        assert len(packed) == tiles * len(offsets)
    assert int(places.min()) >= 0 and int(places.max()) <= (inputs + n if down else inputs - 1)


@pytest.mark.parametrize(
    "shape", [SHAPES[0], *(pytest.param(s, marks=pytest.mark.slow) for s in SHAPES[1:])], ids=str
)
def test_a_kernel_reads_through_maps_and_what_follows_is_fused(shape: Shape) -> None:
    values, indices, dense = weights(Diagonal(), shape)
    x, p = torch.randn(2, 19, shape.in_features), torch.randperm(shape.in_features)
    q, bias = torch.randperm(shape.out_features), torch.randn(shape.out_features)
    down = shape.out_features >= shape.in_features
    n = next(n for n in (32, 16, 8, 4) if shape.out_features % n == 0)
    sides = (shape.in_features, shape.out_features)
    parts = crossings(values[0], indices[0].long(), sides, n, down=down)

    def run(x: Tensor, p: Tensor | None, q: Tensor | None) -> Tensor:
        return F.gelu(DIAGONAL_SUMS(x, *parts, shape.out_features, p, q) + bias) + 1.0

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
    values, indices, dense = weights(Diagonal(), Shape(32, 16), torch.float64)
    parts = crossings(values[0], indices[0].long(), (16, 32), 32, down=True)
    x = torch.randn(3, 16).double()
    run = torch.compile(lambda x: DIAGONAL_SUMS(x, *parts, 32, None, None))
    y, codes = run_and_get_code(run, x)
    torch.testing.assert_close(y, x @ dense.t())
    assert "torch.ops.padst.diagonal_sums.default(" in "".join(codes)


def test_costs_say_where_the_kernel_applies() -> None:
    def geometry(**changed: Any) -> Geometry:
        shape = changed.pop("shape", Shape(768, 768))
        known: dict[str, Any] = {"structure": Diagonal(), "tokens": 197, "frozen": True}
        known |= {"dtype": torch.float32, "device": "cpu", "kept": 77} | changed
        return Geometry(shape=shape, **known)

    for op in (LINEAR["diagonal"], LINEAR_DX["diagonal"], LINEAR_DW["diagonal"]):
        way, dense = CANDIDATES[op][0], CANDIDATES[op][-1]
        cost, usual = way.cost(geometry()), dense.cost(geometry())
        assert cost is not None and usual is not None and cost < 0.6 * usual
        training = way.cost(geometry(frozen=False))
        assert training is not None and (training > cost) is (op is not LINEAR_DW["diagonal"])
        for other in (
            geometry(dtype=torch.float64),
            geometry(device="cuda"),
            geometry(shape=Shape(770, 770)),
            geometry(structure=NM(16), kept=2),
        ):
            assert way.cost(other) is None
