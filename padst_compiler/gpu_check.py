"""What layers on a GPU compute against float64, on some of the tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from padst_compiler.gpu_cases import Case
from padst_compiler.layers import SparseLayer

__all__ = [
    "TOLERANCE",
    "checked_rows",
    "error",
    "expected_of",
    "is_right",
    "largest",
    "weight_gradient",
    "worst_of",
]

TOLERANCE = {"bf16": 1e-2, "fp16": 2e-3, "fp32": 2e-5, "tf32": 3e-3}
"""Largest difference to float64 that is rounding, relative to the largest number."""

CHECKED = 64  # rows of an output that are compared


def checked_rows(y: Tensor) -> Tensor:
    """Return the places of tokens that are compared: the ends, and some between them."""
    last = y.shape[0] - 1
    places: Tensor = torch.linspace(0, last, min(CHECKED, last + 1)).round().long().unique()
    return places.to(y.device)


def error(got: Tensor, expected: Tensor) -> float:
    """Return the largest difference, relative to the largest number; NaN stays NaN.

    Example:
        >>> error(torch.tensor([1.0, 2.5]), torch.tensor([1.0, 2.0]))
        0.25
    """
    largest = expected.abs().max().clamp(min=1e-30)
    return float((got.detach().to(expected.dtype) - expected).abs().max() / largest)


def expected_of(layer: SparseLayer, x: Tensor, *, bias: bool = True) -> Tensor:
    """Return what a layer computes, in float64."""
    y: Tensor = x.double() @ layer.weight.detach().double().t()
    return y + layer.bias.detach().double() if bias and layer.bias is not None else y


def weight_gradient(layer: SparseLayer, x: Tensor, grad: Tensor) -> Tensor:
    """Return the gradient of a layer's values, in float64."""
    packed: Tensor = layer.structure.pack(grad.double().t() @ x.double(), layer.indices)
    return packed


def worst_of(
    calls: Mapping[str, Callable[[], Any]], names: Sequence[str], expected: Tensor, rows: Tensor
) -> float:
    """Return the largest error of the contestants that there are."""
    present = [calls[name]() for name in names if name in calls]
    return largest([error(_pytree.tree_leaves(y)[0][rows], expected) for y in present])


def largest(errors: Sequence[Any]) -> float:
    """Return the largest, NaN if one is."""
    return float(torch.tensor([0.0, *errors], dtype=torch.float64).max())


def is_right(largest: float, case: Case) -> bool:
    """Whether an error is rounding; NaN is not."""
    return largest <= TOLERANCE[case.dtype]
