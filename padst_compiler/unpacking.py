"""A sparse weight as a dense tensor, for code that computes with it as it likes.

=========================================  =====================================================
``padst::unpack(values, indices,           the dense weight ``S (o, i)``
structure, out_features, in_features)``
``padst::pack(dense, indices,              the stored numbers of ``dense (o, i)``: the gradient of
structure, unit)``                         ``unpack``, as ``unpack`` is that of ``pack``
=========================================  =====================================================

In a captured graph ``unpack`` says that a weight is sparse: products with it become sparse
operators (``passes/use_sparse_operator.py``), and a frozen one is unpacked once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from padst_compiler.permutation import FixedPermutation
from padst_compiler.structures import STRUCTURES, Shape, Structure, unit_of

if TYPE_CHECKING:
    from padst_compiler.layers import SparseLayer

__all__ = ["PACK", "UNPACK", "dense_matrix", "permuted", "unpack", "unpermuted"]


def _kind(structure: str) -> type[Structure]:
    return next(kind for kind in STRUCTURES if kind.name == structure)


def _unpack(
    values: Tensor, indices: Tensor, structure: str, out_features: int, in_features: int
) -> Tensor:
    shape = Shape(out_features, in_features)
    kind = _kind(structure).of_storage(indices, shape, unit_of(values, indices))
    return kind.unpack(values, indices, shape).contiguous()


def _unpack_fake(
    values: Tensor, indices: Tensor, structure: str, out_features: int, in_features: int
) -> Tensor:
    del indices, structure
    return values.new_empty((out_features, in_features))


def _unpack_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    values, indices, ctx.structure, *_ = inputs
    ctx.unit = unit_of(values, indices)
    ctx.save_for_backward(indices)


def _unpack_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (indices,) = ctx.saved_tensors
    return torch.ops.padst.pack(grad, indices, ctx.structure, ctx.unit), None, None, None, None


def _pack(dense: Tensor, indices: Tensor, structure: str, unit: Sequence[int]) -> Tensor:
    kind = _kind(structure).of_storage(indices, Shape(*dense.shape), unit)
    return kind.pack(dense, indices).contiguous()


def _pack_fake(dense: Tensor, indices: Tensor, structure: str, unit: Sequence[int]) -> Tensor:
    del structure
    return dense.new_empty((*indices.shape, *unit))


def _pack_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    dense, indices, ctx.structure, _ = inputs
    ctx.size = dense.shape
    ctx.save_for_backward(indices)


def _pack_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (indices,) = ctx.saved_tensors
    return torch.ops.padst.unpack(grad, indices, ctx.structure, *ctx.size), None, None, None


def _register() -> None:
    schema = "(Tensor values, Tensor indices, str structure, SymInt out_features, "
    make = torch.library.custom_op(
        "padst::unpack", _unpack, mutates_args=(), schema=f"{schema}SymInt in_features) -> Tensor"
    )
    make.register_fake(_unpack_fake)
    make.register_autograd(_unpack_backward, setup_context=_unpack_setup)
    take = torch.library.custom_op(
        "padst::pack",
        _pack,
        mutates_args=(),
        schema="(Tensor dense, Tensor indices, str structure, SymInt[] unit) -> Tensor",
    )
    take.register_fake(_pack_fake)
    take.register_autograd(_pack_backward, setup_context=_pack_setup)


def unpack(structure: Structure, values: Tensor, indices: Tensor, shape: Shape) -> Tensor:
    """Return ``structure.unpack(values, indices, shape)`` as one operator of a captured graph.

    Example:
        >>> from padst_compiler.structures import FanIn
        >>> indices = torch.tensor([[2], [0]], dtype=torch.int32)
        >>> unpack(FanIn(), torch.ones(2, 1), indices, Shape(2, 3)).tolist()
        [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
    """
    weight: Tensor = torch.ops.padst.unpack(
        values, indices, structure.name, shape.out_features, shape.in_features
    )
    return weight


def dense_matrix(layer: SparseLayer) -> Tensor:
    """Return the effective weight ``S P`` or ``P S``, ``(o, i)``, for a forward pass.

    While a recorder is armed it sees the gradient of S. Soft permutations are multiplied in.

    Args:
        layer: any sparse layer.
    """
    values = layer.values if layer.selection is None else layer.selection(layer.values)
    values, indices, active = layer.packed(values)
    matrix = unpack(layer.structure, values, indices, active)
    if layer.rows is not None:
        matrix = layer._spread(matrix)
    recorder = layer.recorder if torch.is_grad_enabled() else None
    if recorder is not None and (torch.compiler.is_compiling() or recorder.armed):
        matrix = recorder(matrix.t(), None).t()
    return permuted(layer, matrix)


def permuted(layer: SparseLayer, matrix: Tensor) -> Tensor:
    """Return ``S P`` or ``P S``.

    Args:
        layer: whose permutation and side.
        matrix: S, ``(o, i)``.
    """
    permutation, inside, ops = layer.permutation, layer.side == "input", torch.ops.padst
    if permutation is None:
        return matrix
    result: Tensor
    if isinstance(permutation, FixedPermutation):
        if inside:
            result = ops.permute(matrix, ops.invert(permutation.perm))
        else:
            result = ops.permute(matrix.t(), permutation.perm).t()
        return result
    soft = permutation.matrix().to(matrix.dtype)
    result = matrix @ soft if inside else soft @ matrix
    return result


def unpermuted(layer: SparseLayer, matrix: Tensor) -> Tensor:
    """Return S, of an effective weight; a soft permutation cannot be undone and is left.

    Args:
        layer: whose permutation and side.
        matrix: ``S P`` or ``P S``, ``(o, i)``.
    """
    if not isinstance(layer.permutation, FixedPermutation):
        return matrix
    if layer.side == "input":  # column j of S reads input perm[j]
        return matrix[:, layer.permutation.perm]
    return torch.empty_like(matrix).index_copy(0, layer.permutation.perm, matrix)


_register()
UNPACK: torch._ops.OpOverload = torch.ops.padst.unpack.default
PACK: torch._ops.OpOverload = torch.ops.padst.pack.default
