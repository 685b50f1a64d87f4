"""Block kernels on a GPU: what they are predicted to cost, and how Inductor lowers to them.

The texts are those of ``triton_block.py``. The operators stay in the graph; Inductor fuses what
stands before them into the loads of x, and bias, activation and residual into the stores.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from padst_compiler import cpp_templates as inductor
from padst_compiler import triton_templates as triton
from padst_compiler.formulation import Formulation, Geometry
from padst_compiler.gpu_cost import feed, is_gpu, launches, priced, products, seconds
from padst_compiler.kernel_ops import BLOCK_MLP, INTO, MAPPED
from padst_compiler.kernels import micro_block, triton_block, triton_mlp
from padst_compiler.kernels.gpu_lowering import (
    Lowering,
    gradient,
    lowered,
    mapped,
    takes,
    tokens,
    width,
)
from padst_compiler.ops import LINEAR, LINEAR_DW, LINEAR_DX
from padst_compiler.structures import Block

__all__ = ["DW_FORM", "DX_FORM", "LINEAR_FORM", "LOWERINGS"]


# -- formulations ----------------------------------------------------------------------------------


def _product(g: Geometry, narrow: int, more: int = 0) -> float | None:
    """Return the cost of products of blocks, and of ``more`` small kernels around them."""
    fits = isinstance(g.structure, Block) and g.structure.balanced
    if not (fits and is_gpu(g) and triton.is_available()):
        return None
    numbers = g.tokens * (g.shape.in_features + g.shape.out_features) + g.nnz
    padded = max(1.0, 16 / narrow)  # a product has 16 rows and columns at least
    rate = feed(narrow) * products(g.dtype)
    taken = seconds(2.0 * g.tokens * g.nnz * padded, rate, numbers * g.item)
    return priced(taken + launches(more))


def _sides(g: Geometry) -> tuple[int, int]:
    return g.structure.sides if isinstance(g.structure, Block) else (1, 1)


LINEAR_FORM = Formulation("triton", micro_block.linear, lambda g: _product(g, _sides(g)[0]))
DX_FORM = Formulation("triton", micro_block.dx, lambda g: _product(g, _sides(g)[1], more=2))
DW_FORM = Formulation("triton", micro_block.dw, lambda g: _product(g, _sides(g)[0], more=1))


# -- lowerings -------------------------------------------------------------------------------------


def _linear(
    x: Any, values: Any, indices: Any, out: Any, in_map: Any = None, into: Any = None
) -> Any:
    sizes = _sizes(x, values, indices, values.get_size())
    if sizes is None or sizes[0] * sizes[3] != inductor.numbers([out])[0]:
        return None
    rows, _, c, r = sizes
    about = tokens(x), x.get_dtype()
    how = triton_block.sums(sizes, rows, c, *about, gathered=in_map is not None)
    given = {"W": values, "INDICES": indices}
    ways = triton_block.variants(how, x.get_dtype())
    return mapped(triton_block.LINEAR, x, given, rows * r, ways, in_map, into)


def _dx(
    grad: Any, values: Any, indices: Any, inputs: Any, in_map: Any = None, into: Any = None
) -> Any:
    sizes = _sizes(grad, values, indices, values.get_size())
    if sizes is None or sizes[0] * sizes[3] != width(grad, in_map):
        return None
    (features,) = inductor.numbers([inputs])
    columns = features // sizes[2]
    order, starts = triton.sorted_places(indices, columns)
    about = tokens(grad), grad.get_dtype()
    how = triton_block.sums(sizes, columns, sizes[3], *about, gathered=in_map is not None)
    given = {"W": values, "ORDER": order, "STARTS": starts}
    ways = triton_block.variants(how, grad.get_dtype())
    return mapped(triton_block.DX, grad, given, features, ways, in_map, into)


def _dw(grad: Any, x: Any, indices: Any, unit: Sequence[Any]) -> Any:
    sizes = _sizes(grad, x, indices, [*indices.get_size(), *unit])
    if sizes is None or sizes[0] * sizes[3] != width(grad):
        return None
    how = triton_block.gradient(sizes, tokens(x), width(x), x.get_dtype())
    return gradient(triton_block.DW, grad, x, indices, how, list(sizes))


def _mlp(
    x: Any,
    values1: Any,
    indices1: Any,
    bias1: Any,
    values2: Any,
    indices2: Any,
    hidden: Any,
    out: Any,
    activation: str,
    in_map: Any = None,
    into: Any = None,
) -> Any:
    first = _sizes(x, values1, indices1, values1.get_size())
    second = _sizes(x, values2, indices2, values2.get_size())
    if first is None or second is None or not triton_mlp.fits(first, second):
        return None
    if [first[0] * first[3], second[0] * second[3]] != inductor.numbers([hidden, out]):
        return None
    about, dtype = tokens(x), x.get_dtype()
    told = {"biased": bias1 is not None, "gathered": in_map is not None}
    how = triton_mlp.programs(first, second, about, dtype, activation, **told)
    given = {"W1": values1, "I1": indices1, "W2": values2, "I2": indices2}
    kernel = triton_mlp.MLP if bias1 is None else triton_mlp.MLP.reading("B1")
    given |= {} if bias1 is None else {"B1": bias1}
    return mapped(kernel, x, given, second[0] * second[3], [how], in_map, into)


def _sizes(
    x: Any, other: Any, indices: Any, sizes: Sequence[Any]
) -> tuple[int, int, int, int] | None:
    """Return the sizes of the weights, or None where the kernels do not apply."""
    if not takes(x, other, indices, sizes):
        return None
    rows, kept, c, r = inductor.numbers(sizes)
    return rows, kept, c, r


LOWERINGS: dict[torch._ops.OpOverload, Lowering] = {
    LINEAR["block"]: lowered(LINEAR["block"], _linear, bias=3),
    LINEAR_DX["block"]: lowered(LINEAR_DX["block"], _dx),
    LINEAR_DW["block"]: lowered(LINEAR_DW["block"], _dw),
}
for _op, _run in (
    (MAPPED[LINEAR["block"]], _linear),
    (MAPPED[LINEAR_DX["block"]], _dx),
    (BLOCK_MLP, _mlp),
):
    LOWERINGS |= {_op: lowered(_op, _run, through=True), INTO[_op]: lowered(INTO[_op], _run)}
