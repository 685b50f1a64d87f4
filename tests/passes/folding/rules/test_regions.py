from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from padst_compiler.passes.fold_permutations import FoldPermutations

from .setting import N, Net, Rewrite, permute, x

MIXED = torch.arange(N).roll(1)


def moves(rewrite: Rewrite, between: Net, rows: int, p: Tensor) -> int:
    def run(x: Tensor, p: Tensor, w: Tensor) -> Any:
        return permute(between(F.linear(x, w)), p)

    found: int = rewrite(FoldPermutations(), run, x(6, N), p=p, w=x(rows, N)).moves
    return found


def test_the_halves_of_a_glu_move_together(rewrite: Rewrite) -> None:
    assert moves(rewrite, F.glu, 2 * N, MIXED) == 0
    assert moves(rewrite, lambda h: F.glu(h.cumsum(-1)), 2 * N, MIXED) == 1


@pytest.mark.parametrize(("p", "count"), [("each", 0), ("copies", 0), ("mixed", 1)])
def test_copies_keep_one_order_and_may_change_places(rewrite: Rewrite, p: str, count: int) -> None:
    table = torch.arange(N).view(3, 4)
    maps = {"each": table[:, [1, 3, 0, 2]], "copies": table[[2, 0, 1]], "mixed": MIXED}
    assert moves(rewrite, lambda h: h.repeat(1, 3), 4, maps[p].flatten()) == count


@pytest.mark.parametrize(
    ("between", "count"),
    [
        (lambda h: torch.slice_scatter(h, h[:2].exp(), 0, 2, 4), 0),
        (lambda h: torch.select_scatter(h, h[0].exp(), 0, 3), 0),
        (lambda h: torch.slice_scatter(h.new_zeros(9, N), h, 0, 1, 7), 0),
        (lambda h: torch.slice_scatter(h, torch.ones(2, N, dtype=h.dtype), 0, 1, 3), 0),
        (lambda h: torch.slice_scatter(h, h[:, :2].exp(), 1, 3, 5), 1),
        (lambda h: torch.select_scatter(h, h[:, 0], 1, 3), 1),
        (lambda h: torch.select_scatter(h, torch.ones(N, dtype=h.dtype), 0, 3), 0),
        (lambda h: torch.slice_scatter(h, h, 0, 0, 6), 1),
    ],
)
def test_what_is_written_along_another_axis_lets_a_map_through(
    rewrite: Rewrite, between: Net, count: int
) -> None:
    assert moves(rewrite, between, N, MIXED) == count


def test_pixels_are_digits_of_the_channels(rewrite: Rewrite) -> None:
    def run(x: Tensor, p: Tensor, w: Tensor) -> Any:
        h = F.linear(x, w).permute(0, 3, 1, 2)
        return permute(F.pixel_shuffle(h, 2).permute(0, 2, 3, 1), p)

    frozen = {"p": torch.tensor([2, 0, 1]), "w": x(N, N)}
    assert rewrite(FoldPermutations(), run, x(2, 3, 3, N), **frozen).moves == 0

    def across(x: Tensor, p: Tensor, w: Tensor) -> Any:
        h = permute(F.linear(x, w), p).permute(0, 3, 1, 2)
        return F.pixel_shuffle(h, 2).flatten(2).cumsum(-1)

    assert rewrite(FoldPermutations(), across, x(2, 3, 3, N), p=MIXED, w=x(N, N)).moves == 0


def test_shuffled_channels_are_digits_in_another_sequence(rewrite: Rewrite) -> None:
    def run(x: Tensor, p: Tensor, w: Tensor) -> Any:
        h = F.channel_shuffle(F.linear(x, w).permute(0, 3, 1, 2), 3)
        return permute(h.permute(0, 2, 3, 1), p)

    frozen = {"p": MIXED, "w": x(N, N)}
    assert rewrite(FoldPermutations(), run, x(2, 3, 3, N), **frozen).left == []


@pytest.mark.parametrize(("space", "fired"), [(True, 1), (False, 0)])
def test_positions_of_space_let_the_channels_move(
    rewrite: Rewrite, space: bool, fired: int
) -> None:
    def run(x: Tensor, p: Tensor, w: Tensor) -> Any:
        h, at = F.linear(x, w), torch.tensor([2, 0, 2, 1])
        read = h.permute(2, 0, 1)[:, at.unsqueeze(1), at] if space else h[:, :, at.repeat(3)]
        return permute(read.permute(1, 2, 0) if space else read, p)

    result = rewrite(FoldPermutations(), run, x(3, 3, N), p=MIXED, w=x(N, N))
    assert (len(result.fired), len(result.left)) == (fired, 1 - fired)


def test_what_holds_one_number_comes_in_any_order(rewrite: Rewrite) -> None:
    def run(x: Tensor, p: Tensor, w: Tensor) -> Any:
        h = F.linear(x, w)
        return permute(h + h.new_ones(6, N) - torch.zeros_like(h), p)

    assert rewrite(FoldPermutations(), run, x(6, N), p=MIXED, w=x(N, N)).left == []
