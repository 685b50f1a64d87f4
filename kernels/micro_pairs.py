"""Blocks of bf16 where the CPU multiplies it (AVX-512 BF16): two inputs at once, sums in fp32.

The weights lie by pairs of inputs, ``(o/r, k, c/2, r, 2)``, once where they are frozen; a pair of x
is read in the place of one fp32 number, so that all else is the kernel of ``micro_block``. Forward
only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from padst_compiler import cpp_templates as cpp
from padst_compiler.cpu_products import products_of
from padst_compiler.formulation import Formulation, Geometry, gemm, moved
from padst_compiler.kernel_ops import BLOCK_PAIRS
from padst_compiler.kernels.micro import block_width, fits, source, sums, widening
from padst_compiler.kernels.micro_block import blocks_of, chunk
from padst_compiler.structures import Block

__all__ = ["LINEAR_FORM", "LOWERINGS"]

# As LINEAR_RATE of micro_block, a share of the rate of fp32: AMD Zen 4, 1 thread, 90 %, 197 tokens.
RATE = 1.6
CALL = """
    {%- set ROW = I + (0 if READ.endswith("HERE") else 16) %}
    const padst::Layout blocks{INDICES, nullptr, {{KEPT}}, {{GROUPS}}};
    padst::block_sums<{{N}}, {{IN}}, {{OUT}}, {{ROW}}, {{READ}}, {{MOVED}}, {{CHUNK}},
        padst::Pairs>(
        (const float*)X, {{FEATURES}}, tokens, {{FEATURES}}, {{I}}, {{in_map}}, (const float*)W,
        blocks, {{out_map}}, threads, store);
"""


def linear(
    x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None, out_features: int
) -> Tensor:
    """Return ``x S^T + bias``: pairs of inputs, summed in fp32 and rounded once."""
    pairs = values.unflatten(2, (-1, 2)).transpose(-1, -2).contiguous()
    y: Tensor = BLOCK_PAIRS(x, pairs, indices, out_features, None, None)
    return (y if bias is None else y + bias.to(y.dtype)).to(x.dtype)


def _cost(g: Geometry) -> float | None:
    structure = g.structure
    if not isinstance(structure, Block) or not structure.balanced or g.dtype != torch.bfloat16:
        return None
    rows, columns = structure.sides
    if not fits(g) or rows % 16 or columns % 2 or "avx512" not in products_of(g.dtype):
        return None
    rate, _ = widening(g, RATE)
    packed = 0.0 if g.frozen else moved(g.nnz, g.item)
    return gemm(g.tokens, columns, rows, g.nnz // (rows * columns), rate) + packed


LINEAR_FORM = Formulation("bf16_pairs", linear, _cost)


def lower_pairs(x: Any, *rest: Any) -> Any:
    """Lower ``padst::block_pairs``; what the kernel does not do calls the operator."""
    return _sums(x, *rest) or cpp.fallback(BLOCK_PAIRS, x, *rest)


def _sums(x: Any, pairs: Any, indices: Any, out_features: Any, in_map: Any, out_map: Any) -> Any:
    dtype = torch.bfloat16
    blocks = blocks_of(x, indices, pairs.get_size()[:4], out_features, dtype)
    if blocks is None or pairs.get_dtype() is not dtype or not block_width(blocks["R"]):
        return None
    rows, kept, half, r = (blocks[name] for name in ("ROWS", "KEPT", "C", "R"))
    numbers = {"GROUPS": rows, "KEPT": kept, "IN": half, "OUT": r, "N": block_width(r)}
    numbers |= {"WEIGHTS": rows * kept * half * r, "CHUNK": chunk(kept * half)}
    tensors, maps = {"W": pairs, "INDICES": indices}, (in_map, out_map)
    text, total = source(CALL, "block.h"), rows * r
    return sums(
        "padst_block_pairs", text, x, tensors, maps, total, numbers, apart=False, dtype=dtype
    )


LOWERINGS: dict[torch._ops.OpOverload, Callable[..., Any]] = {BLOCK_PAIRS: lower_pairs}
