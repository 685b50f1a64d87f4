"""Gradients of fan-in and N:M in C++: weights listed by what they read. fp32 on a CPU.

The operators themselves stay in the graph and Inductor lowers them by ``LOWERINGS``. N:M is
constant fan-in whose places are counted in a group.

===========  ======================================================================================
dx           an input sums rows of 32 tokens of the gradient, 256 outputs' rows at a time
dw           a weight is the product of two rows of up to 208 tokens, sixteen weights at once
dw of N:M    sixteen outputs pick out of a group in registers, summed over tokens: AVX-512, groups
             of up to 32
===========  ======================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from padst_compiler import cpp_templates as cpp
from padst_compiler.formulation import Formulation, Geometry, gemm, moved
from padst_compiler.kernel_ops import MAPPED
from padst_compiler.kernels.micro import fits, gradient, source, sums, wide, widening
from padst_compiler.ops import LINEAR_DW, LINEAR_DX
from padst_compiler.structures import NM, FanIn, Structure

__all__ = ["DW_FORMS", "DX_FORMS", "LOWERINGS"]

DOWN, ACROSS = 16, 32  # features and tokens of a tile
GROUP = 32  # inputs that lie in registers

DX_CALL = """
    padst::feature_dx(
        X, row, tokens, {{FEATURES}}, {{in_map}}, W,
        {INDICES, {{I}}, {{GROUPS}}, {{EACH}}, {{WIDTH}}}, {{out_map}}, threads, store);
"""
PICKED_CALL = """
    padst::picked_gradient<{{WIDTH}}, {{EACH}}, {{GROUPS}}>(
        X, row, G, {{kernel.stride(G, 0)}}, tokens, INDICES, {{OUTPUTS}}, threads, store);
"""
DW_CALL = """
    padst::feature_dw(
        X, row, G, {{kernel.stride(G, 0)}}, tokens,
        {INDICES, {{OUTPUTS}}, {{GROUPS}}, {{EACH}}, {{WIDTH}}}, threads, store);
