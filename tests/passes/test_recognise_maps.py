from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from padst_compiler.passes import FOLDS
from padst_compiler.passes.recognise_maps import RecogniseMaps

Rewrite = Callable[..., Any]
ORDER = torch.tensor([3, 1, 4, 0, 7, 6, 2, 5])
permute = torch.ops.padst.permute


def x(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


WRITTEN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "x[:, order]": lambda x, p: x[:, :, p],
    "x[..., order]": lambda x, p: x[..., p],
    "index_select": lambda x, p: x.index_select(-1, p),
    "index_select by number": lambda x, p: x.index_select(2, p),
    "roll": lambda x, p: x.roll(3, -1) + 0 * p,
    "roll back": lambda x, p: x.roll([-11], [2]) + 0 * p,
    "flip": lambda x, p: x.flip(-1) + 0 * p,
    "flip twice by name": lambda x, p: x.flip([2]).exp().flip([2]) + 0 * p,
}


@pytest.mark.parametrize("name", WRITTEN)
def test_what_a_model_writes_becomes_a_map(rewrite: Rewrite, name: str) -> None:
    result = rewrite(RecogniseMaps(), WRITTEN[name], x(2, 3, 8), p=ORDER)
    assert "permute" in result.after
    assert not {"index", "index_select", "roll", "flip"} & set(result.after)
    assert result.fired and not result.left


def test_it_folds_with_a_map_that_undoes_it(rewrite: Rewrite) -> None:
    def run(x: Tensor, p: Tensor) -> Tensor:
        moved: Tensor = permute(x, p)
        return moved.relu().roll(-1, -1)

    undone = torch.arange(8).roll(1)
    result = rewrite((RecogniseMaps(), *FOLDS), run, x(2, 3, 8), p=undone)
    assert result.moves == 0 and "permute" not in result.after


LEFT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "over tokens": lambda x, p: x.roll(1, 1),
    "flattened": lambda x, p: x.roll(1),
    "two dimensions": lambda x, p: x.flip([1, 2]),
    "a part": lambda x, p: x[..., p[:4]],
    "two tables": lambda x, p: x[:, p % 3, p],
    "not the last": lambda x, p: x[:, p % 3],
    "of turned data": lambda x, p: x.mT.contiguous().mT.flip(-1),
}


@pytest.mark.parametrize("name", LEFT)
def test_anything_else_stays(rewrite: Rewrite, name: str) -> None:
    result = rewrite(RecogniseMaps(), LEFT[name], x(2, 3, 8), p=ORDER)
    assert "permute" not in result.after and not result.fired


REFUSED = "the table of index repeats or changes"


def test_a_table_that_repeats_is_refused(rewrite: Rewrite) -> None:
    doubled = torch.tensor([0, 0, 1, 2, 3, 4, 5, 6])
    result = rewrite(RecogniseMaps(), lambda x, p: x[..., p], x(3, 8), p=doubled)
    assert (result.left, result.fired) == ([REFUSED], [])


def test_negative_and_short_tables_are_refused(rewrite: Rewrite) -> None:
    result = rewrite(RecogniseMaps(), lambda x, p: x[..., p], x(3, 8), p=ORDER - 8)
    assert result.left == [REFUSED]
    result = rewrite(RecogniseMaps(), lambda x, p: x[..., p.int()], x(3, 8), p=ORDER)
    assert result.left == [REFUSED]


def test_a_table_that_comes_with_each_call_is_refused(rewrite: Rewrite) -> None:
    result = rewrite(RecogniseMaps(), lambda x, p: x[..., p], x(3, 8), ORDER)
    assert result.left == [REFUSED]
