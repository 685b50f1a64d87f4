"""Block kernels in C++: sums in registers, block columns read in place, nothing gathered.

The operators themselves stay in the graph and Inductor lowers them by ``LOWERINGS``: the storage
``(o/r, k, c, r)`` is what the kernel reads, the outputs of a block side by side. fp32 on a CPU.

========  =========================================================================================
linear    sums of a few tokens and a row of blocks over its blocks
dx        the same over the blocks of a block column, which are turned and listed first
dw        sums of a few inputs and a block's outputs over tokens, its gradients side by side
========  =========================================================================================
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from padst_compiler import cpp_templates as cpp
from padst_compiler.formulation import Formulation, Geometry, gemm, moved
from padst_compiler.kernel_ops import MAPPED
from padst_compiler.kernels.micro import block_width, fits, gradient, source, sums, wide, widening
from padst_compiler.ops import LINEAR, LINEAR_DW, LINEAR_DX
from padst_compiler.structures import Block

__all__ = ["DW_FORM", "DX_FORM", "LINEAR_FORM", "LOWERINGS", "ROW", "blocks_of", "chunk"]

ROW = """
    {%- set stride = X.get_stride()[0]|string %}
    {%- set ROW = I + 16 if not READ.endswith("HERE") else stride if stride.isdigit() else 0 %}"""
LINEAR_CALL = (
    ROW
    + """
    const padst::Layout blocks{INDICES, nullptr, {{KEPT}}, {{GROUPS}}};
    padst::block_sums<{{N}}, {{IN}}, {{OUT}}, {{ROW}}, {{READ}}, {{MOVED}}, {{CHUNK}}>(
        X, row, tokens, {{FEATURES}}, {{I}}, {{in_map}}, W, blocks, {{out_map}}, threads, store);
