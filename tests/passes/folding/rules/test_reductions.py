from typing import Any

import pytest
from torch import Tensor
from torch.nn import functional as F

from padst_compiler.passes.fold_permutations import FoldPermutations

from .setting import N, Net, Rewrite, heads, permute, x


@pytest.mark.parametrize(
    "read",
    [
        lambda h: h.sum(-1),
        lambda h: h.mean((0, 1)),
        lambda h: h.amax(-1, keepdim=True) - h.amin(-1, keepdim=True),
        lambda h: h.logsumexp(-1),
        lambda h: h.var(-1) + h.prod(-1),
        lambda h: h.sum() + h.mean(),
        lambda h: (h > 0).any(-1) & (h > -9).all(-1),
        lambda h: h.softmax(-1).square().sum(-1),
        lambda h: h.log_softmax(0).sum((-1, 0)),
    ],
)
def test_what_is_reduced_is_seen_in_no_order(rewrite: Rewrite, read: Net) -> None:
    result = rewrite(
        FoldPermutations(), lambda x, p: read(permute(x.exp(), p)), x(6, N), p=heads("mixed")
    )
    if result.left:  # an input comes in its own order, and so the map vanishes at once
        pytest.fail(str(result.left))
    assert result.moves == 0


def test_what_stays_of_a_reduction_keeps_its_order(rewrite: Rewrite) -> None:
    result = rewrite(
        FoldPermutations(),
        lambda x, p, w: permute(F.linear(x, w).sum(0), p) + permute(F.linear(x, w).mean(0), p),
        x(6, N),
        p=heads("mixed"),
        w=x(N, N),
    )
    assert (result.moves, result.left) == (0, [])


@pytest.mark.parametrize(
    ("read", "moves"),
    [
        (lambda h: h.cumsum(0), 1),
        (lambda h: h.cumsum(-1).sum(-1), 1),
        (lambda h: h.flip(0).sum(-1), 0),
        (lambda h: h.roll(1, 0).sum(-1), 0),
        (lambda h: h.cumprod(0).amax(-1), 0),
        (lambda h: h.roll(1).sum(-1), 1),  # over all dimensions at once
        (lambda h: h.argmax(-1), 1),
        (lambda h: h.softmax(-1), 1),
        (lambda h: h.view(6, 3, 4).sum(-1), 1),
        (lambda h: h.view(6, 3, 4).amax((1, 2)), 0),
    ],
)
def test_what_sees_the_order_keeps_it(rewrite: Rewrite, read: Net, moves: int) -> None:
    result = rewrite(
        FoldPermutations(), lambda x, p: read(permute(x, p)), x(6, N), p=heads("mixed")
    )
    assert (result.moves, len(result.left)) == (moves, moves)


@pytest.mark.parametrize(
    ("how", "moves"), [("heads", 0), ("features", 0), ("both", 0), ("mixed", 1)]
)
def test_a_sum_over_features_of_heads_allows_whole_heads(
    rewrite: Rewrite, how: str, moves: int
) -> None:
    def run(x: Tensor, p: Tensor) -> Any:
        return permute(x, p).view(6, 3, 4).sum(-1).amax(-1)

    result = rewrite(FoldPermutations(), run, x(6, N), p=heads(how))
    assert result.moves == moves
