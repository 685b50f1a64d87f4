from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from padst_compiler.passes.drop_identity import DropIdentity

permute, inverse = torch.ops.padst.permute, torch.ops.padst.invert
Rewrite = Callable[..., Any]
UNKNOWN = "the map is not known at compile time"


def x(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 3, 8)])
def test_an_identity_map_vanishes(rewrite: Rewrite, shape: tuple[int, ...]) -> None:
    result = rewrite(DropIdentity(), lambda x, p: permute(x, p), x(*shape), p=torch.arange(8))
    assert (result.before, result.after) == (["permute"], [])
    assert (result.fired, result.where) == (["an identity map vanishes"], ["p"])


def test_a_map_that_moves_something_stays(rewrite: Rewrite) -> None:
    swap = torch.tensor([1, 0, 2, 3, 4, 5, 6, 7])
    result = rewrite(DropIdentity(), lambda x, p: permute(x, p), x(3, 8), p=swap)
    assert result.after == ["permute"]
    assert (result.fired, result.left) == ([], [])


def test_a_map_whose_numbers_are_not_known_is_left(rewrite: Rewrite) -> None:
    result = rewrite(DropIdentity(), lambda x, p: permute(x, p), x(3, 8), torch.arange(8))
    assert result.after == ["permute"]
    assert result.left == [UNKNOWN]


def test_a_map_that_depends_on_an_input_is_left(rewrite: Rewrite) -> None:
    def run(x: Tensor, p: Tensor) -> Tensor:
        moved: Tensor = permute(x, p + x.argmax().clamp(max=0))
        return moved

    assert rewrite(DropIdentity(), run, x(8), p=torch.arange(8)).left == [UNKNOWN]


@pytest.mark.parametrize("make", [inverse, lambda p: p.flip(0).flip(0), lambda p: p[p]])
def test_a_map_computed_from_frozen_numbers_is_known(
    rewrite: Rewrite, make: Callable[[Tensor], Tensor]
) -> None:
    result = rewrite(DropIdentity(), lambda x, p: permute(x, make(p)), x(3, 8), p=torch.arange(8))
    assert result.after == []


def test_two_maps_that_compose_to_the_identity_vanish(rewrite: Rewrite) -> None:
    table = torch.randperm(8)
    result = rewrite(
        DropIdentity(), lambda x, p: permute(x, p.index_select(0, inverse(p))), x(3, 8), p=table
    )
    assert result.after == []


def test_its_other_readers_and_the_output_keep_their_numbers(rewrite: Rewrite) -> None:
    def run(x: Tensor, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        same = permute(x, p)
        return same, same.relu(), permute(same, q)

    result = rewrite(DropIdentity(), run, x(3, 8), p=torch.arange(8), q=torch.randperm(8))
    assert result.after == ["relu", "permute"]


def test_half_precision_is_moved_exactly(rewrite: Rewrite) -> None:
    half = torch.randn(3, 8).bfloat16()
    assert rewrite(DropIdentity(), lambda x, p: permute(x, p), half, p=torch.arange(8)).after == []


def test_a_table_that_is_no_permutation_is_refused(rewrite: Rewrite) -> None:
    with pytest.raises(RuntimeError, match=r"Pass drop_identity failed.*Expected a permutation"):
        rewrite(DropIdentity(), lambda x, p: permute(x, p), x(3, 4), p=torch.tensor([0, 0, 1, 2]))
