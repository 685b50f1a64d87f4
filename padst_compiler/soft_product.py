"""A soft permutation meets a sparse weight: on the activations, or multiplied into the weight.

With T tokens, a ``d x d`` soft permutation M and a weight S ``(o, i)`` of ``nnz`` numbers:

    on activations   S (M x)    2 T d^2 + 2 T nnz
    folded           (S M) x    2 nnz d + 2 T o i      input side
                     (M S) x    2 d^2 i + 2 T o i      output side, where S is unpacked first

Both are the same function of ``x``, ``values`` and M, so all gradients are the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from padst_compiler.structures import Shape

if TYPE_CHECKING:
    from padst_compiler.layers import SparseLayer

__all__ = ["folded_weight", "is_cheaper_folded"]


def is_cheaper_folded(shape: Shape, nnz: int, side: str, tokens: int) -> bool:
    """Whether folding takes fewer operations, forward; backward is twice either.

    Args:
        shape: of the weight.
        nnz: its stored numbers.
        side: "input" or "output".
        tokens: rows that the layer multiplies.

    Example:
        >>> [is_cheaper_folded(Shape(64, 64), 400, "input", t) for t in (16, 4096)]
        [False, True]
    """
    width = shape.in_features if side == "input" else shape.out_features
    once = nnz * width if side == "input" else width * width * shape.in_features
    return once + tokens * shape.numel < tokens * (width * width + nnz)


def folded_weight(layer: SparseLayer, x: Tensor, values: Tensor) -> Tensor | None:
    """Return ``S M`` or ``M S``, ``(o, i)``, where multiplying M into S is the cheaper way.

    None in a compiled graph, where the number of tokens must not decide what is compiled, and while
    a recorder is armed, which needs what S itself reads and writes; and for forms of M that are
    cheaper than their matrix.

    Args:
        layer: holds structure, indices, permutation, side and recorder.
        x: ``(..., i)``, the tokens.
        values: of the layer, in the dtype to compute in.
    """
    soft, shape = layer.soft_permutation, layer.shape
    if soft is None or not soft.folds or torch.compiler.is_compiling():
        return None
    if layer.recorder is not None and layer.recorder.armed:
        return None
    tokens = x.numel() // shape.in_features
    if not is_cheaper_folded(shape, values.numel(), layer.side, tokens):
        return None
    matrix = soft.soft().to(values.dtype)
    if layer.side == "output":
        return matrix @ layer.matrix(values)
    return layer.structured(matrix.t().contiguous(), values, None).t()  # S on the columns of M
