"""Blocks of bf16 where the CPU multiplies it (AVX-512 BF16): two inputs at once, sums in fp32.

The weights lie by pairs of inputs, ``(o/r, k, c/2, r, 2)``, once where they are frozen; a pair of x
is read in the place of one fp32 number, so that all else is the kernel of ``micro_block``. Forward
only, and no map is read or written through: gathers stay in front of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from padst_compiler import cpp_templates as cpp
from padst_compiler.formulation import Formulation, Geometry, gemm, moved
from padst_compiler.kernel_ops import BLOCK_PAIRS
from padst_compiler.kernels.micro import fits, products_of, source, sums, widening, width
from padst_compiler.kernels.micro_block import LINEAR_RATE, blocks_of
from padst_compiler.structures import Block

__all__ = ["LINEAR_FORM", "LOWERINGS"]

CALL = """
    {%- set ROW = I + (16 if READ.endswith("APART") else 0) %}
    const padst::Layout blocks{INDICES, nullptr, {{KEPT}}, {{GROUPS}}};
    padst::block_sums<{{N}}, {{IN}}, {{OUT}}, {{ROW}}, {{READ}}, false, 32, padst::Pairs>(
        (const float*)X, {{I}}, tokens, {{I}}, {{I}}, nullptr, (const float*)W, blocks, nullptr,
        threads, store);
"""


def linear(
    x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None, out_features: int
) -> Tensor:
    """Return ``x S^T + bias``: pairs of inputs, summed in fp32 and rounded once."""
    pairs = values.unflatten(2, (-1, 2)).transpose(-1, -2).contiguous()
    y: Tensor = BLOCK_PAIRS(x, pairs, indices, out_features)
    return (y if bias is None else y + bias.to(y.dtype)).to(x.dtype)


def _cost(g: Geometry) -> float | None:
    structure = g.structure
    if not isinstance(structure, Block) or not structure.balanced or g.dtype != torch.bfloat16:
        return None
    rows, columns = structure.sides
    if not fits(g) or rows % 16 or columns % 2 or "avx512" not in products_of(g.dtype):
        return None
    # Twice the products of an instruction of fp32, as Intel documents; it was not run here.
    rate, _ = widening(g, 2.0 * LINEAR_RATE)
    packed = 0.0 if g.frozen else moved(g.nnz, g.item)
    return gemm(g.tokens, columns, rows, g.nnz // (rows * columns), rate) + packed


LINEAR_FORM = Formulation("bf16_pairs", linear, _cost)


def lower_pairs(x: Any, pairs: Any, indices: Any, out_features: Any) -> Any:
    """Lower ``padst::block_pairs``; what the kernel does not do calls the operator."""
    y = _sums(x, pairs, indices, out_features)
    return y or cpp.fallback(BLOCK_PAIRS, x, pairs, indices, out_features)


def _sums(x: Any, pairs: Any, indices: Any, out_features: Any) -> Any:
    dtype = torch.bfloat16
    blocks = blocks_of(x, indices, pairs.get_size()[:4], out_features, dtype)
    if blocks is None or pairs.get_dtype() is not dtype or not width(blocks["R"]):
        return None
    rows, kept, half, r = (blocks[name] for name in ("ROWS", "KEPT", "C", "R"))
    numbers = {"GROUPS": rows, "KEPT": kept, "IN": half, "OUT": r, "N": width(r)}
    numbers["WEIGHTS"] = rows * kept * half * r
    text, tensors, no_maps = source(CALL, "block.h"), {"W": pairs, "INDICES": indices}, (None, None)
    total = rows * r
    return sums(
        "padst_block_pairs", text, x, tensors, no_maps, total, numbers, apart=False, dtype=dtype
    )


LOWERINGS: dict[torch._ops.OpOverload, Callable[..., Any]] = {BLOCK_PAIRS: lower_pairs}
