"""Nets of several tensors, permuted and read: how often data move, and what stands in the way."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from padst_compiler.passes.fold_permutations import FoldPermutations

from .setting import N, Rewrite, permute, x


@pytest.mark.parametrize(
    "between",
    [
        lambda a, b, v: a + b,
        lambda a, b, v: torch.where(a > v, b, 0.0),
        lambda a, b, v: a * b.sum(-1, keepdim=True),
        lambda a, b, v: a * v[:1] + b * v,
        lambda a, b, v: a.view(3, 3, 4) * b.view(3, 3, 4) + v.view(3, 4),  # heads apart, in step
        lambda a, b, v: torch.addcmul(a, b, v),
    ],
)
def test_operands_with_one_order_move_together(rewrite: Rewrite, between: Any) -> None:
    def run(x: Tensor, p: Tensor, w: Tensor, u: Tensor, v: Tensor) -> Any:
        return permute(between(F.linear(x, w), F.linear(x, u), v).reshape(3, N), p)

    given = {"p": torch.randperm(N), "w": x(N, N), "u": x(N, N), "v": x(N)}
    result = rewrite(FoldPermutations(), run, x(3, N), **given)
    assert (result.moves, result.left) == (0, [])
    assert "rows of w (dense)" in result.fired[0]


@pytest.mark.parametrize(
    ("between", "why"),
    [
        (lambda a, x, v: a + x, "it permutes a graph input (arg0_1)"),
        (lambda a, x, v: a * a.t(), "it permutes a graph input (arg0_1)"),
        (lambda a, x, v: a.view(N, 3, 4) * v[:4], "a constant is added in its own order"),
        (lambda a, x, v: a.view(N, 3, 4) + a.view(N, 4, 3).transpose(1, 2), "reaches an output"),
    ],
)
def test_operands_in_several_orders_stop_a_map(rewrite: Rewrite, between: Any, why: str) -> None:
    def run(x: Tensor, p: Tensor, w: Tensor, v: Tensor) -> Any:
        return permute(between(F.linear(x, w), x, v).reshape(-1, N), p)

    try:
        between(x(N, N), x(N, N), x(N))
    except RuntimeError:
        pytest.fail("the case is no graph")
    given = {"p": torch.randperm(N), "w": x(N, N), "v": x(N)}
    result = rewrite(FoldPermutations(), run, x(N, N), **given)
    assert (result.moves, result.fired) == (1, [])
    assert why in result.left[0]


def test_a_constant_matrix_follows_along_both_dimensions(rewrite: Rewrite) -> None:
    def run(x: Tensor, p: Tensor, q: Tensor, w: Tensor, c: Tensor) -> Any:
        y = permute(F.linear(x, w) * c, p)  # columns of c
        return permute(F.linear(y, w).t(), q)  # rows are those of the input

    given = {"p": torch.randperm(N), "q": torch.randperm(3), "w": x(N, N), "c": x(3, N)}
    result = rewrite(FoldPermutations(), run, x(3, N), **given)
    assert result.moves == 1
    assert len(result.fired) == len(result.left) == 1
