"""Element kernels on a GPU: what they are predicted to cost, and how Inductor lowers to them.

The texts are those of ``triton_sums.py``, for few tokens; for more of them fan-in has that of
``triton_turned.py``, N:M that of ``triton_expand.py``. Then a dense product is cheaper.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from padst_compiler import cpp_templates as inductor
from padst_compiler import triton_templates as triton
from padst_compiler.formulation import Formulation, Geometry
from padst_compiler.gpu_cost import (
    APART,
    expanded_seconds,
    is_gpu,
    launches,
    priced,
    seconds,
    turned_seconds,
)
from padst_compiler.kernel_ops import INTO, MAPPED
from padst_compiler.kernels import triton_expand, triton_sums, triton_turned
from padst_compiler.kernels.gpu_lowering import (
    Lowering,
    gradient,
    lowered,
    mapped,
    rows,
    takes,
    tokens,
    width,
)
from padst_compiler.ops import LINEAR, LINEAR_DW, LINEAR_DX
from padst_compiler.structures import NM

__all__ = ["DW_FORMS", "DX_FORMS", "FROZEN_FORMS", "LINEAR_FORMS", "LOWERINGS", "SORTED_FORM"]

NAMES = ("fan_in", "nm", "diagonal")


# -- formulations ----------------------------------------------------------------------------------

SORTED = 10  # times that what is sorted is read and written
# Instructions of a diagonal and an output, once and for each token, read off the compiled kernels,
# and how many a second 132 multiprocessors of 1.75 GHz start.
OFFSET, TOKEN, ISSUED = 26.0, 6.0, 2.96e13


def _sums(g: Geometry, *, lists: bool = False, more: int = 0, index: float = 4.0) -> float | None:
    """Return the cost of sums; ``index`` is the bytes of a weight's index."""
    if not (is_gpu(g) and triton.is_available()):
        return None
    numbers = g.tokens * (g.shape.in_features + g.shape.out_features) + g.nnz
    moved = numbers * g.item + index * g.nnz
    taken = seconds(2.0 * g.tokens * g.nnz, APART, moved)
    if lists:
        taken += seconds(0.0, 1.0, SORTED * 12.0 * g.nnz) + launches(4)
    return priced(taken + launches(more))


def _crossing(
    g: Geometry, *, dx: bool = False, ordered: bool = False, more: int = 0
) -> float | None:
    """Return the cost of sums of diagonals.

    Args:
        g: the call.
        dx: whether it is the gradient of the inputs.
        ordered: diagonals are sorted, so that those that miss a tile are left out together.
        more: further kernels.
    """
    if not (is_gpu(g) and triton.is_available()):
        return None
    outputs, inputs = g.shape.out_features, g.shape.in_features
    missed = (inputs / outputs) if dx else (outputs / inputs)
    moved = (g.tokens * (inputs + outputs) + g.nnz) * g.item
    met = g.nnz * (1.0 if ordered else max(1.0, missed))
    return priced(seconds(met * (OFFSET + TOKEN * g.tokens), ISSUED, moved) + launches(more))


