"""Block formulations: one batched product over rows of blocks.

Token-major gathers ``(o/b, t, k*b)`` tiles of x; feature-major gathers rows of ``x^T``. Inductor
fuses the gather with what stands before it (a permutation, a cast) and the last copy with what
follows (bias, activation, residual). A row of blocks has the same number of blocks as any other,
so the batched product has no padding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from padst_compiler.formulation import Formulation, Geometry, gemm, moved
from padst_compiler.structures import Block, Shape, unit_of

__all__ = ["DW", "DX", "LINEAR", "PORTABLE"]


def token_major(
    x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None, out_features: int
) -> Tensor:
    """Return ``x S^T + bias``: gather blocks of tokens, one bmm."""
    y = _structure(values, indices, out_features).linear(x, values, indices, out_features)
    return (y if bias is None else y + bias).contiguous()


def feature_major(
    x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None, out_features: int
) -> Tensor:
    """Return ``x S^T + bias``: gather rows of ``x^T``, one bmm, transpose back."""
    rows, kept, c, r = values.shape
    inside = torch.arange(c, device=indices.device)
    features = (indices.long()[..., None] * c + inside).reshape(-1)
    gathered = x.reshape(-1, x.shape[-1]).t().index_select(0, features)
    y = torch.bmm(
        values.reshape(rows, kept * c, r).transpose(1, 2), gathered.reshape(rows, kept * c, -1)
    )
    y = y.reshape(out_features, -1).t().reshape(*x.shape[:-1], out_features)
    return (y if bias is None else y + bias).contiguous()


def scatter_dx(grad: Tensor, values: Tensor, indices: Tensor, in_features: int) -> Tensor:
    """Return ``grad S``: one bmm, then every block adds to its block column."""
    structure = _structure(values, indices, grad.shape[-1])
    return structure.linear_dx(grad, values, indices, in_features).contiguous()


def block_dw(grad: Tensor, x: Tensor, indices: Tensor, unit: Sequence[int]) -> Tensor:
    """Return the gradient of the kept blocks: one bmm over tokens."""
    structure = Block.of_storage(indices, Shape(grad.shape[-1], x.shape[-1]), unit)
    return structure.linear_dw(grad, x, indices).contiguous()


def _structure(values: Tensor, indices: Tensor, out_features: int) -> Block:
    return Block.of_storage(indices, Shape(out_features, 0), unit_of(values, indices))


def _is_measured(g: Geometry) -> bool:
    """Whether it is a form of block that was timed: square, as many in every row of blocks."""
    return isinstance(g.structure, Block) and g.structure == Block(g.structure.size)


def _size(g: Geometry) -> int:
    assert isinstance(g.structure, Block)
    return g.structure.size


def _batched(g: Geometry, copies: float) -> float | None:
    if not _is_measured(g) or g.device == "cuda":
        return None  # on a GPU nothing here is measured yet: dense until it is
    b = _size(g)
    rows = g.shape.out_features // b
    efficiency = {4: 0.1, 8: 0.15, 16: 0.4, 32: 0.5, 64: 0.7}.get(b, 0.3 if b < 32 else 0.75)
    product = gemm(g.tokens, g.kept * b, b, rows, efficiency)
    gather = moved(rows * g.tokens * g.kept * b, g.item)
    return product + gather + moved(copies * g.tokens * g.shape.out_features, g.item)


def _feature_major(g: Geometry) -> float | None:
    cost = _batched(g, 1.0)
    if cost is None:
        return None
    # Small blocks gather whole rows here, but transposing many tokens costs more than that saves.
    small = _size(g) < 16
    if g.tokens > 512:
        return 1.9 * cost
    return cost * (0.6 if small and g.tokens >= 32 else 1.15)


def _scattered(g: Geometry) -> float | None:
    cost = _batched(g, 1.0)
    blocks = g.shape.out_features * g.kept * g.tokens
    return None if cost is None else cost + 2.0 * moved(blocks, g.item)


def _in_onnxruntime(g: Geometry) -> float | None:
    # Measured there: 1.5-2.6x dense for b = 16, 2.3-3.9x for b = 32 at 90 %; smaller blocks lose.
    if not _is_measured(g) or _size(g) < 16:
        return None
    return gemm(g.tokens, g.shape.in_features, g.shape.out_features) * 5.0 * g.nnz / g.shape.numel


LINEAR = (
    Formulation("bmm_token_major", token_major, lambda g: _batched(g, 1.0)),
    Formulation("bmm_feature_major", feature_major, _feature_major, feature_major=True),
)
DX = (Formulation("bmm_scatter", scatter_dx, _scattered),)
DW = (Formulation("bmm", block_dw, lambda g: _batched(g, 1.0)),)
PORTABLE = (Formulation("gather_matmul", feature_major, _in_onnxruntime),)
