"""Diagonal kernels in C++: inputs, weights and outputs side by side. fp32 on a CPU.

Sums of eight tokens and 32 outputs over the diagonals that cross them; the gradient of the inputs
is the same with the roles of inputs and outputs changed. For the gradient of the weights sums of
six adjacent diagonals, 64 weights of each, run over sixteen tokens: far ones would not share what
they read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from padst_compiler import cpp_templates as cpp
from padst_compiler.formulation import Formulation, Geometry, gemm, moved
from padst_compiler.kernel_ops import DIAGONAL_SUMS
from padst_compiler.kernels.micro import fits, gradient, source, sums, wide, widening, width
from padst_compiler.ops import LINEAR_DW
from padst_compiler.structures import Diagonal

__all__ = ["DW_FORM", "DX_FORM", "LINEAR_FORM", "LOWERINGS"]

MOST = 32  # outputs of a tile

CALL = """
    padst::diagonal_sums<{{N}}, {{I}}, {{DOWN}}, {{READ}}, {{MOVED}}>(
        X, row, tokens, {{FEATURES}}, {{in_map}}, W, PLACES,
        {{"STARTS" if STARTS is defined else "nullptr"}},
        {{COUNT}}, {{O}}, {{out_map}}, threads, store);
"""
DW_CALL = """
    {%- set fixed, moving = ("X", "G") if DOWN else ("G", "X") %}
    padst::diagonal_gradient<{{N}}>(
        {{fixed}}, {{kernel.stride(inputs[fixed], 0)}}, {{LENGTH}}, {{moving}},
        {{kernel.stride(inputs[moving], 0)}}, {{AROUND}}, tokens, INDICES, {{COUNT}}, threads,
        store);
