"""The ``padst::`` operators: functional, one linear per structure, with fake and autograd.

==============================================  ================================================
``<structure>_linear(x, values, indices,        ``y (..., o) = x S^T + bias``
bias, out_features)``
``<structure>_linear_dx(grad, values,           gradient of ``x (..., i)``
indices, in_features)``
``<structure>_linear_dw(grad, x, indices,       gradient of ``values``: the kept units only
unit)``
``permute(x, perm)``                            ``x[..., perm]``
``invert(perm)``                                the inverse map
==============================================  ================================================

Here every operator runs its structure's reference in plain PyTorch: the truth that kernels and
passes are tested against, and what runs where no kernel does. On a GPU it runs the cheapest way
that ``kernels/`` know, a Triton kernel or the dense product. Maps are separate
operators so that they can cancel, move and fuse. Second derivatives are not defined and raise.

Example:
    >>> x = torch.arange(4.0)
    >>> torch.ops.padst.permute(x, torch.tensor([3, 2, 1, 0])).tolist()
    [3.0, 2.0, 1.0, 0.0]
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from padst_compiler.index_map import invert
from padst_compiler.structures import STRUCTURES, Shape, Structure, unit_of

__all__ = ["LINEAR", "LINEAR_DW", "LINEAR_DX", "STRUCTURE_OF"]

LINEAR: dict[str, torch._ops.OpOverload] = {}
LINEAR_DX: dict[str, torch._ops.OpOverload] = {}
LINEAR_DW: dict[str, torch._ops.OpOverload] = {}
STRUCTURE_OF: dict[torch._ops.OpOverload, type[Structure]] = {}


def _register_linear(kind: type[Structure]) -> None:
    name = f"padst::{kind.name}_linear"

    def linear(
        x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None, out_features: int
    ) -> Tensor:
        shape = Shape(out_features, x.shape[-1])
        structure = kind.of_storage(indices, shape, unit_of(values, indices))
        y = structure.linear(x, values, indices, out_features)
        return (y if bias is None else y + bias).contiguous()

    def linear_fake(
        x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None, out_features: int
    ) -> Tensor:
        del values, indices, bias
        return x.new_empty((*x.shape[:-1], out_features))

    def dx(grad: Tensor, values: Tensor, indices: Tensor, in_features: int) -> Tensor:
        shape = Shape(grad.shape[-1], in_features)
        structure = kind.of_storage(indices, shape, unit_of(values, indices))
        return structure.linear_dx(grad, values, indices, in_features).contiguous()

    def dx_fake(grad: Tensor, values: Tensor, indices: Tensor, in_features: int) -> Tensor:
        del values, indices
        return grad.new_empty((*grad.shape[:-1], in_features))

    def dw(grad: Tensor, x: Tensor, indices: Tensor, unit: Sequence[int]) -> Tensor:
        structure = kind.of_storage(indices, Shape(grad.shape[-1], x.shape[-1]), unit)
        return structure.linear_dw(grad, x, indices).contiguous()

    def dw_fake(grad: Tensor, x: Tensor, indices: Tensor, unit: Sequence[int]) -> Tensor:
        del x
        return grad.new_empty((*indices.shape, *unit))

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        del output
        x, values, indices, bias, _ = inputs
        ctx.save_for_backward(x, values, indices)
        ctx.bias_dtype = None if bias is None else bias.dtype

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, values, indices = ctx.saved_tensors
        need_x, need_values, _, need_bias, _ = ctx.needs_input_grad
        grad = grad.contiguous()
        return (
            LINEAR_DX[kind.name](grad, values, indices, x.shape[-1]) if need_x else None,
            LINEAR_DW[kind.name](grad, x, indices, unit_of(values, indices))
            if need_values
            else None,
            None,
            grad.flatten(0, -2).sum(0)
            if need_bias and grad.dim() > 1
            else (grad if need_bias else None),
            None,
        )

    forward_op = torch.library.custom_op(
        name,
        linear,
        mutates_args=(),
        schema="(Tensor x, Tensor values, Tensor indices, Tensor? bias, SymInt out_features) "
        "-> Tensor",
    )
    forward_op.register_fake(linear_fake)
    forward_op.register_kernel("cuda")(_on_gpu(name))
    forward_op.register_autograd(backward, setup_context=setup)
    dx_op = torch.library.custom_op(
        f"{name}_dx",
        dx,
        mutates_args=(),
        schema="(Tensor grad, Tensor values, Tensor indices, SymInt in_features) -> Tensor",
    )
    dx_op.register_fake(dx_fake)
    dx_op.register_kernel("cuda")(_on_gpu(f"{name}_dx"))
    dw_op = torch.library.custom_op(
        f"{name}_dw",
        dw,
        mutates_args=(),
        schema="(Tensor grad, Tensor x, Tensor indices, SymInt[] unit) -> Tensor",
    )
    dw_op.register_fake(dw_fake)
    dw_op.register_kernel("cuda")(_on_gpu(f"{name}_dw"))
    namespace = torch.ops.padst
    LINEAR[kind.name] = getattr(namespace, f"{kind.name}_linear").default
    LINEAR_DX[kind.name] = getattr(namespace, f"{kind.name}_linear_dx").default
    LINEAR_DW[kind.name] = getattr(namespace, f"{kind.name}_linear_dw").default
    for op in (LINEAR[kind.name], LINEAR_DX[kind.name], LINEAR_DW[kind.name]):
        STRUCTURE_OF[op] = kind


def _on_gpu(name: str) -> Callable[..., Tensor]:
    """Return what runs an operator on a GPU: the cheapest way that ``kernels/`` know."""

    def run(*args: Any) -> Tensor:
        backend = importlib.import_module("padst_compiler.backend")  # it stands above operators
        op = getattr(torch.ops.padst, name.removeprefix("padst::")).default
        y: Tensor = backend.gpu_eager.run(op, *args)
        return y

    return run


def _permute(x: Tensor, perm: Tensor) -> Tensor:
    return x.index_select(-1, perm)


def _permute_fake(x: Tensor, perm: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], perm.shape[0]))


def _permute_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    ctx.save_for_backward(inputs[1])


def _permute_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (perm,) = ctx.saved_tensors
    ops = torch.ops.padst
    return ops.permute(grad.contiguous(), ops.invert(perm)), None


def _register_maps() -> None:
    permute = torch.library.custom_op(
        "padst::permute", _permute, mutates_args=(), schema="(Tensor x, Tensor perm) -> Tensor"
    )
    permute.register_fake(_permute_fake)
    permute.register_autograd(_permute_backward, setup_context=_permute_setup)
    torch.library.custom_op(
        "padst::invert", invert, mutates_args=(), schema="(Tensor perm) -> Tensor"
    ).register_fake(torch.empty_like)


_register_maps()
for _kind in STRUCTURES:
    _register_linear(_kind)
