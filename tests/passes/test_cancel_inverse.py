from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from padst_compiler.index_map import invert
from padst_compiler.passes.cancel_inverse import CancelInverse

permute, inverse = torch.ops.padst.permute, torch.ops.padst.invert
Rewrite = Callable[..., Any]


def x(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 3, 8)])
def test_a_map_and_its_inverse_cancel(rewrite: Rewrite, shape: tuple[int, ...]) -> None:
    result = rewrite(
        CancelInverse(),
        lambda x, p: permute(permute(x, p), inverse(p)),
        x(*shape),
        p=torch.randperm(8),
    )
    assert result.before == ["permute", "permute"]
    assert result.after == []
    assert result.fired == ["an inverse pair cancels"]
    assert result.where == ["p"]


def test_the_inverse_may_come_first(rewrite: Rewrite) -> None:
    result = rewrite(
        CancelInverse(),
        lambda x, p: permute(permute(x, inverse(p)), p),
        x(3, 8),
        p=torch.randperm(8),
    )
    assert result.after == []


def test_a_pair_cancels_though_no_number_is_known(rewrite: Rewrite) -> None:
    result = rewrite(
        CancelInverse(), lambda x, p: permute(permute(x, p), inverse(p)), x(3, 8), torch.randperm(8)
    )
    assert "permute" not in result.after
    assert result.fired == ["an inverse pair cancels"]


def test_frozen_maps_cancel_by_their_numbers(rewrite: Rewrite) -> None:
    table = torch.randperm(8)
    result = rewrite(
        CancelInverse(),
        lambda x, p, q: permute(permute(x, p), q),
        x(3, 8),
        p=table,
        q=invert(table),
    )
    assert result.after == []
    assert result.fired == ["an inverse pair cancels"]


def test_two_maps_become_one(rewrite: Rewrite) -> None:
    result = rewrite(
        CancelInverse(),
        lambda x, p, q: permute(permute(x, p), q),
        x(3, 8),
        p=torch.randperm(8),
        q=torch.randperm(8),
    )
    assert (result.before, result.after) == (["permute", "permute"], ["permute"])
    assert result.fired == ["two maps become one"]


def test_two_unknown_maps_become_one(rewrite: Rewrite) -> None:
    result = rewrite(
        CancelInverse(),
        lambda x, p, q: permute(permute(x, p), q),
        x(3, 8),
        torch.randperm(8),
        torch.randperm(8),
    )
    assert result.after == ["index_select", "permute"]


def test_a_chain_of_three_collapses(rewrite: Rewrite) -> None:
    result = rewrite(
        CancelInverse(),
        lambda x, p, q, r: permute(permute(permute(x, p), q), r),
        x(3, 8),
        p=torch.randperm(8),
        q=torch.randperm(8),
        r=torch.randperm(8),
    )
    assert result.after == ["permute"]
    assert result.fired == ["two maps become one"] * 2


def test_what_a_cancelled_pair_leaves_behind_meets_the_next_map(rewrite: Rewrite) -> None:
    result = rewrite(
        CancelInverse(),
        lambda x, p, q: permute(permute(permute(permute(x, q), p), inverse(p)), inverse(q)),
        x(3, 8),
        p=torch.randperm(8),
        q=torch.randperm(8),
    )
    assert result.after == []


def test_a_first_result_with_another_reader_is_left(rewrite: Rewrite) -> None:
    def both(x: Tensor, p: Tensor, q: Tensor) -> Any:
        once = permute(x, p)
        return once.relu() + permute(once, q)

    result = rewrite(CancelInverse(), both, x(3, 8), p=torch.randperm(8), q=torch.randperm(8))
    assert result.after == result.before
    assert result.fired == []
    assert result.left == ["the inner result has a second reader"]


def test_a_first_result_that_leaves_the_graph_is_left(rewrite: Rewrite) -> None:
    def both(x: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
        once = permute(x, p)
        return once, permute(once, q)

    result = rewrite(CancelInverse(), both, x(3, 8), p=torch.randperm(8), q=torch.randperm(8))
    assert result.left == ["the inner result has a second reader"]


def test_an_inverse_pair_cancels_beside_another_reader(rewrite: Rewrite) -> None:
    def both(x: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        once = permute(x, p)
        return once, permute(once, inverse(p)).relu()

    result = rewrite(CancelInverse(), both, x(3, 8), p=torch.randperm(8))
    assert result.after == ["permute", "relu"]


@pytest.mark.parametrize(
    "between", [torch.relu, lambda x: x.roll(1, -1), lambda x: x.flip(0), torch.clone]
)
def test_maps_that_are_not_neighbours_stay(
    rewrite: Rewrite, between: Callable[[Tensor], Tensor]
) -> None:
    result = rewrite(
        CancelInverse(),
        lambda x, p: permute(between(permute(x, p)), inverse(p)),
        x(3, 8),
        p=torch.randperm(8),
    )
    assert result.after == result.before
    assert (result.fired, result.left) == ([], [])


def test_two_inverses_of_one_map_do_not_cancel(rewrite: Rewrite) -> None:
    table = torch.tensor([1, 2, 3, 4, 5, 6, 7, 0])
    result = rewrite(
        CancelInverse(), lambda x, p: permute(permute(x, inverse(p)), inverse(p)), x(3, 8), p=table
    )
    assert result.after == ["permute"]


def test_half_precision_is_moved_exactly(rewrite: Rewrite) -> None:
    half = torch.randn(3, 8).bfloat16()
    result = rewrite(
        CancelInverse(), lambda x, p: permute(permute(x, p), inverse(p)), half, p=torch.randperm(8)
    )
    assert result.after == []


def test_symbolic_batches_stay_symbolic(rewrite: Rewrite) -> None:
    result = rewrite(
        CancelInverse(),
        lambda x, p, q: permute(permute(x, p), q),
        x(3, 8),
        dynamic=True,
        p=torch.randperm(8),
        q=torch.randperm(8),
    )
    assert result.after == ["permute"]
    assert isinstance(next(iter(result.graph.nodes)).meta["val"].shape[0], torch.SymInt)


@settings(max_examples=30, deadline=None)
@given(chain=st.lists(st.tuples(st.integers(0, 2), st.booleans()), min_size=1, max_size=7))
def test_any_chain_collapses_to_one_map_at_most(
    rewrite: Rewrite, chain: list[tuple[int, bool]]
) -> None:
    tables = {name: torch.randperm(6) for name in "abc"}

    def run(x: Tensor, **maps: Tensor) -> Any:
        for which, backwards in chain:
            table = maps["abc"[which]]
            x = permute(x, inverse(table) if backwards else table)
        return x

    result = rewrite(CancelInverse(), run, x(2, 6), **tables)
    assert len(result.after) <= 1
