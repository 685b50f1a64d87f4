from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

from padst_compiler import cpp_templates as cpp
from padst_compiler.packed_ops import PACKED_LINEAR, PACKED_WEIGHT, gains, packs

LARGE = 1 << 20


CPU = {"architecture": "x86_64"}
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


@pytest.mark.parametrize(
    ("dtype", "units", "expected"),
    [
        (FP32, {}, True),
        (torch.float64, {}, False),
        (BF16, {"avx512_bf16": True}, True),
        (BF16, {"avx512_bf16": True, "amx_bf16": True}, False),
        (FP16, {"avx512_fp16": True}, False),
        (BF16, {}, True),  # widened
        (FP16, {}, True),
        (BF16, None, False),  # nothing is known of the CPU
    ],
)
def test_where_a_layout_gains(
    dtype: torch.dtype,
    units: dict[str, bool] | None,
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known: dict[str, Any] = {} if units is None else CPU | units
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    assert gains(LARGE, dtype, "cpu") is expected
    assert not gains(1 << 17, dtype, "cpu") and not gains(LARGE, dtype, "cuda")


def test_where_onednn_packs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert packs(3, FP32, "cpu") and packs(512, FP32, "cpu")
    for tokens, dtype, device in ((2, FP32, "cpu"), (9, BF16, "cpu"), (9, FP32, "cuda")):
        assert not packs(tokens, dtype, device)
    monkeypatch.setattr("padst_compiler.packed_ops.takes_opaque_inputs", lambda: False)
    assert not packs(32, FP32, "cpu")
    assert not PACKED_WEIGHT(torch.randn(6, 4), 5).is_mkldnn


@pytest.mark.parametrize("sizes", [(5, 24), (0, 24), (2, 3, 24), (700, 24)])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_the_plain_product_for_any_number_of_tokens(
    sizes: Sequence[int], with_bias: bool, dtype: torch.dtype
) -> None:
    weight, x = torch.randn(40, 24, dtype=dtype), torch.randn(*sizes, dtype=dtype)
    bias = torch.randn(40, dtype=dtype) if with_bias else None
    packed = PACKED_WEIGHT(weight, 5)
    assert packed.is_mkldnn is (dtype is torch.float32)
    y = PACKED_LINEAR(x, packed, bias)
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=2e-5)
    assert y.is_contiguous()


def test_tensors_may_lie_in_any_way() -> None:
    weight, x = torch.randn(24, 40).t(), torch.randn(24, 9).t()
    y = PACKED_LINEAR(x, PACKED_WEIGHT(weight, 9), None)
    torch.testing.assert_close(y, x @ weight.t(), rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fake_tensors_say_what_a_graph_checks(dtype: torch.dtype) -> None:
    packed = PACKED_WEIGHT(torch.randn(6, 4, dtype=dtype), 5)
    with FakeTensorMode():
        weight, x = torch.empty(6, 4, dtype=dtype), torch.empty(5, 4, dtype=dtype)
        fake = PACKED_WEIGHT(weight, 5)
        y = PACKED_LINEAR(x, fake, None)
    assert fake.shape == packed.shape and y.shape == (5, 6)
    assert fake.stride() == (cpp.opaque_strides(2) if packed.is_mkldnn else packed.stride())


def test_opaque_tensors_are_inputs_of_compiled_graphs() -> None:
    assert cpp.takes_opaque_inputs() is torch.backends.mkldnn.is_available()
    weight, x = torch.randn(64, 32), torch.randn(5, 32)
    packed = PACKED_WEIGHT(weight, 5)
    run = torch.compile(lambda x, packed: PACKED_LINEAR(x, packed, None).relu() + 1.0)
    with torch.no_grad():
        torch.testing.assert_close(run(x, packed), F.linear(x, weight).relu() + 1.0)
