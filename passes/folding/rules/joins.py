"""Operators that put axes one after the other, or tensors beside one another."""

from __future__ import annotations

from torch import fx

from padst_compiler.passes.folding.analysis import Analysis, Rule, on_live, unknown
from padst_compiler.passes.folding.factors import Field, fresh
from padst_compiler.passes.folding.rules.parts import fix_dim, integer, name_of, operand_of
from padst_compiler.passes.folding.rules.pointwise import WHY, follow, merged
from padst_compiler.passes.folding.spaces import Space
from padst_compiler.rewrite import ATEN

__all__ = ["RULES"]


def positions(analysis: Analysis, node: fx.Node) -> None:
    """Listed positions of a dimension are taken; the others pass."""
    x, dim = operand_of(node), integer(node.args[1])
    dims = analysis.dims(x)
    at = dim % len(dims)
    fix_dim(analysis, node, x, [at])
    taken = fresh([analysis.shape(node)[at]])
    analysis.pin(taken[0], name_of(node))
    analysis.keep(node, (*dims[:at], *taken, *dims[at + 1 :]))


def cat(analysis: Analysis, node: fx.Node) -> None:
    """Axes follow one another; the other dimensions keep one order."""
    operands, dim = node.args[0], integer(node.args[1] if len(node.args) > 1 else 0)
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
        analysis.pin(factors, name_of(node))
        own = Space(size)
        axis.append(own)
        analysis.pin((Field((own,), (size,)).whole,), name_of(node))
    dims[at] = (Field(tuple(axis), (shape[at],)).whole,) if shape[at] != 1 else ()
    for operand in dict.fromkeys(nodes):
        if not analysis.is_live(operand):
            rest = (*dims[:at], (), *dims[at + 1 :])
            follow(analysis, node, operand, rest)
    analysis.keep(node, tuple(dims))


def stack(analysis: Analysis, node: fx.Node) -> None:
    """Tensors of one order stand beside each other along a new dimension."""
    operands, dim = node.args[0], integer(node.args[1] if len(node.args) > 1 else 0)
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
    analysis.pin(new[0], name_of(node))
    analysis.keep(node, (*first[:at], *new, *first[at:]))


RULES: dict[object, Rule] = {
    ATEN.index_select.default: on_live(positions),
    ATEN.cat.default: cat,
    ATEN.stack.default: stack,
}
