from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from padst_compiler.passes.keep_strides import KeepStrides

Rewrite = Callable[..., Any]


def test_what_a_condition_reads_keeps_its_strides(rewrite: Rewrite) -> None:
    def run(x: Tensor) -> Tensor:
        y: Tensor = torch.cond(x.sum() > 0, torch.sin, torch.cos, (x.exp().t(),))
        return y.relu()

    result = rewrite(KeepStrides(), run, torch.randn(3, 8))
    assert "inductor_force_stride_order" in result.after
    kept = [n for n in result.graph.nodes if "force_stride_order" in str(n.target)]
    assert [n.args[1] for n in kept if n.meta["val"].dim() == 2] == [[1, 8]]


def test_all_else_is_left_alone(rewrite: Rewrite) -> None:
    result = rewrite(KeepStrides(), lambda x: x.t().exp(), torch.randn(3, 8))
    assert result.before == result.after
