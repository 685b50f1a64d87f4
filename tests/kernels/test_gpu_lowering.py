"""When a lowering runs its kernel, and when the operator itself; code is generated elsewhere."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from padst_compiler import cpp_templates
from padst_compiler.kernels.gpu_lowering import lowered, takes

OP = torch.ops.padst.block_linear.default


def tensor(dtype: torch.dtype = torch.float32, device: str = "cuda") -> Any:
    return SimpleNamespace(get_dtype=lambda: dtype, get_device=lambda: torch.device(device))


INDICES = tensor(torch.int32)


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    calls: list[Any] = []

    def fallback(op: Any, *args: Any) -> str:
        calls.append((op, args))
        return "operator"

    monkeypatch.setattr(cpp_templates, "fallback", fallback)
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_kernels_take_three_types_on_a_gpu(dtype: torch.dtype) -> None:
    x = tensor(dtype)
    assert takes(x, x, INDICES, [4, 4])
    assert not takes(tensor(dtype, "cpu"), x, INDICES, [4, 4])
    assert not takes(x, tensor(torch.float64), INDICES, [4, 4])
    assert not takes(x, x, tensor(torch.int64), [4, 4])


def test_no_kernel_multiplies_float64() -> None:
    x = tensor(torch.float64)
    assert not takes(x, x, INDICES, [4, 4])


def test_a_kernel_runs_where_it_applies(called: list[Any]) -> None:
    lower = lowered(OP, lambda x, width: f"kernel of {x} to {width}", bias=1)
    assert lower("x", None, 8) == "kernel of x to 8"
    assert not called


@pytest.mark.parametrize("why", ["a bias", "a map", "it does not apply"])
def test_else_the_operator_is_called_with_all_its_arguments(called: list[Any], why: str) -> None:
    run = (lambda *args: None) if why == "it does not apply" else (lambda *args: "kernel")
    lower = lowered(OP, run, bias=1, through=True)
    args = ("x", "b" if why == "a bias" else None, "map" if why == "a map" else None)
    assert lower(*args) == "operator"
    assert called == [(OP, args)]
