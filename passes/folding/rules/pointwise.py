"""Operators that work element by element: all operands keep one order along every dimension."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from padst_compiler.index_map import IndexMap
from padst_compiler.passes.folding.analysis import Analysis, Rule, Side, unknown
from padst_compiler.passes.folding.factors import Dims, Factor, Field, fresh
from padst_compiler.passes.folding.problem import Edit, Endpoint, apart, project
from padst_compiler.passes.folding.rewriting import Rewriter
from padst_compiler.rewrite import ATEN, shape_of

__all__ = ["RULES", "follow", "merged", "pointwise", "reordered"]

WHY = "another operand comes in another order"


def pointwise(analysis: Analysis, node: fx.Node) -> None:
    """All operands share the order of every dimension; constants follow it."""
    operands = list(dict.fromkeys(node.all_input_nodes))
    if shape_of(node) is None:  # several results
        unknown(analysis, node)
        return
    if any(shape_of(operand) is None for operand in operands):
        value = [o for o in operands if shape_of(o) is None and not _is_number(o)]
        if value:
            unknown(analysis, node)
            return
        operands = [o for o in operands if shape_of(o) is not None]
    dims = merged(analysis, node, [o for o in operands if analysis.is_live(o)])
    spread = fresh(analysis.shape(node))  # where constants alone have more than one number
    dims = tuple(known or new for known, new in zip(dims, spread, strict=True))
    for operand in operands:
        if not analysis.is_live(operand):
            follow(analysis, node, operand, dims)
    analysis.keep(node, dims)


def merged(
    analysis: Analysis, node: fx.Node, operands: Sequence[fx.Node], skip: int | None = None
) -> Dims:
    """Align live operands by their last dimensions; return what the result runs over.

    Args:
        analysis: the walk.
        node: reads the operands.
        operands: live ones.
        skip: a dimension of the result that is left out.
    """
    rank = len(analysis.shape(node))
    sides: list[list[tuple[tuple[Factor, ...], fx.Node, int]]] = [[] for _ in range(rank)]
    for operand in operands:
        own = analysis.dims(operand)
        for at, factors in enumerate(own):
            place = rank - len(own) + at
            if factors and place != skip:
                sides[place].append((factors, operand, at))
    # The operand that says most leads, so that heads and their features stay together.
    count = {o: sum(bool(f) for f in analysis.dims(o)) for o in operands}
    leads = [max(side, key=lambda s: count[s[1]], default=None) for side in sides]
    for operand in operands:
        pairs: list[tuple[Side, Side]] = [
            ((lead[0], None, lead[2]), side)
            for lead, mine in zip(leads, sides, strict=True)
            for side in mine
            if lead is not None and side[1] is operand and side is not lead
        ]
        analysis.align(pairs, node, WHY)
    return tuple(() if lead is None else lead[0] for lead in leads)


def follow(
    analysis: Analysis,
    node: fx.Node,
    constant: fx.Node,
    dims: Dims,
    why: str = "a constant is added in its own order",
) -> None:
    """Let a constant operand, aligned by its last dimensions, follow the order of ``dims``."""
    shape = analysis.shape(constant)
    shift = len(dims) - len(shape)
    places: dict[Field, list[tuple[int, int]]] = {}  # (dimension of the constant, factor)
    for at, size in enumerate(shape):
        if size != 1:  # a dimension without factors is none of ours
            for factor in dims[shift + at]:
                places.setdefault(factor.field, []).append((at, factor.at))
    for field, found in places.items():
        where, factors = [at for at, _ in found], [factor for _, factor in found]
        alone = all(len(dims[shift + at]) == 1 for at in where)
        whole = factors == list(range(len(field.sizes)))
        side_by_side = where == list(range(where[0], where[0] + len(where)))
        if alone and whole and side_by_side:
            analysis.free(field.axis, why, reordered(node, constant, where[0], len(where)))
        elif alone and all(isinstance(n, int) for n in field.sizes):
            sizes: Any = field.sizes
            allows, edit = (
                apart(sizes, factors, "any"),
                _digits(node, constant, where, sizes, factors),
            )
            analysis.problem.endpoints.append(Endpoint(field.axis, why, allows, edit))
        else:
            analysis.restrict(field, factors, "still", why)


def reordered(reader: fx.Node, operand: fx.Node, dim: int, count: int = 1) -> Edit:
    """Return the edit that reorders ``count`` dimensions of a constant operand, read as one."""

    def edit(rewriter: Rewriter, order: IndexMap) -> None:
        def reorder(tensor: torch.Tensor, perm: torch.Tensor) -> torch.Tensor:
            flat = tensor.flatten(dim, dim + count - 1)
            return flat.index_select(dim, perm).view(tensor.shape)

        rewriter.replace(reader, operand, reorder, order)

    return edit


def _digits(
    reader: fx.Node,
    operand: fx.Node,
    where: Sequence[int],
    sizes: Sequence[int],
    held: Sequence[int],
) -> Edit:
    """Return the edit that moves dimensions of a constant as an order moves the digits ``held``."""

    def edit(rewriter: Rewriter, order: IndexMap) -> None:
        def reorder(tensor: torch.Tensor, perm: torch.Tensor) -> torch.Tensor:
            first = tensor.movedim(tuple(where), tuple(range(len(where))))
            moved = first.flatten(0, len(where) - 1).index_select(0, perm).view(first.shape)
            return moved.movedim(tuple(range(len(where))), tuple(where))

        moved = project(order, sizes, held)
        assert moved is not None  # it was allowed
        rewriter.replace(reader, operand, reorder, IndexMap(moved))

    return edit


def _is_number(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), int | float | bool | torch.SymInt | torch.SymFloat)


RULES: dict[object, Rule] = dict.fromkeys(
    (
        *(ATEN._to_copy.default, ATEN.copy.default, ATEN.fill.Scalar, ATEN.fill.Tensor),
        ATEN._prelu_kernel.default,
    ),
    pointwise,
)
