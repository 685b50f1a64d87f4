"""N:M kernels in C++: inputs are picked out of a group in registers. fp32 on a CPU with AVX-512.

Sixteen outputs pick from a group of up to 32 inputs by one instruction, so nothing is gathered and
any number of tokens is read as it lies. Fan-in is one group of all inputs, which is gathered from:
that pays for a few tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from padst_compiler import cpp_templates as cpp
from padst_compiler.formulation import Formulation, Geometry, gemm, moved
from padst_compiler.kernel_ops import PICKED_SUMS
from padst_compiler.kernels.micro import fits, source, sums, wide, widening, width
from padst_compiler.structures import NM, FanIn

__all__ = ["FAN_IN_FORM", "LOWERINGS", "NM_FORM"]

MOST = 32  # outputs of a tile
GROUP = 32  # inputs that lie in registers
FEW = 4  # tokens that gathering pays for

CALL = """
    padst::picked_sums<{{N}}, {{M}}, {{KEPT}}, {{I}}, {{READ}}, {{MOVED}}>(
        X, row, tokens, {{FEATURES}}, {{in_map}}, W, PLACES, {{O}}, {{out_map}}, threads, store);
"""


# -- formulations ----------------------------------------------------------------------------------


def nm(
    x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None, out_features: int
) -> Tensor:
    """Return ``x S^T + bias`` for N:M."""
    del out_features
    return _picked(x, values, indices.to(torch.uint8), indices.shape[1], bias)


def fan_in(
    x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None, out_features: int
) -> Tensor:
    """Return ``x S^T + bias`` for constant fan-in."""
    del out_features
    return _picked(x, values, indices.to(torch.int32), 1, bias)


def _picked(x: Tensor, weights: Tensor, places: Tensor, groups: int, bias: Tensor | None) -> Tensor:
    weights, places = laid_out(weights, places, width(weights.shape[0], MOST))
    y: Tensor = PICKED_SUMS(x, weights, places, groups, None, None)
    return y if bias is None else y + bias


def laid_out(weights: Tensor, places: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Return weights and places of ``(o, ...)`` slots as ``(o/n, slots, n)``, tile after tile."""
    first, second = (
        t.reshape(-1, n, math.prod(t.shape[1:])).transpose(1, 2).contiguous()
        for t in (weights, places)
    )
    return first, second


def _applies(g: Geometry) -> bool:
    vectors = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return fits(g) and vectors and g.shape.out_features % 16 == 0


def _laid_out(g: Geometry) -> float:
    return 0.0 if g.frozen else 2.0 * moved(g.nnz, g.item)


def _nm_cost(g: Geometry) -> float | None:
    if not isinstance(g.structure, NM) or g.structure.m > GROUP or not _applies(g):
        return None
    kept, outputs = g.nnz // g.shape.out_features, g.shape.out_features
    rate, casts = widening(g, 0.35)
    return gemm(g.tokens, kept, outputs, efficiency=rate) + _laid_out(g) + casts


def _fan_in_cost(g: Geometry) -> float | None:
    if not isinstance(g.structure, FanIn) or g.tokens > FEW or not _applies(g):
        return None
    kept, outputs = g.nnz // g.shape.out_features, g.shape.out_features
    rate, casts = widening(g, 0.026)  # a gather of the hardware is a number at a time
    return gemm(g.tokens, kept, outputs, efficiency=rate) + _laid_out(g) + casts


NM_FORM = Formulation("micro_kernel", wide(nm), _nm_cost)
FAN_IN_FORM = Formulation("micro_kernel", wide(fan_in), _fan_in_cost)


# -- lowerings -------------------------------------------------------------------------------------


def lower_sums(x: Any, weights: Any, places: Any, groups: Any, *maps: Any) -> Any:
    """Lower ``padst::picked_sums``; what the kernel does not do calls the operator."""
    return _sums(x, weights, places, groups, maps) or cpp.fallback(
        PICKED_SUMS, x, weights, places, groups, *maps
    )


def _sums(x: Any, weights: Any, places: Any, groups: Any, maps: Sequence[Any]) -> Any | None:
    wide = x.get_size()[-1] if maps[0] is None else maps[0].get_size()[0]
    tiles, slots, n, count, inputs = cpp.numbers([*weights.get_size(), groups, wide])
    if not width(n, MOST) or places.get_dtype() not in (torch.uint8, torch.int32):
        return None
    out = tiles * n
    numbers = {"N": n, "M": inputs // count, "KEPT": slots // count, "WEIGHTS": slots * out}
    tensors = {"W": weights, "PLACES": places}
    text = source(CALL, "select.h")
    return sums("padst_picked", text, x, tensors, maps, out, numbers, apart=True)


LOWERINGS: dict[torch._ops.OpOverload, Callable[..., Any]] = {PICKED_SUMS: lower_sums}
