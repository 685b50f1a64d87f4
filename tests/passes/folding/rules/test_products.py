from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from padst_compiler.passes.fold_permutations import FoldPermutations

from .setting import N, Net, Rewrite, heads, permute, x


@pytest.mark.parametrize(
    ("net", "moves"),
    [
        (lambda x, p, w: permute(x, p) @ w, 0),
        (lambda x, p, w: w.t() @ permute(x, p).t(), 0),  # the matrix on the left
        (lambda x, p, w: permute((w @ x.t()).t(), p), 0),
        (lambda x, p, w: permute(x, p) @ permute(x, p).t(), 0),  # contracted with itself
        (lambda x, p, w: permute(x, p) @ x.t(), 1),
        (lambda x, p, w: permute(x, p).t() @ x, 1),  # rows of the output
        (lambda x, p, w: torch.addmm(x @ w, permute(x, p), w), 0),
        (lambda x, p, w: torch.addmm(permute(x @ w, p), x, w), 0),
        (lambda x, p, w: permute(torch.addmm(x @ w, x, w), p), 0),
        (lambda x, p, w: permute(torch.addmm(x, x, w), p), 1),
        (lambda x, p, w: (permute(x, p).view(N, 3, 4) @ w[:4]).sum(), 1),  # reads a part
    ],
)
def test_products(rewrite: Rewrite, net: Net, moves: int) -> None:
    result = rewrite(FoldPermutations(), net, x(N, N), p=heads("mixed"), w=x(N, N))
    assert (result.moves, len(result.left)) == (moves, moves)


def test_live_factors_keep_one_order(rewrite: Rewrite) -> None:
    def run(x: Tensor, p: Tensor, w: Tensor, u: Tensor) -> Any:
        a, b = permute(F.linear(x, w), p), permute(F.linear(x, u), p)
        return a @ b.t(), torch.bmm(a.view(2, 3, N), b.view(2, 3, N).transpose(1, 2))

    given = {"p": heads("mixed"), "w": x(N, N), "u": x(N, N)}
    result = rewrite(FoldPermutations(), run, x(6, N), **given)
    assert (result.moves, result.left) == (0, [])


@pytest.mark.parametrize("reads", [True, False])
def test_experts_follow_along_rows_columns_and_their_own_dimension(
    rewrite: Rewrite, reads: bool
) -> None:
    def run(x: Tensor, p: Tensor, q: Tensor, e: Tensor, w: Tensor, u: Tensor) -> Any:
        if reads:
            return torch.bmm(permute(x, p), e).sum()
        h = permute(torch.bmm(x, e), q)
        return F.linear(h, u)

    given = {"p": torch.randperm(4), "q": heads("mixed"), "e": x(3, 4, N)}
    result = rewrite(FoldPermutations(), run, x(3, 5, 4), **given, w=x(N, N), u=x(N, N))
    assert (result.moves, result.left) == (0, [])


@pytest.mark.parametrize("perm", [heads("mixed"), torch.randperm(N)])
def test_a_map_of_digits_in_another_sequence_is_a_map_of_the_axis(
    rewrite: Rewrite, perm: Tensor
) -> None:
    def run(x: Tensor, p: Tensor, w: Tensor) -> Any:
        return permute(F.linear(x, w).view(6, 3, 4).transpose(1, 2).reshape(6, N), p)

    result = rewrite(FoldPermutations(), run, x(6, N), p=perm, w=x(N, N))
    assert (result.moves, result.left) == (0, [])


@pytest.mark.parametrize(("how", "moves"), [("features", 0), ("heads", 0), ("mixed", 1)])
def test_a_map_of_two_axes_must_be_one_of_each(rewrite: Rewrite, how: str, moves: int) -> None:
    def run(x: Tensor, p: Tensor, w: Tensor) -> Any:  # 3 tokens of 4 features
        return permute(F.linear(x, w).view(2, 3, 4).permute(0, 1, 2).reshape(2, N), p)

    def tokens(x: Tensor, p: Tensor, w: Tensor) -> Any:
        return permute(F.linear(x, w).reshape(2, N), p)

    assert rewrite(FoldPermutations(), run, x(2, N), p=heads(how), w=x(N, N)).moves == 0
    fixed = 1 if how == "heads" else moves  # the order of the tokens is the input's
    assert rewrite(FoldPermutations(), tokens, x(2, 3, 4), p=heads(how), w=x(4, 4)).moves == fixed


def test_maps_of_one_number_vanish(rewrite: Rewrite) -> None:
    result = rewrite(FoldPermutations(), lambda x, p: permute(x, p), x(6, 1), p=torch.tensor([0]))
    assert (result.moves, result.left) == (0, [])


def test_a_fixed_axis_between_two_linears(rewrite: Rewrite) -> None:
    def run(x: Tensor, p: Tensor, w: Tensor, u: Tensor) -> Any:
        h = F.linear(x, w)
        return F.linear(permute(h, p).relu(), u) + h  # the residual fixes h, u follows

    given = {"p": heads("mixed"), "w": x(N, N), "u": x(N, N)}
    result = rewrite(FoldPermutations(), run, x(6, N), **given)
    assert (result.moves, result.fired) == (0, ["columns of u (dense)"])
