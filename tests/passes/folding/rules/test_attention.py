from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from padst_compiler.passes.fold_permutations import FoldPermutations

from .setting import N, Rewrite, heads, permute, x


def attend(q: Tensor, k: Tensor, v: Tensor, **how: Any) -> Tensor:
    q, k, v = (t.view(2, 5, 3, 4).transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, **how)
    return out.transpose(1, 2).reshape(2, 5, N)


def given(**maps: Tensor) -> dict[str, Tensor]:
    return {"wq": x(N, N), "wk": x(N, N), "wv": x(N, N), **maps}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("how", "moves"), [("heads", 0), ("features", 0), ("both", 0), ("mixed", 1)]
)
def test_the_result_moves_with_the_values_where_heads_stay_whole(
    rewrite: Rewrite, how: str, moves: int, causal: bool
) -> None:
    def run(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, p: Tensor) -> Any:
        out = attend(F.linear(x, wq), F.linear(x, wk), F.linear(x, wv), is_causal=causal)
        return permute(out, p)

    result = rewrite(FoldPermutations(), run, x(2, 5, N), **given(p=heads(how)))
    assert (result.moves, len(result.left)) == (moves, moves)


@pytest.mark.parametrize(("how", "moves"), [("features", 0), ("heads", 0), ("mixed", 0)])
def test_queries_and_keys_in_one_order_are_written_so(
    rewrite: Rewrite, how: str, moves: int
) -> None:
    def run(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, p: Tensor) -> Any:
        q, k = permute(F.linear(x, wq), p), permute(F.linear(x, wk), p)
        return attend(q, k, F.linear(x, wv))

    result = rewrite(FoldPermutations(), run, x(2, 5, N), **given(p=heads(how)))
    assert (result.moves, result.left) == (moves, [])


def test_one_map_before_all_three_goes_into_the_writers(rewrite: Rewrite) -> None:
    def run(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, p: Tensor) -> Any:
        return attend(*(permute(F.linear(x, w), p) for w in (wq, wk, wv)))

    assert rewrite(FoldPermutations(), run, x(2, 5, N), **given(p=heads("mixed"))).moves == 0


def test_one_tensor_as_query_key_and_value(rewrite: Rewrite) -> None:
    def run(x: Tensor, wq: Tensor, p: Tensor, **rest: Tensor) -> Any:
        h = F.linear(x, wq)
        return permute(attend(h, h, h), p)

    maps = {"p": heads("both")}
    assert rewrite(FoldPermutations(), run, x(2, 5, N), **given(**maps)).moves == 0


@pytest.mark.parametrize("live", [True, False])
def test_a_mask_comes_in_its_own_order(rewrite: Rewrite, live: bool) -> None:
    def run(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, p: Tensor, m: Tensor) -> Any:
        mask = m + x.sum() if live else m
        out = attend(F.linear(x, wq), F.linear(x, wk), F.linear(x, wv), attn_mask=mask)
        return permute(out, p)

    # Here attention is captured as products: what is added to the scores follows the heads.
    for how, moves in (("features", 0), ("heads", 0)):
        maps = given(p=heads(how), m=x(3, 5, 5))
        assert rewrite(FoldPermutations(), run, x(2, 5, N), **maps).moves == moves


def test_tokens_in_another_order_are_refused_where_attention_is_causal(rewrite: Rewrite) -> None:
    def run(x: Tensor, p: Tensor, t: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, c: bool) -> Any:
        x = permute(x.transpose(1, 2), t).transpose(1, 2)
        out = attend(F.linear(x, wq), F.linear(x, wk), F.linear(x, wv), is_causal=c)
        return out.sum(1)

    for causal, moves in ((False, 0), (True, 1)):
        net = lambda x, c=causal, **rest: run(x, c=c, **rest)  # noqa: E731
        maps = given(p=heads("heads"), t=torch.randperm(5))
        result = rewrite(FoldPermutations(), net, x(2, 5, N), **maps)
        assert result.moves == moves
