"""Operators of blocks of 16-bit numbers that are summed in fp32, which is what they return.

================================================  ===============================================
``block_pairs(x, values, indices, width,          ``x[..., in_map] S^T``, of it ``y[..., out_map]``;
in_map, out_map)``                                values are those of the layer, ``(o/r, k, c, r)``,
                                                  or with two inputs together: ``(o/r, k, c/2, r,
                                                  2)``
``block_pairs_dx(grad, values, indices, width,    the same of ``grad S``
in_map, out_map)``
``block_pairs_dw(grad, x, indices, unit)``        the gradient of the kept blocks
================================================  ===============================================

Formulations put them in the place of structured operators; none has a gradient. Here each is plain
PyTorch, on any device; other numbers are summed in their own type.

Example:
    >>> x, values = torch.ones(2, 4).bfloat16(), torch.ones(1, 1, 4, 3).bfloat16()
    >>> torch.ops.padst.block_pairs(x, values, torch.zeros(1, 1).int(), 3, None, None)[0]
    tensor([4., 4., 4.])
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from padst_compiler.ops import LINEAR, LINEAR_DW, LINEAR_DX

__all__ = ["BLOCK_PAIRS", "BLOCK_PAIRS_DW", "BLOCK_PAIRS_DX", "moved"]


def _summed(x: Tensor) -> torch.dtype:
    return torch.float32 if x.dtype.itemsize == 2 else x.dtype


def moved(x: Tensor, table: Tensor | None) -> Tensor:
    """Return ``x[..., table]``, or x where there is no map."""
    return x if table is None else x.index_select(-1, table)


def _sums(op: torch._ops.OpOverload, *bias: None) -> Callable[..., Tensor]:
    def run(
        x: Tensor,
        values: Tensor,
        indices: Tensor,
        width: int,
        in_map: Tensor | None,
        out_map: Tensor | None,
    ) -> Tensor:
        if values.dim() == 5:
            values = values.transpose(-1, -2).flatten(2, 3)
        x, values = moved(x, in_map).to(_summed(x)), values.to(_summed(x))
        return moved(op(x, values, indices, *bias, width), out_map)

    return run


def _dw(grad: Tensor, x: Tensor, indices: Tensor, unit: Sequence[int]) -> Tensor:
    dw: Tensor = LINEAR_DW["block"](grad.to(_summed(grad)), x.to(_summed(x)), indices, unit)
    return dw


def _fake(
    x: Tensor, values: Tensor, indices: Tensor, width: int, in_map: Any, out_map: Tensor | None
) -> Tensor:
    del values, indices, in_map
    size = width if out_map is None else out_map.shape[0]
    return x.new_empty((*x.shape[:-1], size), dtype=_summed(x))


def _fake_dw(grad: Tensor, x: Tensor, indices: Tensor, unit: Sequence[int]) -> Tensor:
    return x.new_empty((*indices.shape, *unit), dtype=_summed(x))


def _register(
    name: str, run: Callable[..., Tensor], fake: Callable[..., Tensor], schema: str
) -> torch._ops.OpOverload:
    torch.library.custom_op(
        f"padst::{name}", run, mutates_args=(), schema=f"{schema} -> Tensor"
    ).register_fake(fake)
    op: torch._ops.OpOverload = getattr(torch.ops.padst, name).default
    return op


SUMS = "(Tensor x, Tensor values, Tensor indices, SymInt width, Tensor? in_map, Tensor? out_map)"
BLOCK_PAIRS = _register("block_pairs", _sums(LINEAR["block"], None), _fake, SUMS)
BLOCK_PAIRS_DX = _register("block_pairs_dx", _sums(LINEAR_DX["block"]), _fake, SUMS)
BLOCK_PAIRS_DW = _register(
    "block_pairs_dw", _dw, _fake_dw, "(Tensor grad, Tensor x, Tensor indices, SymInt[] unit)"
)
