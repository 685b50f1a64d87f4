"""Operators that take parts of an axis."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from torch import fx

from padst_compiler.passes.folding.analysis import Analysis, Rule, on_live
from padst_compiler.passes.folding.factors import Dims, Factor, Field, fresh, regroup, renewed
from padst_compiler.passes.folding.spaces import cut_at, leaves
from padst_compiler.rewrite import ATEN

__all__ = ["RULES", "fix_dim", "integer", "name_of", "operand_of", "run_of"]


def select(analysis: Analysis, node: fx.Node) -> None:
    """One position of a dimension is taken: a part of an axis, where it is its leading factor."""
    x, dim, index = operand_of(node), integer(node.args[1]), node.args[2]
    dims = analysis.dims(x)
    dim %= len(dims)
    if isinstance(index, int):
        size = analysis.shape(x)[dim]
        taken = _picked(dims, dim, index % size if isinstance(size, int) else 0)
        if taken is not None:
            analysis.keep(node, taken)
            return
    fix_dim(analysis, node, x, [dim])
    analysis.keep(node, dims[:dim] + dims[dim + 1 :])


def unbind(analysis: Analysis, node: fx.Node) -> None:
    """Every position of a dimension is taken."""
    x = operand_of(node)
    dims = analysis.dims(x)
    dim = integer(node.args[1] if len(node.args) > 1 else 0) % len(dims)
    taken = [_picked(dims, dim, index) for index in range(len(node.meta["val"]))]
    if any(one is None for one in taken):
        fix_dim(analysis, node, x, [dim])
        taken = [dims[:dim] + dims[dim + 1 :]] * len(taken)
    analysis.table[node] = [None if one is None else analysis.checked(one) for one in taken]


def split(analysis: Analysis, node: fx.Node) -> None:
    """A dimension falls into runs, each with an order of its own."""
    x = operand_of(node)
    dims = analysis.dims(x)
    dim = integer(node.args[2] if len(node.args) > 2 else 0) % len(dims)
    stops, parts = 0, []
    for value in node.meta["val"]:
        length = value.shape[dim]
        parts.append((stops, stops + length))
        stops += length
    runs = [run_of(analysis, x, dim, start, stop) for start, stop in parts]
    if len({stop - start for start, stop in parts}) == 1:
        runs = [run or _digit(analysis, node, x, dim, len(parts)) for run in runs]
    if any(run is None for run in runs):
        fix_dim(analysis, node, x, [dim])
        runs = [(*dims[:dim], *fresh([stop - start]), *dims[dim + 1 :]) for start, stop in parts]
        for run in runs:
            assert run is not None
            analysis.pin(run[dim], name_of(node))
    analysis.table[node] = [None if run is None else analysis.checked(run) for run in runs]


def getitem(analysis: Analysis, node: fx.Node) -> None:
    """One of several results."""
    known = analysis.table[operand_of(node)]
    at = node.args[1]
    dims = (
        known[at] if isinstance(known, list) and isinstance(at, int) and at < len(known) else None
    )
    if dims is None:
        name = getattr(operand_of(node).target, "__name__", operand_of(node).target)
        analysis.fix_result(node, f"{name} is not proved to move with a permutation")
    else:
        analysis.keep(node, renewed(dims))


def slice_(analysis: Analysis, node: fx.Node) -> None:
    """A run of a dimension is taken."""
    given: list[Any] = [*node.args, *(0, None, None, 1)[len(node.args) - 1 :]]
    x, dim, start, step = given[0], given[1], given[2], given[4]
    assert isinstance(x, fx.Node)
    dims, before, after = analysis.dims(x), analysis.shape(x), analysis.shape(node)
    at = integer(dim) % len(dims)
    if before[at] == after[at]:
        analysis.keep(node, dims)
        return
    run, size = None, before[at]
    if step == 1 and isinstance(size, int) and isinstance(start, int | None):
        first = min(size, (start or 0) % size if (start or 0) < 0 else (start or 0))
        last = first + after[at] if isinstance(after[at], int) else None
        run = None if last is None else run_of(analysis, x, at, first, last)
    elif isinstance(size, int) and isinstance(step, int) and size == after[at] * step:
        run = _digit(analysis, node, x, at, step, inner=True)
    if run is None:
        fix_dim(analysis, node, x, [at])
        run = (*dims[:at], *fresh([after[at]]), *dims[at + 1 :])
        analysis.pin(run[at], name_of(node))
    analysis.keep(node, run)


def run_of(analysis: Analysis, x: fx.Node, dim: int, start: int, stop: int) -> Dims | None:
    """Return the dimensions of ``x[start:stop]`` along a dimension that is one field."""
    dims = analysis.dims(x)
    factors = dims[dim]
    if len(factors) != 1 or not factors[0].is_whole:
        return None
    axis = factors[0].field.axis
    if not cut_at(axis, [start, stop]):
        return None
    parts, at = [], 0
    for space in leaves(axis):
        assert isinstance(space.size, int)
        if start <= at and at + space.size <= stop:
            parts.append(space)
        at += space.size
    run = () if stop - start == 1 else (Field(tuple(parts), (stop - start,)).whole,)
    return (*dims[:dim], run, *dims[dim + 1 :])


def _digit(
    analysis: Analysis, node: fx.Node, x: fx.Node, dim: int, count: int, *, inner: bool = False
) -> Dims | None:
    """Return ``x`` with a digit of a dimension taken, the first one or the last: it stays still."""
    dims, shape = analysis.dims(x), analysis.shape(x)
    size = shape[dim]
    if not isinstance(size, int):
        return None
    sizes = (size // count, count) if inner else (count, size // count)
    divided = regroup(dims, (*shape[:dim], *sizes, *shape[dim + 1 :]))
    if divided is None:
        return None
    taken = dim + inner
    for factor in divided[taken]:
        analysis.part(factor.field, [factor.at], ((factor,), None, dim), node, name_of(node))
    return divided[:taken] + divided[taken + 1 :]


def _picked(dims: Dims, dim: int, index: int) -> Dims | None:
    """Return what is left where ``index`` of the leading factor of a field is taken."""
    if not dims[dim]:
        return dims[:dim] + dims[dim + 1 :]
    (factor, *more), field = dims[dim], dims[dim][0].field
    if more or factor.at != 0 or factor.is_whole:
        return None
    count, sizes = field.sizes[0], field.sizes[1:]
    if not isinstance(count, int) or not all(isinstance(n, int) for n in sizes):
        return None
    length = 1
    for size in sizes:
        assert isinstance(size, int)
        length *= size
    if not cut_at(field.axis, [length * i for i in range(1, count)]):
        return None
    parts, at = [], 0
    for space in leaves(field.axis):
        assert isinstance(space.size, int)
        if index * length <= at < (index + 1) * length:
            parts.append(space)
        at += space.size
    new = Field(tuple(parts), sizes)
    rest = dims[:dim] + dims[dim + 1 :]
    return tuple(
        tuple(Factor(new, f.at - 1) if f.field is field else f for f in factors) for factors in rest
    )


def fix_dim(analysis: Analysis, node: fx.Node, x: fx.Node, dims: Sequence[int]) -> None:
    """Fix the order of dimensions that ``node`` reads by their places."""
    for dim in dims:
        gather = analysis.before(x, dim, node)
        for factor in analysis.dims(x)[dim]:
            if factor.is_whole:
                analysis.pin([factor], name_of(node), gather)
            else:
                analysis.part(factor.field, [factor.at], ((factor,), x, dim), node, name_of(node))


def name_of(node: fx.Node) -> str:
    """Return what is said where a part of an axis is taken."""
    return f"{getattr(node.target, '__name__', node.target)} takes a part of the axis"


def operand_of(node: fx.Node) -> fx.Node:
    """Return the tensor that an operator reads first."""
    assert isinstance(node.args[0], fx.Node)
    return node.args[0]


def integer(value: Any) -> int:
    """Return a number that is known when the graph is read."""
    assert isinstance(value, int)
    return value


RULES: dict[object, Rule] = {
    ATEN.select.int: on_live(select),
    ATEN.unbind.int: on_live(unbind),
    ATEN.split.Tensor: on_live(split),
    ATEN.split_with_sizes.default: on_live(split),
    ATEN.slice.Tensor: on_live(slice_),
    operator.getitem: on_live(getitem),
}
