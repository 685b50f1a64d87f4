from collections.abc import Sequence

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

from padst_compiler import cpp_templates as cpp
from padst_compiler.packed_ops import PACKED_LINEAR, PACKED_WEIGHT, pays

LARGE = 1 << 20


def test_where_it_pays() -> None:
    assert pays(3, LARGE, torch.float32, "cpu") and pays(512, LARGE, torch.float32, "cpu")
    for tokens, numbers, dtype, device in (
        (2, LARGE, torch.float32, "cpu"),
        (513, LARGE, torch.float32, "cpu"),
        (32, 1 << 17, torch.float32, "cpu"),
        (32, LARGE, torch.bfloat16, "cpu"),
        (32, LARGE, torch.float64, "cpu"),
        (32, LARGE, torch.float32, "cuda"),
    ):
        assert not pays(tokens, numbers, dtype, device)


def test_without_onednn_it_never_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("padst_compiler.packed_ops.takes_opaque_inputs", lambda: False)
    assert not pays(32, LARGE, torch.float32, "cpu")
    weight = torch.randn(6, 4)
    assert not PACKED_WEIGHT(weight, 5).is_mkldnn


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
