"""Fan-in formulation: a weighted sum of rows of ``x^T``, as an embedding bag.

N:M and wide diagonals (``o <= i``) are constant fan-in layers with computed indices and use it too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from padst_compiler.formulation import Formulation, Geometry, gemm, moved
from padst_compiler.structures import Diagonal

__all__ = ["DIAGONAL_LINEAR", "FAN_IN_LINEAR", "NM_LINEAR", "bag", "nm_inputs"]


def bag(x: Tensor, values: Tensor, inputs: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``y[t, o] = sum_k values[o, k] * x[t, inputs[o, k]]``.

    Args:
        x: ``(..., i)``.
        values: ``(o, k)``.
        inputs: ``(o, k)``, integer.
        bias: ``(o,)`` or None.
    """
    rows = x.reshape(-1, x.shape[-1]).t().contiguous()
    starts = torch.arange(0, inputs.numel(), inputs.shape[1], device=x.device)
    y: Tensor = torch.ops.aten._embedding_bag_forward_only(
        rows,
        inputs.reshape(-1).long(),
        starts,
        False,
        0,  # sum
        False,
        values.reshape(-1),
    )[0]
    y = y.t().reshape(*x.shape[:-1], inputs.shape[0])
    return (y if bias is None else y + bias).contiguous()


def fan_in_bag(
    x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None, out_features: int
) -> Tensor:
    """Return ``x S^T + bias`` for constant fan-in."""
    del out_features
    return bag(x, values, indices, bias)


def nm_bag(
    x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None, out_features: int
) -> Tensor:
    """Return ``x S^T + bias`` for N:M."""
    del out_features
    return bag(x, values.flatten(1), nm_inputs(x, indices), bias)


def nm_inputs(x: Tensor, indices: Tensor) -> Tensor:
    """Return the inputs of N:M, ``(o, k)``, by their positions in a group."""
    starts = torch.arange(0, x.shape[-1], x.shape[-1] // indices.shape[1], device=x.device)
    return (indices.long() + starts[None, :, None]).flatten(1)


def diagonal_bag(
    x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None, out_features: int
) -> Tensor:
    """Return ``x S^T + bias`` for diagonals that wrap around the columns, and square ones."""
    outputs = torch.arange(out_features, device=x.device)[:, None]
    offsets = indices.reshape(1, -1).long()
    if out_features == x.shape[-1]:  # weight c of offset d lies at row c + d: output r reads r - d
        inputs = (outputs - offsets) % x.shape[-1]
        weights = values[0].t().gather(0, inputs)
    else:
        inputs = (outputs + offsets) % x.shape[-1]
        weights = values[0].t()
    return bag(x, weights.contiguous(), inputs, bias)


def _cost(g: Geometry) -> float | None:
    # The bag exists in fp32 on the CPU; every weight streams a row of tokens through one FMA, and
    # with 8 tokens it took seven times what that would.
    if g.dtype is not torch.float32 or g.device != "cpu" or g.tokens < 32 or not g.frozen:
        return None
    if isinstance(g.structure, Diagonal) and g.shape.out_features > g.shape.in_features:
        return None
    kept = g.nnz // g.shape.out_features
    traffic = moved(g.tokens * (g.shape.in_features + g.shape.out_features), g.item)
    efficiency = 0.17 if g.tokens <= 256 else 0.11  # rows of more tokens leave the core's cache
    return gemm(g.tokens, kept, g.shape.out_features, efficiency=efficiency) + traffic


FAN_IN_LINEAR = (Formulation("embedding_bag", fan_in_bag, _cost, feature_major=True),)
NM_LINEAR = (Formulation("embedding_bag", nm_bag, _cost, feature_major=True),)
DIAGONAL_LINEAR = (Formulation("embedding_bag", diagonal_bag, _cost, feature_major=True),)