"""
)
DX_CALL = (
    ROW
    + """
    const padst::ByColumn<{{IN}}, {{OUT}}> turned(
        W, INDICES, {{COUNT // KEPT}}, {{KEPT}}, {{GROUPS}}, threads);
    padst::block_sums<{{N}}, {{IN}}, {{OUT}}, {{ROW}}, {{READ}}, {{MOVED}}>(
        X, row, tokens, {{FEATURES}}, {{I}}, {{in_map}}, turned.weights.begin, turned.layout(),
        {{out_map}}, threads, store);
"""
)
DW_CALL = """
    padst::block_gradient<{{N}}, {{IN}}, {{OUT}}>(
        X, row, {{kernel.size(X, 1)}}, G, {{kernel.stride(G, 0)}}, tokens, INDICES, {{GROUPS}},
        {{KEPT}}, threads, store);
"""


# -- formulations ----------------------------------------------------------------------------------


def linear(
    x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None, out_features: int
) -> Tensor:
    """Return ``x S^T + bias``; the operator stays, and the bias is what follows it."""
    y: Tensor = LINEAR["block"](x, values, indices, None, out_features)
    return y if bias is None else y + bias


def dx(grad: Tensor, values: Tensor, indices: Tensor, in_features: int) -> Tensor:
    """Return ``grad S``: the operator stays."""
    result: Tensor = LINEAR_DX["block"](grad, values, indices, in_features)
    return result


def dw(grad: Tensor, x: Tensor, indices: Tensor, unit: Sequence[int]) -> Tensor:
    """Return the gradient of the kept blocks: the operator stays."""
    result: Tensor = LINEAR_DW["block"](grad, x, indices, unit)
    return result


# Shares of the rate of a dense product: 1 thread, AVX-512, 90 %, 197 and 1576 tokens.
LINEAR_RATE, DX_RATE, DW_RATE = 0.6, 0.35, 0.3


def _product(g: Geometry, outputs: int, inputs: int, rate: float) -> float | None:
    tiled = isinstance(g.structure, Block) and g.structure.balanced and block_width(outputs)
    if not tiled or not fits(g):
        return None
    narrow = {4: 0.25, 8: 0.5}.get(math.gcd(outputs, 16), 1.0)
    rate, casts = widening(g, rate * narrow)
    return gemm(g.tokens, inputs, outputs, g.nnz // (inputs * outputs), rate) + casts


def _linear_cost(g: Geometry) -> float | None:
    assert isinstance(g.structure, Block)
    return _product(g, *g.structure.sides, rate=LINEAR_RATE)


def _dx_cost(g: Geometry) -> float | None:
    assert isinstance(g.structure, Block)
    rows, columns = g.structure.sides
    cost = _product(g, columns, rows, rate=DX_RATE)
    return None if cost is None else cost + moved(g.nnz, g.item)  # the weights are turned


def _dw_cost(g: Geometry) -> float | None:
    assert isinstance(g.structure, Block)
    return _product(g, *g.structure.sides, rate=DW_RATE)


LINEAR_FORM = Formulation("micro_kernel", wide(linear), _linear_cost)
DX_FORM = Formulation("micro_kernel", wide(dx), _dx_cost)
DW_FORM = Formulation("micro_kernel", wide(dw), _dw_cost)


# -- lowerings -------------------------------------------------------------------------------------


def lower_linear(x: Any, values: Any, indices: Any, bias: Any, out_features: Any) -> Any:
    """Lower ``padst::block_linear``; what the kernel does not do calls the operator."""
    y = None if bias is not None else _linear(x, values, indices, out_features, None, None)
    return y or cpp.fallback(LINEAR["block"], x, values, indices, bias, out_features)


def lower_dx(grad: Any, values: Any, indices: Any, in_features: Any) -> Any:
    """Lower ``padst::block_linear_dx``; what the kernel does not do calls the operator."""
    y = _dx(grad, values, indices, in_features, None, None)
    return y or cpp.fallback(LINEAR_DX["block"], grad, values, indices, in_features)


def lower_linear_mapped(x: Any, *rest: Any) -> Any:
    """Lower ``padst::block_linear_mapped``; what the kernel does not do calls the operator."""
    return _linear(x, *rest) or cpp.fallback(MAPPED[LINEAR["block"]], x, *rest)


def lower_dx_mapped(grad: Any, *rest: Any) -> Any:
    """Lower ``padst::block_linear_dx_mapped``; what the kernel does not do calls the operator."""
    return _dx(grad, *rest) or cpp.fallback(MAPPED[LINEAR_DX["block"]], grad, *rest)


def lower_dw(grad: Any, x: Any, indices: Any, unit: Sequence[Any]) -> Any:
    """Lower ``padst::block_linear_dw``; what the kernel does not do calls the operator."""
    blocks = blocks_of(grad, indices, [*indices.get_size(), *unit], grad.get_size()[-1])
    if blocks is None or not block_width(blocks["R"]):
        return cpp.fallback(LINEAR_DW["block"], grad, x, indices, unit)
    rows, kept, c, r = (blocks[name] for name in ("ROWS", "KEPT", "C", "R"))
    numbers = {"GROUPS": rows, "KEPT": kept, "IN": c, "OUT": r, "N": block_width(r)}
    text, sizes = source(DW_CALL, "block.h"), (rows * kept * c, r)
    y = gradient("padst_block_dw", text, grad, x, indices, sizes, numbers)
    return cpp.view(y, [rows, kept, c, r])


def blocks_of(
    x: Any,
    indices: Any,
    sizes: Sequence[Any],
    out_features: Any,
    dtype: torch.dtype = torch.float32,
) -> dict[str, int] | None:
    """Return the numbers of a balanced layer of blocks, or None where the kernels do not apply."""
    if x.get_device().type != "cpu" or x.get_dtype() is not dtype:
        return None
    if indices.get_dtype() is not torch.int32 or not cpp.are_numbers([*sizes, out_features]):
        return None
    rows, kept, c, r, total = cpp.numbers([*sizes, out_features])
    if rows * r != total:  # free blocks: one group of all
        return None
    return {"ROWS": rows, "KEPT": kept, "C": c, "R": r}


def chunk(summed: int, inputs: int) -> int:
    """Return how many tokens pass a tile's weights together; outputs sum ``summed`` of ``inputs``.

    The weights of many inputs come from far: those of a dense layer once for 128 tokens, as long as
    the tokens' 2^17 numbers stay in the L2 cache.
    """
    return 32 if summed < 512 else max(32, min(128, (1 << 17) // inputs // 16 * 16))


def _linear(x: Any, values: Any, indices: Any, out: Any, in_map: Any, out_map: Any) -> Any:
    blocks = blocks_of(x, indices, values.get_size(), out)
    if blocks is None or not block_width(blocks["R"]):
        return None
    rows, kept, c, r = (blocks[name] for name in ("ROWS", "KEPT", "C", "R"))
    numbers = {"GROUPS": rows, "KEPT": kept, "IN": c, "OUT": r, "N": block_width(r)}
    (inputs,) = cpp.numbers((x if in_map is None else in_map).get_size()[-1:])
    numbers |= {"WEIGHTS": rows * kept * c * r, "CHUNK": chunk(kept * c, inputs)}
    tensors = {"W": values, "INDICES": indices}
    text, maps = source(LINEAR_CALL, "block.h"), (in_map, out_map)
    return sums("padst_block", text, x, tensors, maps, rows * r, numbers, apart=False)


def _dx(grad: Any, values: Any, indices: Any, in_features: Any, in_map: Any, out_map: Any) -> Any:
    wide = grad if in_map is None else in_map
    blocks = blocks_of(grad, indices, values.get_size(), wide.get_size()[-1])
    if blocks is None or not block_width(blocks["C"]):
        return None
    rows, kept, c, r = (blocks[name] for name in ("ROWS", "KEPT", "C", "R"))
    (inputs,) = cpp.numbers([in_features])
    numbers = {"GROUPS": inputs // c, "COUNT": rows * kept, "KEPT": kept, "IN": r, "OUT": c}
    numbers |= {"N": block_width(c), "WEIGHTS": rows * kept * c * r}
    tensors = {"W": values, "INDICES": indices}
    text, maps = source(DX_CALL, "block.h"), (in_map, out_map)
    return sums("padst_block_dx", text, grad, tensors, maps, inputs, numbers, apart=False)


LOWERINGS: dict[torch._ops.OpOverload, Callable[..., Any]] = {
    LINEAR["block"]: lower_linear,
    LINEAR_DX["block"]: lower_dx,
    LINEAR_DW["block"]: lower_dw,
    MAPPED[LINEAR["block"]]: lower_linear_mapped,
    MAPPED[LINEAR_DX["block"]]: lower_dx_mapped,
}
