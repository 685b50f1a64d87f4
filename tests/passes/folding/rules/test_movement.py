from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from padst_compiler.passes.fold_permutations import FoldPermutations

from .setting import N, Net, Rewrite, heads, permute, x


@pytest.mark.parametrize(
    "between",
    [
        lambda h: h.clone().contiguous().detach(),
        lambda h: h.view(6, 3, 4).reshape(2, 3, N),
        lambda h: h.view(2, 3, 3, 4).permute(2, 0, 3, 1).permute(1, 3, 0, 2).reshape(6, N),
        lambda h: h.t().t().unsqueeze(1).squeeze(1),
        lambda h: h.unsqueeze(0).squeeze(),
        lambda h: h.unsqueeze(1).expand(6, 5, N),
        lambda h: h.view(2, 3, N).view(3, 2, N),  # the rows cut across, the columns do not
        lambda h: h.view(6, N, 1, 1).reshape(3, 2, 1, N),
    ],
)
@pytest.mark.parametrize("how", ["heads", "features", "both", "mixed"])
def test_views_let_every_order_through(rewrite: Rewrite, between: Net, how: str) -> None:
    def run(x: Tensor, p: Tensor, w: Tensor) -> Any:
        return permute(between(F.linear(x, w)), p)

    result = rewrite(FoldPermutations(), run, x(6, N), p=heads(how), w=x(N, N))
    assert (result.moves, result.left) == (0, [])


@pytest.mark.parametrize(
    ("how", "moves"), [("heads", 0), ("features", 0), ("both", 1), ("mixed", 1)]
)
def test_heads_and_features_apart_allow_what_keeps_them_apart(
    rewrite: Rewrite, how: str, moves: int
) -> None:
    def run(x: Tensor, p: Tensor, w: Tensor) -> Any:
        h = F.linear(x, w).view(6, 3, 4).transpose(0, 1)
        h = h.softmax(-1).softmax(0).transpose(0, 1)  # each sees a part of the axis only
        return permute(h.reshape(6, N), p)

    result = rewrite(FoldPermutations(), run, x(6, N), p=heads(how), w=x(N, N))
    assert result.moves == moves
    assert result.left == ["uses a part of an axis; it reaches an output of the graph"] * moves


@pytest.mark.parametrize(
    ("between", "why"),
    [
        (
            lambda h: h.view(4, 18).reshape(6, N),
            "a view cuts across an axis",
        ),
        (lambda h: h.t().reshape(6, N), "put together of parts"),
        (lambda h: h.unsqueeze(1).expand(6, 2, N).reshape(6, 2 * N)[:, :N], ""),
    ],
)
def test_views_across_an_axis_stop_a_map(rewrite: Rewrite, between: Net, why: str) -> None:
    def run(x: Tensor, p: Tensor, w: Tensor) -> Any:
        return permute(between(F.linear(x, w)), p)

    result = rewrite(FoldPermutations(), run, x(6, N), p=heads("mixed"), w=x(N, N))
    assert (result.moves, result.fired) == (1, [])
    assert why in result.left[0]


def test_a_constant_repeated_over_the_batch_follows(rewrite: Rewrite) -> None:
    def run(x: Tensor, p: Tensor, c: Tensor, w: Tensor) -> Any:
        tokens = torch.cat([c.expand(x.shape[0], 1, N), F.linear(x, w)], 1)
        return permute(tokens, p)

    given = {"p": heads("mixed"), "c": x(1, 1, N), "w": x(N, N)}
    result = rewrite(FoldPermutations(), run, x(2, 3, N), dynamic=True, **given)
    assert (result.moves, result.left) == (0, [])
