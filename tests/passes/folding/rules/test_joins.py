from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from padst_compiler.passes.fold_permutations import FoldPermutations

from .setting import N, Rewrite, permute, x


@pytest.mark.parametrize(("split", "moves"), [(4, 0), (3, 1)])
def test_a_map_of_two_axes_joined_falls_into_one_of_each(
    rewrite: Rewrite, split: int, moves: int
) -> None:
    def run(x: Tensor, p: Tensor, w: Tensor, u: Tensor) -> Any:
        return permute(torch.cat([F.linear(x, w), F.linear(x, u)], -1), p)

    p = torch.cat([torch.randperm(4), 4 + torch.arange(8).flip(0)])
    frozen = {"p": p, "w": x(split, N), "u": x(N - split, N)}
    if moves:
        frozen["p"] = torch.arange(N).roll(5)
    assert rewrite(FoldPermutations(), run, x(3, N), **frozen).moves == moves


@pytest.mark.parametrize("together", [True, False])
def test_halves_that_change_places_move_together(rewrite: Rewrite, together: bool) -> None:
    def run(x: Tensor, p: Tensor, w: Tensor) -> Any:
        h = F.linear(x, w)
        return permute(h * 0.6 + torch.cat([-h[:, 6:], h[:, :6]], -1), p)

    half = torch.tensor([3, 1, 4, 0, 5, 2])
    p = torch.cat([half, 6 + half]) if together else torch.arange(N).roll(1)
    found = rewrite(FoldPermutations(), run, x(3, N), p=p, w=x(N, N))
    assert found.moves == (0 if together else 1)


def test_positions_read_one_by_one_are_seen_apart_from_features(rewrite: Rewrite) -> None:
    def run(x: Tensor, p: Tensor, w: Tensor) -> Any:
        return permute(F.linear(x, w).index_select(0, torch.tensor([2, 0, 2])), p)

    p = torch.arange(N).roll(1)
    assert rewrite(FoldPermutations(), run, x(3, N), p=p, w=x(N, N)).left == []
