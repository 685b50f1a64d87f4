from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import padst_compiler as padst
from padst_compiler.gpu_cases import Case
from padst_compiler.gpu_check import (
    TOLERANCE,
    checked_rows,
    error,
    expected_of,
    is_right,
    largest,
    weight_gradient,
    worst_of,
)
from padst_compiler.gpu_layers import DTYPES
from padst_compiler.layers import SparseLayer

CASE = Case("layers", (16, 32), 5, "nm:4", dtype="fp32")


def sparse(permutation: str = "none") -> SparseLayer:
    model = nn.Sequential(nn.Linear(16, 32))
    config = padst.SparseConfig("nm:4", sparsity=0.5, permutation=permutation)
    padst.sparsify(model, config, filter_fn=lambda site: True)
    (layer,) = padst.sparse_layers(model).values()
    return layer


def test_the_ends_are_compared_and_few_between_them() -> None:
    many = checked_rows(torch.zeros(50432, 1))
    assert many.shape == (64,) and many[[0, -1]].tolist() == [0, 50431]
    assert checked_rows(torch.zeros(1, 3)).tolist() == [0]
    assert checked_rows(torch.zeros(5, 3)).tolist() == [0, 1, 2, 3, 4]


def test_nan_is_never_right() -> None:
    x = torch.tensor([1.0, float("nan")])
    assert not is_right(error(x, torch.ones(2)), CASE)
    assert not is_right(largest([0.0, float("nan")]), CASE)
    assert is_right(largest([0.0, 1e-6]), CASE) and not is_right(1e-3, CASE)
    assert set(TOLERANCE) == set(DTYPES)


@pytest.mark.parametrize("permutation", ["none", "random"])
def test_what_is_expected_is_what_the_layer_computes(permutation: str) -> None:
    layer, x = sparse(permutation), torch.randn(5, 16)
    with torch.no_grad():
        y = layer(x)
    assert error(y, expected_of(layer, x)) < 1e-6
    assert layer.bias is not None
    assert error(y - layer.bias, expected_of(layer, x, bias=False)) < 1e-6


def test_the_gradient_of_values_is_autograd_s() -> None:
    layer, x, grad = sparse(), torch.randn(5, 16), torch.randn(5, 32)
    (expected,) = torch.autograd.grad(layer(x), [layer.values], grad)
    assert error(expected, weight_gradient(layer, x, grad)) < 1e-6


def test_the_worst_of_the_contestants_that_are_there_counts() -> None:
    def gives(y: Tensor) -> object:
        return lambda: (y,)  # as a graph does

    expected, rows = torch.ones(2, 3).double(), torch.tensor([0, 1])
    calls = {"good": gives(torch.ones(2, 3)), "bad": gives(torch.full((2, 3), 1.5))}
    assert worst_of(calls, ("good", "missing"), expected, rows) == 0.0  # type: ignore[arg-type]
    assert worst_of(calls, ("good", "bad"), expected, rows) == 0.5  # type: ignore[arg-type]
