from unittest.mock import Mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from padst_compiler.kernels import triton_turned
from padst_compiler.kernels.triton_turned import fan_in_linear, gathered, linear, pays, turned
from padst_compiler.structures import FanIn, Shape

from .stored import weights

pytest.importorskip("triton")

NEAR = {torch.float32: 2e-6, torch.float16: 2**-9, torch.bfloat16: 2**-7}
SHAPES = [Shape(40, 96), Shape(13, 290), Shape(5, 3), Shape(70, 21)]
EVERY = pytest.mark.parametrize("shape", SHAPES, ids=str)


def near(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert got.dtype is dtype and got.shape == expected.shape and got.is_contiguous()
    far = float((got.double() - expected).abs().max())
    assert far <= NEAR[dtype] * float(expected.abs().max()), far


@EVERY
@pytest.mark.parametrize("dtype", list(NEAR), ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("tokens", [1, 5, 16, 45])
def test_it_is_the_product_with_the_dense_weight(
    shape: Shape, dtype: torch.dtype, tokens: int, device: torch.device
) -> None:
    values, indices, dense = (t.to(device) for t in weights(FanIn(), shape, dtype, 0.5))
    x = torch.randn(tokens, shape.in_features).to(device, dtype)
    bias = torch.randn(shape.out_features).to(device, dtype)
    expected = x.double() @ dense.t() + bias.double()
    for places in (torch.int32, torch.int16):
        y = linear(x, values, indices.to(places), bias, shape.out_features)
        near(y, expected, dtype)


@EVERY
@pytest.mark.parametrize("side", ["in", "into", "both"])
def test_inputs_are_read_and_results_stored_through_maps(
    shape: Shape, side: str, device: torch.device
) -> None:
    values, indices, dense = (t.to(device) for t in weights(FanIn(), shape, torch.float32, 0.4))
    wide = shape.in_features + 5
    in_map = torch.randint(wide, (shape.in_features,)).to(device) if side != "into" else None
    into = torch.randperm(shape.out_features).to(device) if side != "in" else None
    x = torch.randn(2, 9, wide if in_map is not None else shape.in_features).to(device)
    read = x if in_map is None else x[..., in_map]
    product = read.double() @ dense.t()
    expected = product if into is None else torch.empty_like(product).index_copy(-1, into, product)
    near(
        linear(x, values, indices, None, shape.out_features, in_map, into), expected, torch.float32
    )


def test_what_is_no_number_stays_with_its_token(device: torch.device) -> None:
    values, indices, dense = (t.to(device) for t in weights(FanIn(), SHAPES[0], torch.float32, 0.5))
    x = torch.randn(5, SHAPES[0].in_features).to(device)
    x[3] = torch.nan
    y = linear(x, values, indices, None, SHAPES[0].out_features)
    assert y[3].isnan().all()
    near(y[:3], x[:3].double() @ dense.t(), torch.float32)
    near(y[4:], x[4:].double() @ dense.t(), torch.float32)


def test_a_feature_that_no_weight_reads_is_not_read(device: torch.device) -> None:
    values = torch.ones(4, 3, device=device)
    indices = torch.tensor([[1, 2, 3]] * 4, dtype=torch.int32, device=device)
    x = torch.ones(2, 8, device=device)
    x[:, 0] = torch.inf  # what masked weights would read
    assert linear(x, values, indices, None, 4).eq(3).all()


def test_no_token_is_no_result(device: torch.device) -> None:
    values, indices, _ = (t.to(device) for t in weights(FanIn(), SHAPES[0], torch.float32, 0.5))
    x = torch.zeros(2, 0, SHAPES[0].in_features, device=device)
    assert linear(x, values, indices, None, 40).shape == (2, 0, 40)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    inputs=st.integers(1, 90),
    outputs=st.integers(1, 60),
    tokens=st.integers(1, 40),
    seed=st.integers(0, 2**16),
    data=st.data(),
)
def test_any_weight_of_any_size(
    inputs: int, outputs: int, tokens: int, seed: int, data: st.DataObject
) -> None:
    kept, dtype = data.draw(st.integers(1, inputs)), data.draw(st.sampled_from(list(NEAR)))
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    values, indices, dense = (
        t.to(device) for t in weights(FanIn(k=kept), Shape(outputs, inputs), dtype, 0.5)
    )
    x = torch.randn(tokens, inputs).to(device, dtype)
    y = linear(x, values, indices, None, outputs)
    size = (x.double().abs() @ dense.abs().t()).max()  # of what is added up
    assert (y.double() - x.double() @ dense.t()).abs().max() <= NEAR[dtype] * size


def test_tokens_of_a_feature_lie_together() -> None:
    x, in_map = torch.randn(3, 4), torch.tensor([2, 0])
    y = turned(x, 8, in_map)
    assert y.is_contiguous() and y.shape == (2, 8)
    assert y[:, :3].equal(x[:, in_map].t()) and not y[:, 3:].any()


def test_programs_cover_tokens_and_outputs() -> None:
    for tokens in (1, 2, 7, 33, 200):
        how = gathered((11008, 410), tokens)
        assert how.values["ROWS"] % how.values["BLOCK_M"] == 0 <= how.values["ROWS"] - tokens
        assert how.grid(tokens) * how.values["BLOCK_M"] * how.values["BLOCK_N"] >= tokens * 11008


def test_it_pays_for_a_few_tokens() -> None:
    paid = [pays((11008, 410), 4096, tokens, torch.bfloat16) for tokens in (1, 8, 64, 300)]
    assert paid == [False, True, True, False]
    assert not pays((11008, 256, 2), 4096, 8, torch.bfloat16)  # N:M has another kernel


def test_the_operator_runs_the_cheaper_kernel(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    values, indices, dense = (t.to(device) for t in weights(FanIn(), SHAPES[0], torch.float32, 0.5))
    x = torch.randn(4, SHAPES[0].in_features).to(device)
    runs = [getattr(triton_turned, name) for name in ("linear", "gathered_linear")]
    told = [Mock(wraps=run) for run in runs]
    for name, run in zip(("linear", "gathered_linear"), told, strict=True):
        monkeypatch.setattr(triton_turned, name, run)
    for paying in (True, False):
        monkeypatch.setattr(triton_turned, "pays", lambda *_, paying=paying: paying)
        y = fan_in_linear(x, values, indices, None, SHAPES[0].out_features)
        near(y, x.double() @ dense.t(), torch.float32)
        assert [run.call_count for run in told] == [1, 0 if paying else 1]
