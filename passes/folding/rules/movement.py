"""Operators that move dimensions or regroup them, and let every order through."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from padst_compiler.passes.folding.analysis import Analysis, Rule, on_live, unknown
from padst_compiler.passes.folding.factors import Factor, fresh, regroup
from padst_compiler.passes.folding.rules.parts import integer, operand_of
from padst_compiler.passes.folding.rules.pointwise import follow
from padst_compiler.rewrite import ATEN

__all__ = ["RULES"]


def same(analysis: Analysis, node: fx.Node) -> None:
    """The result has the dimensions of the operand."""
    analysis.keep(node, analysis.dims(operand_of(node)))


def view(analysis: Analysis, node: fx.Node) -> None:
    """Dimensions split and merge; what they do not split evenly keeps its order."""

    def fix(factors: Sequence[Factor]) -> None:
        analysis.pin(factors, "a view cuts across an axis")

    dims = regroup(analysis.dims(operand_of(node)), analysis.shape(node), fix)
    if dims is None:
        unknown(analysis, node)
    else:
        analysis.keep(node, dims)


def transpose(analysis: Analysis, node: fx.Node) -> None:
    """Dimensions change places."""
    dims = list(analysis.dims(operand_of(node)))
    if node.target is ATEN.permute.default:
        order = _list(node.args[1])
    else:
        order = list(range(len(dims)))
        a, b = 0, len(dims) - 1
        if node.target is not ATEN.t.default:
            a, b = _list(node.args[1:3])
        order[a], order[b] = order[b], order[a]
    analysis.keep(node, tuple(dims[at] for at in order))


def squeeze(analysis: Analysis, node: fx.Node) -> None:
    """Dimensions of one element come or go: the others keep their sequence."""
    found = iter(d for d in analysis.dims(operand_of(node)) if d)
    shape = analysis.shape(node)
    analysis.keep(node, tuple(() if n == 1 else next(found) for n in shape))


def expand(analysis: Analysis, node: fx.Node) -> None:
    """What is repeated is the same in every order, so that the new dimension is free."""
    x, shape = operand_of(node), analysis.shape(node)
    if not analysis.is_live(x):  # a constant in a batch of unknown size
        dims = fresh(shape)
        follow(analysis, node, x, dims)
        analysis.keep(node, dims)
        return
    own = analysis.dims(x)
    padded = ((),) * (len(shape) - len(own)) + own
    new = fresh(shape)
    analysis.keep(node, tuple(a or b for a, b in zip(padded, new, strict=True)))


def _list(value: Any) -> list[int]:
    return [integer(v) for v in value]


_RULES: dict[object, Rule] = (
    dict.fromkeys(
        (
            ATEN.clone.default,
            ATEN.contiguous.default,
            ATEN.alias.default,
            ATEN.detach.default,
            ATEN.lift_fresh_copy.default,
        ),
        same,
    )
    | dict.fromkeys((ATEN.view.default, ATEN._unsafe_view.default, ATEN.reshape.default), view)
    | dict.fromkeys((ATEN.permute.default, ATEN.transpose.int, ATEN.t.default), transpose)
    | dict.fromkeys(
        (
            *(ATEN.unsqueeze.default, ATEN.squeeze.default),
            *(ATEN.squeeze.dim, ATEN.squeeze.dims),
        ),
        squeeze,
    )
)


def nothing(analysis: Analysis, node: fx.Node) -> None:
    """Sizes are the same in every order."""
    analysis.table[node] = []


RULES = {target: on_live(rule) for target, rule in _RULES.items()} | {
    ATEN.expand.default: expand,
    ATEN.sym_size.int: nothing,
    ATEN.sym_numel.default: nothing,
}
