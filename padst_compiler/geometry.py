"""The geometry of one call of a structured operator, read off its arguments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from padst_compiler.compat import size_hint
from padst_compiler.formulation import Geometry
from padst_compiler.ops import LINEAR_DW, LINEAR_DX, STRUCTURE_OF
from padst_compiler.structures import Shape, unit_of

__all__ = ["geometry_of"]

_DX, _DW = frozenset(LINEAR_DX.values()), frozenset(LINEAR_DW.values())


def geometry_of(
    op: torch._ops.OpOverload, arguments: Sequence[Any], *, frozen: bool = False
) -> Geometry:
    """Return the geometry of ``op(*arguments)``.

    Args:
        op: one of ``LINEAR``, ``LINEAR_DX``, ``LINEAR_DW``.
        arguments: its own; tensors may be fake, sizes symbolic.
        frozen: whether values and indices stay as they are between calls.

    Example:
        >>> x, values, indices = torch.zeros(5, 8), torch.zeros(2, 1, 4, 4), torch.zeros(2, 1).int()
        >>> op = torch.ops.padst.block_linear.default
        >>> geometry_of(op, (x, values, indices, None, 8)).nnz
        32
    """
    first, indices = arguments[0], arguments[2]
    if op in _DW:
        shape, unit = Shape(int(first.shape[-1]), int(arguments[1].shape[-1])), arguments[3]
    else:
        unit = unit_of(arguments[1], indices)
        given, asked = int(first.shape[-1]), size_hint(arguments[3 if op in _DX else 4])
        shape = Shape(given, asked) if op in _DX else Shape(asked, given)
    structure = STRUCTURE_OF[op].of_storage(indices, shape, [size_hint(n) for n in unit])
    return Geometry(
        structure=structure,
        shape=shape,
        kept=structure.slots(indices, shape).shape[1],
        tokens=math.prod(size_hint(n) for n in first.shape[:-1]),
        dtype=first.dtype,
        device=first.device.type,
        frozen=frozen,
    )
