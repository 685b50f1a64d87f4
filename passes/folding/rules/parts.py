"""Operators that take parts of an axis, or put axes one after the other."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

from torch import fx

from padst_compiler.passes.folding.analysis import Analysis, Rule, on_live, unknown
from padst_compiler.passes.folding.factors import Dims, Factor, Field, fresh, renewed
from padst_compiler.passes.folding.rules.pointwise import WHY, follow, merged
from padst_compiler.passes.folding.spaces import Space, cut_at, leaves
from padst_compiler.rewrite import ATEN

__all__ = ["RULES"]


def select(analysis: Analysis, node: fx.Node) -> None:
    """One position of a dimension is taken: a part of an axis, where it is its leading factor."""
    x, dim, index = _operand(node), _integer(node.args[1]), node.args[2]
    dims = analysis.dims(x)
    dim %= len(dims)
    if isinstance(index, int):
        size = analysis.shape(x)[dim]
        taken = _picked(dims, dim, index % size if isinstance(size, int) else 0)
        if taken is not None:
            analysis.keep(node, taken)
            return
    _fix_dim(analysis, node, x, [dim])
    analysis.keep(node, dims[:dim] + dims[dim + 1 :])


def unbind(analysis: Analysis, node: fx.Node) -> None:
    """Every position of a dimension is taken."""
    x = _operand(node)
    dims = analysis.dims(x)
    dim = _integer(node.args[1] if len(node.args) > 1 else 0) % len(dims)
    taken = [_picked(dims, dim, index) for index in range(len(node.meta["val"]))]
    if any(one is None for one in taken):
        _fix_dim(analysis, node, x, [dim])
        taken = [dims[:dim] + dims[dim + 1 :]] * len(taken)
    analysis.table[node] = [None if one is None else analysis.checked(one) for one in taken]


def split(analysis: Analysis, node: fx.Node) -> None:
    """A dimension falls into runs, each with an order of its own."""
    x = _operand(node)
    dims = analysis.dims(x)
    dim = _integer(node.args[2] if len(node.args) > 2 else 0) % len(dims)
    stops, parts = 0, []
    for value in node.meta["val"]:
        length = value.shape[dim]
        parts.append((stops, stops + length))
        stops += length
    runs = [_run(analysis, x, dim, start, stop) for start, stop in parts]
    if any(run is None for run in runs):
        _fix_dim(analysis, node, x, [dim])
        runs = [(*dims[:dim], *fresh([stop - start]), *dims[dim + 1 :]) for start, stop in parts]
        for run in runs:
            assert run is not None
            analysis.pin(run[dim], _name(node))
    analysis.table[node] = [None if run is None else analysis.checked(run) for run in runs]


def getitem(analysis: Analysis, node: fx.Node) -> None:
    """One of several results."""
    known = analysis.table[_operand(node)]
    at = node.args[1]
    dims = (
        known[at] if isinstance(known, list) and isinstance(at, int) and at < len(known) else None
    )
    if dims is None:
        name = getattr(_operand(node).target, "__name__", _operand(node).target)
        analysis.fix_result(node, f"{name} is not proved to move with a permutation")
    else:
        analysis.keep(node, renewed(dims))


def slice_(analysis: Analysis, node: fx.Node) -> None:
    """A run of a dimension is taken."""
    given: list[Any] = [*node.args, *(0, None, None, 1)[len(node.args) - 1 :]]
    x, dim, start, step = given[0], given[1], given[2], given[4]
    assert isinstance(x, fx.Node)
    dims, before, after = analysis.dims(x), analysis.shape(x), analysis.shape(node)
    at = _integer(dim) % len(dims)
    if before[at] == after[at]:
        analysis.keep(node, dims)
        return
    run, size = None, before[at]
    if step == 1 and isinstance(size, int) and isinstance(start, int | None):
        first = min(size, (start or 0) % size if (start or 0) < 0 else (start or 0))
        last = first + after[at] if isinstance(after[at], int) else None
        run = None if last is None else _run(analysis, x, at, first, last)
    if run is None:
        _fix_dim(analysis, node, x, [at])
        run = (*dims[:at], *fresh([after[at]]), *dims[at + 1 :])
        analysis.pin(run[at], _name(node))
    analysis.keep(node, run)


def positions(analysis: Analysis, node: fx.Node) -> None:
    """Listed positions of a dimension are taken; the others pass."""
    x, dim = _operand(node), _integer(node.args[1])
    dims = analysis.dims(x)
    at = dim % len(dims)
    _fix_dim(analysis, node, x, [at])
    taken = fresh([analysis.shape(node)[at]])
    analysis.pin(taken[0], _name(node))
    analysis.keep(node, (*dims[:at], *taken, *dims[at + 1 :]))


def cat(analysis: Analysis, node: fx.Node) -> None:
    """Axes follow one another; the other dimensions keep one order."""
    operands, dim = node.args[0], _integer(node.args[1] if len(node.args) > 1 else 0)
    assert isinstance(operands, list | tuple)
    shape = analysis.shape(node)
    at = dim % len(shape)
    nodes = [o for o in operands if isinstance(o, fx.Node)]
    nodes = [o for o in nodes if analysis.shape(o) != (0,)]  # an empty cache takes no part
    if any(len(analysis.shape(o)) != len(shape) for o in nodes):
        unknown(analysis, node)
        return
    live = [o for o in dict.fromkeys(nodes) if analysis.is_live(o)]
    dims = list(merged(analysis, node, live, skip=at))
    dims = [known or new for known, new in zip(dims, fresh(shape), strict=True)]
    axis: list[Space] = []
    for operand in nodes:
        size = analysis.shape(operand)[at]
        factors = analysis.dims(operand)[at] if analysis.is_live(operand) else ()
        if len(factors) == 1 and factors[0].is_whole:
            axis += factors[0].field.axis
            continue
        analysis.pin(factors, _name(node))
        own = Space(size)
        axis.append(own)
        analysis.pin((Field((own,), (size,)).whole,), _name(node))
    dims[at] = (Field(tuple(axis), (shape[at],)).whole,) if shape[at] != 1 else ()
    for operand in dict.fromkeys(nodes):
        if not analysis.is_live(operand):
            rest = (*dims[:at], (), *dims[at + 1 :])
            follow(analysis, node, operand, rest)
    analysis.keep(node, tuple(dims))


def stack(analysis: Analysis, node: fx.Node) -> None:
    """Tensors of one order stand beside each other along a new dimension."""
    operands, dim = node.args[0], _integer(node.args[1] if len(node.args) > 1 else 0)
    assert isinstance(operands, list | tuple)
    nodes = [o for o in operands if isinstance(o, fx.Node)]
    if not all(analysis.is_live(o) for o in nodes):
        unknown(analysis, node)
        return
    first, at = analysis.dims(nodes[0]), dim % len(analysis.shape(node))
    for other in dict.fromkeys(nodes):
        pairs = enumerate(zip(first, analysis.dims(other), strict=True))
        analysis.align([((f, None, i), (g, other, i)) for i, (f, g) in pairs], node, WHY)
    new = fresh([len(nodes)])
    analysis.pin(new[0], _name(node))
    analysis.keep(node, (*first[:at], *new, *first[at:]))


def _run(analysis: Analysis, x: fx.Node, dim: int, start: int, stop: int) -> Dims | None:
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


def _fix_dim(analysis: Analysis, node: fx.Node, x: fx.Node, dims: Sequence[int]) -> None:
    for dim in dims:
        gather = analysis.before(x, dim, node)
        for factor in analysis.dims(x)[dim]:
            if factor.is_whole:
                analysis.pin([factor], _name(node), gather)
            else:
                analysis.part(factor.field, [factor.at], ((factor,), x, dim), node, _name(node))


def _name(node: fx.Node) -> str:
    return f"{getattr(node.target, '__name__', node.target)} takes a part of the axis"


def _operand(node: fx.Node) -> fx.Node:
    assert isinstance(node.args[0], fx.Node)
    return node.args[0]


def _integer(value: Any) -> int:
    assert isinstance(value, int)
    return value


RULES: dict[object, Rule] = {
    ATEN.select.int: on_live(select),
    ATEN.unbind.int: on_live(unbind),
    ATEN.split.Tensor: on_live(split),
    ATEN.split_with_sizes.default: on_live(split),
    ATEN.slice.Tensor: on_live(slice_),
    ATEN.index_select.default: on_live(positions),
    ATEN.cat.default: cat,
    ATEN.stack.default: stack,
    operator.getitem: on_live(getitem),
}