def _products(g: Geometry, *, index: float = 4.0) -> float | None:
    """Return the cost of a forward pass, by the kernel that the lowering takes."""
    cost = _sums(g, index=index)
    if cost is None:
        return None
    outputs, inputs = g.shape.out_features, g.shape.in_features
    tokens, dtype = g.tokens, g.dtype
    moved = (tokens * (inputs + outputs) + g.nnz) * g.item + index * g.nnz
    if not isinstance(g.structure, NM):
        fits = triton_turned.pays((outputs, g.kept), inputs, tokens, dtype, int(index))
        return priced(turned_seconds(inputs, g.nnz, tokens, dtype, moved)) if fits else cost
    m = g.structure.m
    fits = triton_expand.pays((outputs, inputs // m, g.kept), inputs, tokens, dtype)
    taken = expanded_seconds((outputs, inputs), m, tokens, dtype, moved)
    return priced(taken) if fits else cost


def _linear_form(name: str) -> Formulation:
    def linear(
        x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None, out_features: int
    ) -> Tensor:
        y: Tensor = LINEAR[name](x, values, indices, None, out_features)
        return y if bias is None else y + bias

    return Formulation("triton", linear, _crossing if name == "diagonal" else _products)


def _narrow(inputs: int, groups: int) -> torch.dtype | None:
    """Return the narrowest type that holds the places of so many inputs in so many groups."""
    most = inputs // groups
    return torch.uint8 if most <= 2**8 else torch.int16 if most <= 2**15 else None


def _narrow_form(name: str) -> Formulation:
    """Return the way of frozen weights whose indices are read in fewer bytes: one token waits."""

    def linear(
        x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None, out_features: int
    ) -> Tensor:
        kind = _narrow(x.shape[-1], math.prod(indices.shape[1:-1]))
        y: Tensor = LINEAR[name](x, values, indices.to(kind), None, out_features)
        return y if bias is None else y + bias

    def cost(g: Geometry) -> float | None:
        groups = g.shape.in_features // g.structure.m if isinstance(g.structure, NM) else 1
        kind = _narrow(g.shape.in_features, groups)
        return _products(g, index=kind.itemsize) if g.frozen and kind else None

    return Formulation("triton_narrow", linear, cost)


def _sorted(
    x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None, out_features: int
) -> Tensor:
    ordered, order = indices[0].sort(stable=True)
    kept = values.index_select(1, order)
    y: Tensor = LINEAR["diagonal"](x, kept, ordered[None], None, out_features)
    return y if bias is None else y + bias


def _sorted_cost(g: Geometry) -> float | None:
    wider = g.shape.out_features > g.shape.in_features  # else every diagonal meets every output
    return _crossing(g, ordered=True) if g.frozen and wider else None


SORTED_FORM = Formulation("triton_sorted", _sorted, _sorted_cost)
"""Frozen diagonals in the order of their offsets."""

FROZEN_FORMS = {
    "fan_in": _narrow_form("fan_in"),
    "nm": _narrow_form("nm"),
    "diagonal": SORTED_FORM,
}
LINEAR_FORMS = {name: _linear_form(name) for name in NAMES}
_LISTED, _DIAGONAL = partial(_sums, lists=True), partial(_crossing, dx=True)
DX_FORMS = {
    name: Formulation("triton", LINEAR_DX[name], _DIAGONAL if name == "diagonal" else _LISTED)
    for name in NAMES
}
_SUMS_DW, _DIAGONAL_DW = partial(_sums, more=1), partial(_crossing, ordered=True, more=1)
DW_FORMS = {
    name: Formulation("triton", LINEAR_DW[name], _DIAGONAL_DW if name == "diagonal" else _SUMS_DW)
    for name in NAMES
}


# -- lowerings -------------------------------------------------------------------------------------


def _gathered(
    x: Any, values: Any, indices: Any, out: Any, in_map: Any = None, into: Any = None
) -> Any:
    if not takes(x, values, indices, values.get_size()):
        return None
    sizes, (outputs,) = _sizes(values), inductor.numbers([out])
    given, about = {"W": values, "INDICES": indices}, (sizes, width(x, in_map), tokens(x))
    if triton_expand.pays(*about, x.get_dtype()):
        how = triton_expand.expanded(*about)
        return mapped(triton_expand.EXPANDED, x, given, outputs, [how], in_map, into)
    known = inductor.are_numbers(rows(x).get_size())
    if known and triton_turned.pays(*about, x.get_dtype(), indices.get_dtype().itemsize):
        return _turned(x, given, outputs, in_map, into)
    how = triton_sums.gathered_sums(*about)
    return mapped(triton_sums.GATHERED, x, given, outputs, [how], in_map, into)


def _turned(x: Any, given: Mapping[str, Any], outputs: int, in_map: Any, into: Any) -> Any:
    flat, kernel = rows(x), triton_turned.GATHERED
    (count,) = inductor.numbers(flat.get_size()[:1])
    how = triton_turned.gathered(_sizes(given["W"]), count)
    how = replace(how, values={**how.values, "OUT_MAP": into is not None})
    tensors = {"XT": triton.turned(flat, how.values["ROWS"], in_map), **given}
    if into is not None:
        kernel, tensors = kernel.reading("INTO"), {**tensors, "INTO": into}
    y = triton.run(kernel, tensors, (count, outputs), [how], x.get_dtype())
    return inductor.view(y, [*x.get_size()[:-1], outputs])


def _gathered_dx(
    grad: Any, values: Any, indices: Any, inputs: Any, in_map: Any = None, into: Any = None
) -> Any:
    if not takes(grad, values, indices, values.get_size()):
        return None
    sizes, (features,) = _sizes(values), inductor.numbers([inputs])
    columns = indices if len(sizes) == 2 else triton.shifted(indices, features // sizes[1])
    order, starts = triton.sorted_places(columns, features)
    how = triton_sums.listed_sums(sizes, features, tokens(grad))
    given = {"W": values, "ORDER": order, "STARTS": starts}
    return mapped(triton_sums.LISTED, grad, given, features, [how], in_map, into)


def _gathered_dw(grad: Any, x: Any, indices: Any, unit: Sequence[Any]) -> Any:
    if not takes(grad, x, indices, indices.get_size()):
        return None
    sizes = _sizes(indices)
    how = triton_sums.gathered_gradient(sizes, width(x), tokens(x))
    y = gradient(triton_sums.GATHERED_DW, grad, x, indices, how, [sizes[0], math.prod(sizes[1:])])
    return inductor.view(y, [*sizes, *unit])


def _diagonal(
    x: Any, values: Any, indices: Any, out: Any, in_map: Any = None, into: Any = None
) -> Any:
    return _diagonals(x, values, indices, out, in_map, into, dx=False)


def _diagonal_dx(
    grad: Any, values: Any, indices: Any, inputs: Any, in_map: Any = None, into: Any = None
) -> Any:
    return _diagonals(grad, values, indices, inputs, in_map, into, dx=True)


def _diagonals(
    x: Any, values: Any, indices: Any, out: Any, in_map: Any, into: Any, *, dx: bool
) -> Any:
    if not takes(x, values, indices, values.get_size()):
        return None
    sizes, (outputs,) = _sizes(values), inductor.numbers([out])
    how = triton_sums.diagonal_sums(sizes, width(x, in_map), outputs, tokens(x), dx=dx)
    given = {"W": values, "INDICES": indices}
    return mapped(triton_sums.DIAGONAL, x, given, outputs, [how], in_map, into)


def _diagonal_dw(grad: Any, x: Any, indices: Any, unit: Sequence[Any]) -> Any:
    if not takes(grad, x, indices, [*indices.get_size(), *unit]):
        return None
    sizes = (*_sizes(indices), *inductor.numbers(unit))
    how = triton_sums.diagonal_gradient(sizes, width(x), width(grad), tokens(x))
    return gradient(triton_sums.DIAGONAL_DW, grad, x, indices, how, list(sizes))


def _sizes(x: Any) -> tuple[int, ...]:
    return tuple(inductor.numbers(x.get_size()))


LOWERINGS: dict[torch._ops.OpOverload, Lowering] = {}
_RUNS: dict[str, tuple[Callable[..., Any], ...]] = {
    "fan_in": (_gathered, _gathered_dx, _gathered_dw),
    "nm": (_gathered, _gathered_dx, _gathered_dw),
    "diagonal": (_diagonal, _diagonal_dx, _diagonal_dw),
}
for _name, (_linear, _dx, _dw) in _RUNS.items():
    LOWERINGS[LINEAR[_name]] = lowered(LINEAR[_name], _linear, bias=3)
    LOWERINGS[LINEAR_DX[_name]] = lowered(LINEAR_DX[_name], _dx)
    LOWERINGS[LINEAR_DW[_name]] = lowered(LINEAR_DW[_name], _dw)
    for _op, _run in ((MAPPED[LINEAR[_name]], _linear), (MAPPED[LINEAR_DX[_name]], _dx)):
        LOWERINGS |= {_op: lowered(_op, _run, through=True), INTO[_op]: lowered(INTO[_op], _run)}
