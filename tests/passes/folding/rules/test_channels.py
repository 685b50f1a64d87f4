from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from padst_compiler.passes.fold_permutations import FoldPermutations

from .setting import UNPROVED, N, Net, Rewrite, heads, permute, x


def last(h: Tensor, p: Tensor) -> Tensor:
    """Permute the channels of an image."""
    moved: Tensor = permute(h.movedim(1, -1), p).movedim(-1, 1)
    return moved


@pytest.mark.parametrize(
    "between",
    [
        lambda h, v: F.batch_norm(h, v[0], v[1], v[2], v[3]),
        lambda h, v: F.batch_norm(h, v[0], v[1]),
        lambda h, v: F.conv2d(h, v[:1].view(N, 1, 1, 1), v[1], groups=N).relu(),
        lambda h, v: F.max_pool2d(h, 2),
        lambda h, v: F.avg_pool2d(h, 2, padding=1),
        lambda h, v: F.adaptive_avg_pool2d(h, 2),
        lambda h, v: F.adaptive_max_pool2d(h, 1),
        lambda h, v: F.group_norm(h, 1, v[0], v[1]),
        lambda h, v: F.layer_norm(h, (N, 4, 4)),
        lambda h, v: F.layer_norm(h.movedim(1, -1), (N,), v[0], v[1]).movedim(-1, 1),
        lambda h, v: h.mean((2, 3), keepdim=True) * h,
    ],
)
def test_channels_in_another_order_are_written_and_read(rewrite: Rewrite, between: Net) -> None:
    def run(x: Tensor, p: Tensor, w: Tensor, v: Tensor) -> Any:
        return last(between(F.conv2d(x, w), v), p)

    given = {"p": heads("mixed"), "w": x(N, 5, 1, 1), "v": x(4, N).abs() + 0.1}
    result = rewrite(FoldPermutations(), run, x(2, 5, 4, 4), **given)
    assert (result.moves, result.left) == (0, [])
    assert result.fired[0].startswith("rows of w (convolution)")


def test_a_convolution_reads_and_writes_any_order(rewrite: Rewrite) -> None:
    def run(x: Tensor, p: Tensor, w: Tensor, u: Tensor, b: Tensor) -> Any:
        return F.conv2d(last(F.conv2d(last(x, p), w, b, padding=1).relu(), p), u)

    given = {"w": x(N, N, 3, 3), "u": x(4, N, 3, 3), "b": x(N)}
    result = rewrite(FoldPermutations(), run, x(2, N, 4, 4), p=heads("mixed"), **given)
    assert (result.moves, result.left) == (0, [])


@pytest.mark.parametrize(
    ("how", "moves"), [("heads", 0), ("features", 0), ("both", 0), ("mixed", 1)]
)
def test_group_norm_allows_whole_groups_and_orders_within(
    rewrite: Rewrite, how: str, moves: int
) -> None:
    def run(x: Tensor, p: Tensor, w: Tensor, v: Tensor) -> Any:
        return last(F.group_norm(F.conv2d(x, w), 3, v[0], v[1]), p)

    given = {"p": heads(how), "w": x(N, 5, 1, 1), "v": x(2, N)}
    result = rewrite(FoldPermutations(), run, x(2, 5, 4, 4), **given)
    assert result.moves == moves
    assert len(result.left) == moves
    assert all("the map mixes the groups of a norm" in why for why in result.left)


@pytest.mark.parametrize(
    ("net", "why"),
    [
        (lambda x, w, v: F.conv2d(x, w[:, :4], groups=3), f"convolution.default {UNPROVED}"),
        (
            lambda x, w, v: F.batch_norm(x, None, None, v, v, training=True),
            UNPROVED,
        ),
    ],
)
def test_what_is_not_proved_keeps_the_channels(rewrite: Rewrite, net: Net, why: str) -> None:
    def run(x: Tensor, p: Tensor, w: Tensor, v: Tensor) -> Any:
        return net(last(x, p), w, v)

    given = {"p": heads("mixed"), "w": x(N, N, 1, 1), "v": x(N)}
    result = rewrite(FoldPermutations(), run, x(2, N, 4, 4), **given)
    assert result.moves == 1
    assert why in result.left[0]


def test_space_keeps_its_order(rewrite: Rewrite) -> None:
    for net, why in (
        (lambda h, w: F.conv2d(h, w), "a convolution reads neighbours"),
        (lambda h, w: F.max_pool2d(h, 2), "pooling reads neighbours"),
    ):
        result = rewrite(
            FoldPermutations(),
            lambda x, p, w, net=net: net(permute(x, p), w),
            x(2, 3, 4, N),
            p=heads("mixed"),
            w=x(3, 3, 2, 2),
        )
        assert result.moves == 1
        assert why in result.left[0]


def test_an_embedding_is_written_in_any_order(rewrite: Rewrite) -> None:
    result = rewrite(
        FoldPermutations(),
        lambda i, p, t: permute(F.embedding(i, t), p),
        torch.randint(0, 7, (2, 5)),
        p=heads("mixed"),
        t=x(7, N),
    )
    assert (result.moves, result.fired) == (0, ["columns of t (embedding)"])


def test_an_image_without_a_batch_is_pooled_in_place(rewrite: Rewrite) -> None:
    result = rewrite(
        FoldPermutations(),
        lambda x, p: permute(F.max_pool2d(x, 2).movedim(0, -1), p),
        x(N, 4, 4),
        p=heads("mixed"),
    )
    assert result.moves == 1


@pytest.mark.parametrize("after", [True, False])
def test_a_transposed_convolution_reads_and_writes_channels(rewrite: Rewrite, after: bool) -> None:
    def run(x: Tensor, p: Tensor, w: Tensor, b: Tensor) -> Any:
        h = x if after else permute(x.mT.cumsum(-1), p).mT
        h = F.conv_transpose2d(h.unsqueeze(-1), w, b, stride=(2, 1)).squeeze(-1)
        return permute(h.mT, p) if after else h

    p = torch.tensor([2, 0, 1, 4, 5, 3])
    frozen = {"p": p, "w": torch.randn(6, 6, 2, 1).double(), "b": torch.randn(6).double()}
    result = rewrite(FoldPermutations(), run, torch.randn(2, 6, 4).double(), **frozen)
    assert (result.moves, result.left) == (0, [])
