from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from padst_compiler.passes.drop_watch import DropWatch
from padst_compiler.structures import FanIn, Shape

Rewrite = Callable[..., Any]


def watched(y: Tensor, x: Tensor, indices: Tensor) -> Tensor:
    scores, listed = torch.zeros(indices.shape), torch.zeros_like(indices)
    armed, status = torch.zeros((), dtype=torch.bool), torch.zeros((), dtype=torch.int32)
    record = (listed, scores, scores.clone(), torch.zeros(0), status)
    result: Tensor = torch.ops.padst.watch(y, x, armed, *record, indices, "fan_in")
    return result


def linear(x: Tensor, values: Tensor, indices: Tensor) -> Tensor:
    y: Tensor = torch.ops.padst.fan_in_linear(x, values, indices, None, 6)
    return y


def layer() -> tuple[Tensor, Tensor, Tensor]:
    indices = FanIn().select(torch.rand(6, 8), FanIn().kept(Shape(6, 8), 0.5))
    return torch.randn(3, 8).double(), torch.randn(indices.shape).double(), indices


def test_the_recorders_identity_vanishes(rewrite: Rewrite) -> None:
    x, values, indices = layer()

    def run(x: Tensor, values: Tensor, indices: Tensor) -> Tensor:
        return watched(linear(x, values, indices), x, indices).relu()

    result = rewrite(DropWatch(), run, x, values=values, indices=indices)
    assert result.before == ["fan_in_linear", "watch", "relu"]
    assert result.after == ["fan_in_linear", "relu"]
    assert result.fired == ["an identity vanishes"]
    assert result.left == []


def test_every_one_vanishes_also_at_the_output_and_in_a_row(rewrite: Rewrite) -> None:
    x, values, indices = layer()

    def run(x: Tensor, values: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        y = watched(linear(x, values, indices), x, indices)
        return y, watched(y, x, indices)

    result = rewrite(DropWatch(), run, x, values, indices)
    assert "watch" not in result.after
    assert len(result.fired) == 2


def test_a_graph_without_a_recorder_stays(rewrite: Rewrite) -> None:
    x, values, indices = layer()
    result = rewrite(DropWatch(), linear, x, values=values, indices=indices)
    assert result.after == result.before == ["fan_in_linear"]
    assert (result.fired, result.left) == ([], [])