"""


# -- formulations ----------------------------------------------------------------------------------


def linear(
    x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None, out_features: int
) -> Tensor:
    """Return ``x S^T + bias``."""
    y = _product(x, values, indices, out_features, down=out_features >= x.shape[-1])
    return y if bias is None else y + bias


def dx(grad: Tensor, values: Tensor, indices: Tensor, in_features: int) -> Tensor:
    """Return ``grad S``."""
    return _product(grad, values, indices, in_features, down=grad.shape[-1] < in_features)


def dw(grad: Tensor, x: Tensor, indices: Tensor, unit: Sequence[int]) -> Tensor:
    """Return the gradient of the kept diagonals: the operator stays."""
    result: Tensor = LINEAR_DW["diagonal"](grad, x, indices, unit)
    return result


def _product(x: Tensor, values: Tensor, indices: Tensor, outputs: int, *, down: bool) -> Tensor:
    n = width(outputs, MOST)
    weights, places, starts = crossings(
        values[0], indices[0].long(), (x.shape[-1], outputs), n, down=down
    )
    y: Tensor = DIAGONAL_SUMS(x, weights, places, starts, outputs, None, None)
    return y


def crossings(
    values: Tensor, offsets: Tensor, sides: tuple[int, int], n: int, *, down: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the weights where diagonals cross tiles of n outputs, the inputs there, the starts.

    Every diagonal crosses every tile unless it goes down: then there are no starts.

    Args:
        values: ``(K, length)``.
        offsets: ``(K,)``, int64.
        sides: numbers of inputs and outputs; tiles of n make up the outputs.
        n: outputs of a tile.
        down: weight c of offset d belongs to output ``c + d``, else to output c.
    """
    (count, length), (inputs, outputs) = values.shape, sides
    tiles, along = outputs // n, torch.arange(n, device=values.device)
    if not down:
        weights = values.view(count, tiles, n).transpose(0, 1).reshape(-1, n)
        places = torch.arange(0, outputs, n, device=values.device)[:, None] + offsets
        places = (places % inputs).flatten()
        return weights.contiguous(), places.to(torch.int32), None
    # A diagonal crosses length / n tiles, and one more in part: zeros stand around its weights.
    steps = torch.arange(-(-length // n) + 1, device=values.device)
    first = (offsets // n)[:, None] + steps
    inside = first * n - offsets[:, None] + n  # in the padded weights, and in padded inputs
    order = (first % tiles).flatten().argsort(stable=True)
    at = torch.arange(count, device=values.device)[:, None].expand_as(inside).flatten()[order]
    places = inside.flatten()[order].clamp(max=length + n)
    padded = torch.nn.functional.pad(values, (n, n))
    weights = padded.flatten()[(at * (length + 2 * n) + places)[:, None] + along]
    tile = (first % tiles).flatten()[order]
    starts = torch.searchsorted(tile, torch.arange(tiles + 1, device=values.device))
    return weights, places.to(torch.int32), starts.to(torch.int32)


def _cost(g: Geometry, outputs: int) -> float | None:
    if not isinstance(g.structure, Diagonal) or not width(outputs, MOST) or not fits(g):
        return None
    efficiency = 0.3 if outputs % MOST == 0 else 0.2  # as in micro_block
    laid_out = 0.0 if g.frozen else moved(g.nnz, g.item)
    efficiency, casts = widening(g, efficiency)
    return gemm(g.tokens, g.nnz // outputs, outputs, efficiency=efficiency) + laid_out + casts


DW_RATE = 0.28  # 1 thread, AVX-512, 90 %


def _dw_cost(g: Geometry) -> float | None:
    length = min(g.shape.out_features, g.shape.in_features)
    if not isinstance(g.structure, Diagonal) or not width(length) or not fits(g):
        return None
    rate, casts = widening(g, DW_RATE if length % 64 == 0 else 0.7 * DW_RATE)
    return gemm(g.tokens, g.nnz // length, length, efficiency=rate) + casts


LINEAR_FORM = Formulation("micro_kernel", wide(linear), lambda g: _cost(g, g.shape.out_features))
DX_FORM = Formulation("micro_kernel", wide(dx), lambda g: _cost(g, g.shape.in_features))
DW_FORM = Formulation("micro_kernel", wide(dw), _dw_cost)


# -- lowerings -------------------------------------------------------------------------------------


def lower_sums(x: Any, weights: Any, places: Any, starts: Any, outputs: Any, *maps: Any) -> Any:
    """Lower ``padst::diagonal_sums``; what the kernel does not do calls the operator."""
    count, n, out = cpp.numbers([*weights.get_size(), outputs])
    numbers: dict[str, Any] = {"N": n, "COUNT": count, "WEIGHTS": count * n}
    numbers["DOWN"] = "false" if starts is None else "true"
    tensors = {"W": weights, "PLACES": places} | ({} if starts is None else {"STARTS": starts})
    text = source(CALL, "diagonal.h")
    y = sums("padst_diagonal", text, x, tensors, maps, out, numbers, apart=True)
    return y or cpp.fallback(DIAGONAL_SUMS, x, weights, places, starts, outputs, *maps)


def lower_dw(grad: Any, x: Any, indices: Any, unit: Sequence[Any]) -> Any:
    """Lower ``padst::diagonal_linear_dw``; what the kernel does not do calls the operator."""
    count, length = cpp.numbers([indices.get_size()[1], *unit])
    outputs, inputs = cpp.numbers([grad.get_size()[-1], x.get_size()[-1]])
    y = None
    if width(length) and indices.get_dtype() is torch.int32:
        numbers = {"N": width(length), "LENGTH": length, "AROUND": max(outputs, inputs)}
        numbers |= {"COUNT": count, "DOWN": outputs >= inputs}
        text, flat = source(DW_CALL, "diagonal_gradient.h"), cpp.view(indices, [count])
        y = gradient("padst_diagonal_dw", text, grad, x, flat, (count, length), numbers)
    if y is None:
        return cpp.fallback(LINEAR_DW["diagonal"], grad, x, indices, unit)
    return cpp.view(y, [1, count, length])


LOWERINGS: dict[torch._ops.OpOverload, Callable[..., Any]] = {
    DIAGONAL_SUMS: lower_sums,
    LINEAR_DW["diagonal"]: lower_dw,
}
