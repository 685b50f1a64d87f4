"""Operators on a GPU outside of a compiled graph: the cheapest way to run each call.

The ways are those of a compiled graph, by the same predictions: a Triton kernel where it is the
cheaper, else the dense product on the weight laid out. So eager training never materialises a
sparse weight that a kernel could read, and never runs a kernel that loses to cuBLAS.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from padst_compiler.formulation import Formulation
from padst_compiler.geometry import geometry_of
from padst_compiler.kernel_ops import BLOCK_MLP
from padst_compiler.kernels import (
    gpu_block,
    gpu_sums,
    triton_block,
    triton_expand,
    triton_mlp,
    triton_sums,
    triton_turned,
)
from padst_compiler.kernels.dense import dense
from padst_compiler.ops import LINEAR, LINEAR_DW, LINEAR_DX
from padst_compiler.structures import STRUCTURES

__all__ = ["LAUNCHES", "launch", "run"]

LAUNCHES: dict[torch._ops.OpOverload, tuple[Formulation, Callable[..., Tensor]]] = {
    LINEAR["block"]: (gpu_block.LINEAR_FORM, triton_block.linear),
    LINEAR_DX["block"]: (gpu_block.DX_FORM, triton_block.dx),
    LINEAR_DW["block"]: (gpu_block.DW_FORM, triton_block.dw),
    **{LINEAR[n]: (f, triton_sums.LINEAR[n]) for n, f in gpu_sums.LINEAR_FORMS.items()},
    LINEAR["fan_in"]: (gpu_sums.LINEAR_FORMS["fan_in"], triton_turned.fan_in_linear),
    LINEAR["nm"]: (gpu_sums.LINEAR_FORMS["nm"], triton_expand.nm_linear),
    **{LINEAR_DX[n]: (f, triton_sums.DX[n]) for n, f in gpu_sums.DX_FORMS.items()},
    **{LINEAR_DW[n]: (f, triton_sums.DW[n]) for n, f in gpu_sums.DW_FORMS.items()},
}
"""Of an operator: what its kernel is predicted to cost, and what launches it."""

_KERNELS = {BLOCK_MLP: triton_mlp.mlp, **{op: call for op, (_, call) in LAUNCHES.items()}}
_DENSE: dict[torch._ops.OpOverload, Formulation] = {
    op: form
    for kind in STRUCTURES
    for op, form in zip(
        (LINEAR[kind.name], LINEAR_DX[kind.name], LINEAR_DW[kind.name]), dense(kind), strict=True
    )
}


def launch(op: torch._ops.OpOverload, *args: Any) -> Tensor:
    """Launch the kernel of an operator, whether or not another way is predicted to be faster.

    Args:
        op: one of ``LAUNCHES``, or ``padst::block_mlp``.
        args: its own; all but gradients of weights take ``in_map`` and ``into`` behind them.
    """
    return _KERNELS[op](*args)


def run(op: torch._ops.OpOverload, *args: Any) -> Tensor:
    """Run a structured operator on a GPU."""
    if op in LAUNCHES:
        given = tuple((a.shape, a.dtype) if isinstance(a, Tensor) else _plain(a) for a in args)
        if _is_cheaper(op, given, torch.backends.cuda.matmul.allow_tf32):
            return LAUNCHES[op][1](*args)
    return _DENSE[op].run(*args).contiguous()


def _plain(argument: Any) -> Any:
    return tuple(argument) if isinstance(argument, list | tuple) else argument


@functools.lru_cache(maxsize=4096)
def _is_cheaper(op: torch._ops.OpOverload, given: tuple[Any, ...], tf32: bool) -> bool:
    """Whether the kernel is predicted to be faster than the dense product.

    Args:
        op: the operator.
        given: sizes and types of its tensors, and its other arguments.
        tf32: what dense products of fp32 are allowed, which costs depend on.
    """
    del tf32
    if given[0][1] is not given[1][1]:
        return False  # numbers of two types are an error of torch's to raise
    is_tensor = [isinstance(a, tuple) and a[1:] and isinstance(a[1], torch.dtype) for a in given]
    arguments = [
        torch.empty(a[0], dtype=a[1], device="meta") if known else a
        for a, known in zip(given, is_tensor, strict=True)
    ]
    geometry = replace(geometry_of(op, arguments), device="cuda")
    cost, dense_cost = LAUNCHES[op][0].cost(geometry), _DENSE[op].cost(geometry)
    return cost is not None and dense_cost is not None and cost < dense_cost
