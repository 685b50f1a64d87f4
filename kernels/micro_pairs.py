"""Blocks of bf16 where the CPU multiplies it (AVX-512 BF16): two products at once, sums in fp32.

A pair of numbers is read in the place of one of fp32, so that all else is the kernel of
``micro_block``. Registered for Inductor, as there.

=========  ========================================================================================
pairs      the forward pass of frozen weights, whose pairs of inputs lie as ``(o/r, k, c/2, r, 2)``
zipped     the same of weights that change: the kernel makes the pairs first
dx         pairs of outputs, which lie side by side; block columns are listed as in ``micro_block``
dw         pairs of tokens
=========  ========================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from padst_compiler import cpp_templates as cpp
from padst_compiler.cpu_products import products_of
from padst_compiler.formulation import Formulation, Geometry, gemm, moved
from padst_compiler.kernels.micro import block_width, fits, gradient, source, sums, widening
from padst_compiler.kernels.micro_block import blocks_of, chunk
from padst_compiler.pairs_ops import BLOCK_PAIRS, BLOCK_PAIRS_DW, BLOCK_PAIRS_DX
from padst_compiler.structures import Block

__all__ = ["DW_FORM", "DX_FORM", "LINEAR_FORM", "LOWERINGS", "ZIPPED_FORM"]

BF16 = torch.bfloat16
SUMS = """
    {%- set ROW = I + (0 if READ.endswith("HERE") else 16) %}
    LAYOUT
    padst::block_sums<{{N}}, {{IN}}, {{OUT}}, {{ROW}}, {{READ}}, {{MOVED}}, {{CHUNK}},
        padst::Pairs>(
        (const float*)X, {{FEATURES}}, tokens, {{FEATURES}}, {{I}}, {{in_map}}, weights, layout,
        {{out_map}}, threads, store);
