from unittest.mock import Mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from padst_compiler.kernels import triton_expand
from padst_compiler.kernels.triton_expand import expanded, linear, nm_linear, pays
from padst_compiler.structures import NM, Shape

from .stored import weights

pytest.importorskip("triton")

NEAR = {torch.float16: 2**-9, torch.bfloat16: 2**-7}
DTYPES = pytest.mark.parametrize("dtype", list(NEAR), ids=lambda dtype: str(dtype)[6:])
LAYERS = [
    (NM(16), Shape(40, 96)),
    (NM(10, 1), Shape(33, 100)),
    (NM(8, 3), Shape(70, 64)),
    (NM(7), Shape(11, 21)),
    (NM(4, 2), Shape(24, 48)),
    (NM(2, 1), Shape(5, 6)),
    (NM(64, 5), Shape(17, 192)),
    (NM(16, 16), Shape(8, 32)),
]
EVERY = pytest.mark.parametrize(("structure", "shape"), LAYERS, ids=str)
PLACES = (torch.int32, torch.int16, torch.uint8)


def near(got: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert got.dtype is dtype and got.shape == expected.shape and got.is_contiguous()
    far = float((got.double() - expected).abs().max())
    assert far <= NEAR[dtype] * float(expected.abs().max()), far


@EVERY
@DTYPES
@pytest.mark.parametrize("tokens", [1, 21, 150])
def test_it_is_the_product_with_the_dense_weight(
    structure: NM, shape: Shape, dtype: torch.dtype, tokens: int, device: torch.device
) -> None:
    values, indices, dense = (t.to(device) for t in weights(structure, shape, dtype, 0.85))
    x = torch.randn(tokens, shape.in_features).to(device, dtype)
    bias = torch.randn(shape.out_features).to(device, dtype)
    expected = x.double() @ dense.t() + bias.double()
    for places in PLACES:
        y = linear(x, values, indices.to(places), bias, shape.out_features)
        near(y, expected, dtype)


@EVERY
@pytest.mark.parametrize("side", ["in", "into", "both"])
def test_inputs_are_read_and_results_stored_through_maps(
    structure: NM, shape: Shape, side: str, device: torch.device
) -> None:
    values, indices, dense = (t.to(device) for t in weights(structure, shape, torch.float16, 0.8))
    # A map of inputs may repeat some and leave out others: it is as long as the layer is wide.
    wide = shape.in_features + 5
    in_map = torch.randint(wide, (shape.in_features,)).to(device) if side != "into" else None
    into = torch.randperm(shape.out_features).to(device) if side != "in" else None
    wide = wide if in_map is not None else shape.in_features
    x = torch.randn(2, 9, wide).to(device, torch.float16)
    read = x if in_map is None else x[..., in_map]
    product = read.double() @ dense.t()
    expected = product if into is None else torch.empty_like(product).index_copy(-1, into, product)
    got = linear(x, values, indices, None, shape.out_features, in_map, into)
    near(got, expected, torch.float16)


def test_tokens_may_lie_anywhere(device: torch.device) -> None:
    structure, shape = LAYERS[0]
    values, indices, dense = (t.to(device) for t in weights(structure, shape, torch.float16, 0.8))
    x = torch.randn(shape.in_features, 3, 7).to(device, torch.float16).permute(1, 2, 0)
    near(linear(x, values, indices, None, shape.out_features), x.double() @ dense.t(), x.dtype)


def test_no_token_is_no_result(device: torch.device) -> None:
    structure, shape = LAYERS[0]
    values, indices, _ = (t.to(device) for t in weights(structure, shape, torch.float16, 0.8))
    x = torch.zeros(2, 0, shape.in_features, device=device, dtype=torch.float16)
    assert linear(x, values, indices, None, shape.out_features).shape == (2, 0, shape.out_features)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    m=st.integers(2, 20),
    groups=st.integers(1, 9),
    outputs=st.integers(1, 40),
    tokens=st.integers(1, 40),
    seed=st.integers(0, 2**16),
    data=st.data(),
)
def test_any_pattern_of_any_size(
    m: int, groups: int, outputs: int, tokens: int, seed: int, data: st.DataObject
) -> None:
    structure = NM(m, data.draw(st.integers(1, m)))
    shape, dtype = Shape(outputs, groups * m), data.draw(st.sampled_from(list(NEAR)))
    torch.manual_seed(seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    values, indices, dense = (t.to(device) for t in weights(structure, shape, dtype, 0.5))
    x = torch.randn(tokens, shape.in_features).to(device, dtype)
    y = linear(x, values, indices, None, outputs)
    size = (x.double().abs() @ dense.abs().t()).max()  # of what is added up
    assert (y.double() - x.double() @ dense.t()).abs().max() <= NEAR[dtype] * size


def test_programs_are_many_even_for_few_tokens() -> None:
    for outputs, tokens in ((11008, 1), (4096, 16), (4096, 128)):
        how = expanded((outputs, 256, 2), 4096, tokens)
        assert how.grid(tokens) >= triton_expand.PROGRAMS or how.values["BLOCK_N"] == 16
    narrow = expanded((11008, 256, 2), 4096, 16).values["BLOCK_N"]
    wide = expanded((11008, 256, 2), 4096, 1024).values["BLOCK_N"]
    assert narrow < wide  # many tokens are programs enough


def test_it_pays_from_a_few_tokens_on() -> None:
    sizes, inputs = (11008, 256, 2), 4096
    paid = [pays(sizes, inputs, tokens, torch.bfloat16) for tokens in (1, 2, 8, 32, 128, 1024)]
    assert paid == sorted(paid) and not paid[0] and paid[3]
    assert not pays((11008, 410), inputs, 32, torch.bfloat16)  # fan-in has no groups
    assert not pays((768, 8, 13), 1024, 32, torch.bfloat16)  # groups of 128
    assert not pays(sizes, inputs, 32, torch.float32)  # no matrix units, and too many registers
    assert not pays((11008, 64, 9), inputs, 32, torch.bfloat16)  # too many of 64 for the text


def test_the_operator_runs_the_cheaper_kernel(
    monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    structure, shape = LAYERS[0]
    values, indices, dense = (t.to(device) for t in weights(structure, shape, torch.float16, 0.8))
    x = torch.randn(4, shape.in_features).to(device, torch.float16)
    runs = [getattr(triton_expand, name) for name in ("linear", "gathered_linear")]
    told = [Mock(wraps=run) for run in runs]
    for name, run in zip(("linear", "gathered_linear"), told, strict=True):
        monkeypatch.setattr(triton_expand, name, run)
    for paying in (True, False):
        monkeypatch.setattr(triton_expand, "pays", lambda *_, paying=paying: paying)
        y = nm_linear(x, values, indices, None, shape.out_features)
        near(y, x.double() @ dense.t(), torch.float16)
        assert [run.call_count for run in told] == [1, 0 if paying else 1]