"""


# -- formulations ----------------------------------------------------------------------------------


def dx_of(kind: type[Structure]) -> Callable[..., Tensor]:
    """Return what computes ``grad S``: the operator stays."""

    def dx(grad: Tensor, values: Tensor, indices: Tensor, in_features: int) -> Tensor:
        result: Tensor = LINEAR_DX[kind.name](grad, values, indices, in_features)
        return result

    return dx


def dw_of(kind: type[Structure]) -> Callable[..., Tensor]:
    """Return what computes the gradient of the kept weights: the operator stays."""

    def dw(grad: Tensor, x: Tensor, indices: Tensor, unit: Sequence[int]) -> Tensor:
        result: Tensor = LINEAR_DW[kind.name](grad, x, indices, unit)
        return result

    return dw


# Shares of the rate of a dense product (1 thread, AVX-512, 90 %), and how many times as long as
# moving a weight listing it takes.
DX_RATE, DX_LISTED = 0.25, 13.0
DW_RATE, DW_LISTED = 0.2, 2.0
FAR_RATE, FAR_LISTED = 0.16, 9.0  # the inputs do not stay in the cache: listed in spans
PICKED_RATE, PICKED_LISTED = 0.27, 4.0
CACHED = 160 * 1024  # numbers
MOST = 12  # weights of a group whose sums stay in registers


def picks(width: int, each: int) -> bool:
    """Whether outputs pick out of groups of ``width`` inputs in registers, ``each`` from each."""
    vectors = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return vectors and width <= GROUP and each <= MOST


def _cost(g: Geometry, features: int, rate: float, listed: float) -> float | None:
    if not isinstance(g.structure, FanIn | NM) or features % DOWN or not fits(g):
        return None
    kept, tokens = g.nnz // g.shape.out_features, -(-g.tokens // DOWN) * DOWN
    rate, casts = widening(g, rate)
    product = gemm(tokens, kept, g.shape.out_features, efficiency=rate)
    return product + listed * moved(g.nnz, torch.float32.itemsize) + casts


def _picked(g: Geometry) -> bool:
    return isinstance(g.structure, NM) and picks(g.structure.m, g.kept)


def _dx_cost(g: Geometry) -> float | None:
    return _cost(g, g.shape.in_features, DX_RATE, DX_LISTED)


def _dw_cost(g: Geometry) -> float | None:
    if _picked(g):
        return None
    far = g.shape.in_features * min(g.tokens, 208) > CACHED
    rate, listed = (FAR_RATE, FAR_LISTED) if far else (DW_RATE, DW_LISTED)
    return _cost(g, g.shape.out_features, rate, listed)


def _picked_cost(g: Geometry) -> float | None:
    return _cost(g, g.shape.out_features, PICKED_RATE, PICKED_LISTED) if _picked(g) else None


_KINDS: tuple[type[Structure], ...] = (FanIn, NM)
DX_FORMS = {k.name: (Formulation("feature_kernel", wide(dx_of(k)), _dx_cost),) for k in _KINDS}
DW_FORMS = {
    k.name: (
        Formulation("micro_kernel", wide(dw_of(k)), _picked_cost),
        Formulation("feature_kernel", wide(dw_of(k)), _dw_cost),
    )[k is FanIn :]
    for k in _KINDS
}


# -- lowerings -------------------------------------------------------------------------------------


def lower_dx(op: torch._ops.OpOverload) -> Callable[..., Any]:
    """Return what lowers ``_linear_dx`` or ``_linear_dx_mapped``, or calls the operator."""

    def lowering(grad: Any, values: Any, indices: Any, in_features: Any, *maps: Any) -> Any:
        y = _dx(grad, values, indices, in_features, maps or (None, None))
        return y or cpp.fallback(op, grad, values, indices, in_features, *maps)

    return lowering


def lower_dw(op: torch._ops.OpOverload) -> Callable[..., Any]:
    """Return what lowers ``_linear_dw``; what the kernel does not do calls the operator."""

    def lowering(grad: Any, x: Any, indices: Any, unit: Sequence[Any]) -> Any:
        y = _dw(grad, x, indices)
        return y or cpp.fallback(op, grad, x, indices, unit)

    return lowering


def _dx(grad: Any, values: Any, indices: Any, in_features: Any, maps: Sequence[Any]) -> Any | None:
    slots = _slots(indices, in_features)
    features, inputs = cpp.numbers([grad.get_size()[-1], in_features])
    if slots is None or inputs % DOWN or values.get_dtype() is not torch.float32:
        return None
    numbers = slots | {"N": DOWN, "ROWS": ACROSS, "FEATURES": features}
    numbers["WEIGHTS"] = numbers["OUTPUTS"] * numbers["GROUPS"] * numbers["EACH"]
    count = numbers["WEIGHTS"]
    tensors = {"W": cpp.view(values, [count]), "INDICES": cpp.view(indices, [count])}
    text = source(DX_CALL, "features.h", "feature_gradient.h")
    return sums("padst_feature_dx", text, grad, tensors, maps, inputs, numbers, apart=False)


def _dw(grad: Any, x: Any, indices: Any) -> Any | None:
    slots = _slots(indices, x.get_size()[-1])
    if slots is None or slots["OUTPUTS"] % DOWN:
        return None
    rows = slots["OUTPUTS"] // DOWN * slots["GROUPS"] * slots["EACH"]
    flat = cpp.view(indices, [rows * DOWN])
    picked = slots["GROUPS"] > 1 and picks(slots["WIDTH"], slots["EACH"])
    text = (
        source(PICKED_CALL, "select.h", "select_gradient.h")
        if picked
        else source(DW_CALL, "features.h", "feature_gradient.h")
    )
    y = gradient(
        "padst_picked_dw" if picked else "padst_feature_dw",
        text,
        grad,
        x,
        flat,
        (rows, DOWN),
        slots | {"N": DOWN},
    )
    return y and cpp.view(y, indices.get_size())


def _slots(indices: Any, inputs: Any) -> dict[str, int] | None:
    """Return where the weights lie, or None where the indices are not what layers store."""
    if indices.get_dtype() is not torch.int32:
        return None
    outputs, *groups, each, width = cpp.numbers([*indices.get_size(), inputs])
    count = groups[0] if groups else 1
    return {"OUTPUTS": outputs, "GROUPS": count, "EACH": each, "WIDTH": width // count}


LOWERINGS: dict[torch._ops.OpOverload, Callable[..., Any]] = {
    op: lower_dx(op)
    for kind in _KINDS
    for op in (LINEAR_DX[kind.name], MAPPED[LINEAR_DX[kind.name]])
} | {op: lower_dw(op) for op in (LINEAR_DW[kind.name] for kind in _KINDS)}
