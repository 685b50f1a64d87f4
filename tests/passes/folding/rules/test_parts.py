from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from padst_compiler.passes.fold_permutations import FoldPermutations

from .setting import UNPROVED, N, Net, Rewrite, heads, permute, x


@pytest.mark.parametrize(
    "between",
    [
        lambda h: h.chunk(3, 0)[1],
        lambda h: h[2:5].relu(),
        lambda h: torch.cat([h[:2], h[4:]], 0),
        lambda h: torch.stack([h, h.tanh()], 0),
        lambda h: h.index_select(0, torch.tensor([3, 1])),
        lambda h: h.select(0, -1) + h.unbind(0)[2],
        lambda h: torch.cat([h, h], 0).split([5, 7], 0)[1],
        lambda h: h[::2],
    ],
)
def test_parts_of_other_dimensions_let_a_map_through(rewrite: Rewrite, between: Net) -> None:
    result = rewrite(
        FoldPermutations(),
        lambda x, p, w: permute(between(F.linear(x, w)), p),
        x(6, N),
        p=heads("mixed"),
        w=x(N, N),
    )
    assert "permute" not in result.after
    assert result.left == []


@pytest.mark.parametrize(
    "take",
    [
        lambda h: h.split([N, N], -1),
        lambda h: h.chunk(2, -1),
        lambda h: (h[:, :N], h[:, N:]),
        lambda h: h.view(6, 2, N).unbind(1),
        lambda h: (h.view(6, 2, N)[:, 0], h.view(6, 2, N).select(1, -1)),
    ],
)
def test_every_part_of_a_fused_writer_has_its_own_order(rewrite: Rewrite, take: Net) -> None:
    def run(x: Tensor, p: Tensor, q: Tensor, w: Tensor) -> Any:
        one, two = take(F.linear(x, w))
        return permute(one, p), permute(two, q)

    given = {"p": heads("mixed"), "q": torch.randperm(N), "w": x(2 * N, N)}
    result = rewrite(FoldPermutations(), run, x(6, N), **given)
    assert (result.moves, len(result.fired), result.left) == (0, 2, [])


def test_a_reader_of_two_parts_follows_both(rewrite: Rewrite) -> None:
    def run(x: Tensor, p: Tensor, q: Tensor, w: Tensor) -> Any:
        return F.linear(torch.cat([permute(x, p), permute(x.exp(), q)], -1), w)

    given = {"p": heads("mixed"), "q": torch.randperm(N), "w": x(N, 2 * N)}
    result = rewrite(FoldPermutations(), run, x(6, N), **given)
    assert (result.moves, result.left) == (0, [])


def test_a_map_over_two_parts_that_mixes_them_stays(rewrite: Rewrite) -> None:
    def run(x: Tensor, p: Tensor, w: Tensor, u: Tensor) -> Any:
        return permute(torch.cat([F.linear(x, w), F.linear(x, u)], -1), p)

    given = {"p": torch.arange(2 * N).roll(1), "w": x(N, N), "u": x(N, N)}
    result = rewrite(FoldPermutations(), run, x(6, N), **given)
    assert result.moves == 1
    mixes = "the map mixes parts of an axis that are used apart"
    assert result.left == [f"{mixes}; it reaches an output of the graph"]


@pytest.mark.parametrize(
    ("take", "why"),
    [
        (lambda h: h[:, 1::2], "slice.Tensor takes a part"),
        (lambda h: h.index_select(-1, torch.tensor([3, 1])), "index_select.default takes a part"),
        (lambda h: h.view(6, 3, 4)[:, :, 1], "select.int takes a part"),
        (lambda h: h.sort(-1).values, f"sort.default {UNPROVED}"),
    ],
)
def test_positions_that_are_read_one_by_one_fix_the_order(
    rewrite: Rewrite, take: Net, why: str
) -> None:
    def run(x: Tensor, p: Tensor) -> Any:
        return take(permute(x, p)), permute(x, p)

    result = rewrite(FoldPermutations(), run, x(6, N), p=heads("mixed"))
    assert result.after.count("permute") == 1
    reasons = " ".join(result.left)
    assert "it permutes a graph input (arg0_1)" in reasons
    assert why in reasons


def test_a_constant_part_of_a_cat_comes_in_its_own_order(rewrite: Rewrite) -> None:
    def run(x: Tensor, p: Tensor, c: Tensor, w: Tensor) -> Any:
        return permute(torch.cat([F.linear(x, w), c], -1), p)

    given = {"c": x(6, 2), "w": x(N, N)}
    p = torch.arange(N + 2).roll(1)
    result = rewrite(FoldPermutations(), run, x(6, N), p=p, **given)
    assert result.moves == 1
    assert "it reaches an output of the graph" in result.left[0]


def test_a_stack_with_a_constant_is_not_proved(rewrite: Rewrite) -> None:
    def run(x: Tensor, p: Tensor, c: Tensor, w: Tensor) -> Any:
        return permute(torch.stack([F.linear(x, w), c]), p)

    result = rewrite(FoldPermutations(), run, x(6, N), p=heads("mixed"), c=x(6, N), w=x(N, N))
    assert result.moves == 1
    assert f"stack.default {UNPROVED}" in result.left[0]