"""
BY_ROW = "const padst::Layout layout{INDICES, nullptr, {{KEPT}}, {{GROUPS}}};"
PAIRS = f"const auto* const weights = (const float*)W; {BY_ROW}"
ZIPPED = f"""
    const padst::Zipped<{{{{OUT}}}}> zipped(
        (const uint16_t*)W, {{{{GROUPS * KEPT * IN}}}}, threads);
    const auto* const weights = zipped.weights.begin;
    {BY_ROW}"""
TURNED = """
    const padst::ByColumn<{{IN}}, {{OUT}}> turned(
        (const float*)W, INDICES, {{COUNT // KEPT}}, {{KEPT}}, {{GROUPS}}, threads);
    const auto* const weights = turned.weights.begin;
    const padst::Layout layout = turned.layout();"""
DW_CALL = """
    padst::block_gradient<{{N}}, {{IN}}, {{OUT}}, padst::Pairs>(
        (const uint16_t*)X, row, {{kernel.size(X, 1)}}, (const uint16_t*)G, {{kernel.stride(G, 0)}},
        tokens, INDICES, {{GROUPS}}, {{KEPT}}, threads, store);
"""


# -- formulations ----------------------------------------------------------------------------------


def linear(
    x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None, out_features: int
) -> Tensor:
    """Return ``x S^T + bias``: pairs of inputs, summed in fp32 and rounded once."""
    return zipped(x, _paired(values), indices, bias, out_features)


def zipped(
    x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None, out_features: int
) -> Tensor:
    """Return the same; the kernel makes the pairs."""
    y: Tensor = BLOCK_PAIRS(x, values, indices, out_features, None, None)
    return (y if bias is None else y + bias.to(y.dtype)).to(x.dtype)


def dx(grad: Tensor, values: Tensor, indices: Tensor, in_features: int) -> Tensor:
    """Return ``grad S``: pairs of outputs, summed in fp32 and rounded once."""
    result: Tensor = BLOCK_PAIRS_DX(grad, values, indices, in_features, None, None)
    return result.to(grad.dtype)


def dw(grad: Tensor, x: Tensor, indices: Tensor, unit: Sequence[int]) -> Tensor:
    """Return the gradient of the kept blocks: pairs of tokens, summed in fp32 and rounded once."""
    result: Tensor = BLOCK_PAIRS_DW(grad, x, indices, unit)
    return result.to(x.dtype)


def _paired(values: Tensor) -> Tensor:
    pairs: Tensor = values.unflatten(2, (-1, 2)).transpose(-1, -2)
    return pairs.contiguous()


# As those of micro_block, shares of the rate of fp32: 1 thread, 90 %, 197 tokens; see `widening`.
LINEAR_RATE, DX_RATE, DW_RATE = 1.1, 0.8, 0.7


def _cost(g: Geometry, outputs: int, pairs: float, rate: float) -> float | None:
    """Return the cost where a block sums ``pairs``, for ``outputs`` side by side."""
    if not isinstance(g.structure, Block) or not g.structure.balanced or g.dtype is not BF16:
        return None
    if not fits(g) or outputs % 16 or pairs % 1 or "avx512" not in products_of(g.dtype):
        return None
    rate, _ = widening(g, rate)
    rows, columns = g.structure.sides
    return gemm(g.tokens, columns, rows, g.nnz // (rows * columns), rate)


def _linear_cost(g: Geometry) -> float | None:
    assert isinstance(g.structure, Block)
    rows, columns = g.structure.sides
    return _cost(g, rows, columns / 2, LINEAR_RATE) if g.frozen else None


def _zipped_cost(g: Geometry) -> float | None:
    assert isinstance(g.structure, Block)
    rows, columns = g.structure.sides
    cost = None if g.frozen else _cost(g, rows, columns / 2, LINEAR_RATE)
    return None if cost is None else cost + moved(g.nnz, g.item)


def _dx_cost(g: Geometry) -> float | None:
    assert isinstance(g.structure, Block)
    rows, columns = g.structure.sides
    cost = _cost(g, columns, rows / 2, DX_RATE)
    return None if cost is None else cost + moved(g.nnz, g.item)  # the weights are turned


def _dw_cost(g: Geometry) -> float | None:
    assert isinstance(g.structure, Block)
    return _cost(g, g.structure.sides[0], 1, DW_RATE)  # a token that has no other is one with zeros


LINEAR_FORM = Formulation("bf16_pairs", linear, _linear_cost)
ZIPPED_FORM = Formulation("bf16_zipped", zipped, _zipped_cost)
DX_FORM = Formulation("bf16_pairs", dx, _dx_cost)
DW_FORM = Formulation("bf16_pairs", dw, _dw_cost)


# -- lowerings -------------------------------------------------------------------------------------


def lower_linear(x: Any, *rest: Any) -> Any:
    """Lower ``padst::block_pairs``; what the kernel does not do calls the operator."""
    return _linear(x, *rest) or cpp.fallback(BLOCK_PAIRS, x, *rest)


def lower_dx(grad: Any, *rest: Any) -> Any:
    """Lower ``padst::block_pairs_dx``; what the kernel does not do calls the operator."""
    return _dx(grad, *rest) or cpp.fallback(BLOCK_PAIRS_DX, grad, *rest)


def lower_dw(grad: Any, x: Any, indices: Any, unit: Sequence[Any]) -> Any:
    """Lower ``padst::block_pairs_dw``; what the kernel does not do calls the operator."""
    blocks = blocks_of(grad, indices, [*indices.get_size(), *unit], grad.get_size()[-1], BF16)
    if blocks is None or not block_width(blocks["R"]) or x.get_dtype() is not BF16:
        return cpp.fallback(BLOCK_PAIRS_DW, grad, x, indices, unit)
    rows, kept, c, r = (blocks[name] for name in ("ROWS", "KEPT", "C", "R"))
    numbers = {"GROUPS": rows, "KEPT": kept, "IN": c, "OUT": r, "N": block_width(r)}
    text, sizes = source(DW_CALL, "block.h"), (rows * kept * c, r)
    y = gradient("padst_block_pairs_dw", text, grad, x, indices, sizes, numbers, BF16)
    return cpp.view(y, [rows, kept, c, r])


def _linear(x: Any, values: Any, indices: Any, width: Any, in_map: Any, out_map: Any) -> Any:
    blocks = blocks_of(x, indices, values.get_size()[:4], width, BF16)
    if blocks is None or values.get_dtype() is not BF16 or not block_width(blocks["R"]):
        return None
    rows, kept, c, r = (blocks[name] for name in ("ROWS", "KEPT", "C", "R"))
    pairs = len(values.get_size()) == 5
    if not pairs and c % 2:
        return None
    half = c if pairs else c // 2
    numbers = {"GROUPS": rows, "KEPT": kept, "IN": half, "OUT": r, "N": block_width(r)}
    (inputs,) = cpp.numbers((x if in_map is None else in_map).get_size()[-1:])
    numbers |= {"WEIGHTS": rows * kept * half * r, "CHUNK": chunk(kept * half, inputs // 2)}
    layout, maps = PAIRS if pairs else ZIPPED, (in_map, out_map)
    return _summed("padst_block_pairs", layout, x, values, indices, maps, rows * r, numbers)


def _dx(grad: Any, values: Any, indices: Any, width: Any, in_map: Any, out_map: Any) -> Any:
    wide = grad if in_map is None else in_map
    blocks = blocks_of(grad, indices, values.get_size(), wide.get_size()[-1], BF16)
    if blocks is None or values.get_dtype() is not BF16:
        return None
    rows, kept, c, r = (blocks[name] for name in ("ROWS", "KEPT", "C", "R"))
    if not block_width(c) or r % 2:
        return None
    (inputs,) = cpp.numbers([width])
    numbers = {"GROUPS": inputs // c, "COUNT": rows * kept, "KEPT": kept, "IN": r // 2, "OUT": c}
    numbers |= {"N": block_width(c), "WEIGHTS": rows * kept * c * r // 2, "CHUNK": 32}
    maps = (in_map, out_map)
    return _summed("padst_block_pairs_dx", TURNED, grad, values, indices, maps, inputs, numbers)


def _summed(
    name: str,
    layout: str,
    x: Any,
    values: Any,
    indices: Any,
    maps: tuple[Any, Any],
    outputs: int,
    numbers: dict[str, int],
) -> Any:
    text = source(SUMS.replace("LAYOUT", layout), "block.h")
    tensors = {"W": values, "INDICES": indices}
    return sums(name, text, x, tensors, maps, outputs, numbers, apart=False, dtype=BF16)


LOWERINGS: dict[torch._ops.OpOverload, Callable[..., Any]] = {
    BLOCK_PAIRS: lower_linear,
    BLOCK_PAIRS_DX: lower_dx,
    BLOCK_PAIRS_DW: lower_dw,
}
