"""Turn products with an unpacked sparse weight into sparse operators, in both directions.

    before   W = padst.unpack(values, indices, "block", o, i)
             y = addmm(bias, x, permute(W, invert(p)).t())
    after    y = padst.block_linear(padst.permute(x, p), values, indices, bias, o)

The weight may stand on either side of a product, be transposed, cast, reshaped or one slice of its
rows. Stacked experts in a batched product are taken apart. What no product reads in such a way
stays: ``lower_weights`` unpacks it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from padst_compiler.dense_operand import (
    Map,
    Operand,
    find_operand,
    follow,
    readers,
    structure_of,
    undo,
)
from padst_compiler.insertion import as_contiguous, inline
from padst_compiler.ops import LINEAR, LINEAR_DX
from padst_compiler.rewrite import ATEN, Facts, Refusal, Report, Rule, as_node
from padst_compiler.structures import Shape
from padst_compiler.unpacking import UNPACK

__all__ = ["UseSparseOperator"]

_EXPERTS = 32  # a batched product of more is left dense
# Products: where their operands stand.
_PRODUCTS = {ATEN.mm.default: 0, ATEN.bmm.default: 0, ATEN.addmm.default: 1}


@dataclass(frozen=True)
class UseSparseOperator:
    """Rewrite products with unpacked weights, forward and backward."""

    name: str = "use_sparse_operator"

    def __call__(self, graph: fx.Graph, facts: Facts) -> Report:
        """Rewrite the whole graph."""
        unpacked = [n for n in graph.nodes if n.op == "call_function" and n.target is UNPACK]
        if not unpacked:
            return Report(self.name)
        fired, left = [], []
        for node in [n for n in graph.nodes if n.op == "call_function"]:
            indices = _product(graph, node, facts)
            if indices is not None:
                fired.append(Rule(facts.owner(indices), f"{node.name} is a sparse operator"))
        graph.eliminate_dead_code()
        for node in [n for n in unpacked if n.users]:
            said = ", ".join(sorted({str(user.target) for user in readers(node)}))
            left.append(Refusal(facts.owner(_indices(node)), f"unpacked for {said}"))
        return Report(self.name, tuple(fired), tuple(left))


def _product(graph: fx.Graph, node: fx.Node, facts: Facts) -> fx.Node | None:
    """Write one product with the sparse operator; return the indices in it."""
    if node.target not in _PRODUCTS or node.kwargs:
        return None
    at = _PRODUCTS[node.target]
    bias = node.args[0] if at else None
    first, second = (as_node(node.args[place]) for place in (at, at + 1))
    for weight, x, late in ((second, first, True), (first, second, False)):
        operand = find_operand(weight)
        if operand is None or operand.base.target is not UNPACK:
            continue
        if not late and (bias is not None or operand.batch > 1):
            continue
        spans = _spans(operand)
        if spans is None or len(spans) > _EXPERTS:
            continue
        # What stands behind x is E or E^T; before it, the transpose of that, on x transposed.
        forward = operand.flipped == late
        around = (operand.columns, operand.rows) if forward else (operand.rows, operand.columns)
        before, after = undo(around[0]), around[1]
        stored = as_node(operand.base.args[0]), _indices(operand.base)
        nodes: list[Any] = [x, *stored, bias]
        nodes += [one.perm for one in (*before, *after)]
        run = _multiply(operand, spans, before, after, forward, late)
        y = inline(graph, node, run, nodes, facts.table)
        node.replace_all_uses_with(as_contiguous(graph, node, y))
        graph.erase_node(node)
        return _indices(operand.base)
    return None


def _multiply(
    operand: Operand,
    spans: Sequence[tuple[int, int] | None],
    before: Sequence[Map],
    after: Sequence[Map],
    forward: bool,
    late: bool,
) -> Callable[..., Tensor]:
    """Return the product of ``x``, values, indices, bias, and the permutations of the maps."""
    kind, width = operand.base.args[2], int(operand.base.meta["val"].shape[1])
    assert isinstance(kind, str)

    def run(x: Tensor, values: Tensor, indices: Tensor, bias: Any, *perms: Tensor) -> Tensor:
        x = follow(x if late else x.mT, before, perms[: len(before)])
        if operand.cast is not None:
            values = values.to(operand.cast.meta["val"].dtype)
        inside = bias if forward and not after and bias is not None and bias.dim() == 1 else None
        results = []
        for number, span in enumerate(spans):
            own = x if len(spans) == 1 else x[number]
            v, i = (t if span is None else t[span[0] : span[1]] for t in (values, indices))
            if forward:
                results.append(LINEAR[kind](own, v, i, inside, operand.height))
            else:
                results.append(LINEAR_DX[kind](own, v, i, width))
        y = results[0] if len(spans) == 1 else torch.stack(results)
        y = follow(y, after, perms[len(before) :])
        y = y if bias is None or inside is not None else y + bias
        return y if late else y.mT

    return run


def _spans(operand: Operand) -> list[tuple[int, int] | None] | None:
    """Return which lines of the storage hold each matrix of an operand, None for all of them.

    None in the place of the list where a matrix is no run of lines.
    """
    if operand.whole:
        return [None]
    lines = _rows_per_line(operand.base)
    ends = [operand.start + at * operand.height for at in range(operand.batch + 1)]
    if lines is None or any(end % lines for end in ends):
        return None
    return [(a // lines, b // lines) for a, b in itertools.pairwise(ends)]


def _rows_per_line(base: fx.Node) -> int | None:
    """Return how many rows of the weight one line of its storage holds; None where they mix."""
    indices, rows = _indices(base).meta["val"], base.meta["val"].shape[0]
    structure = structure_of(base)
    groups = structure.table(Shape(*base.meta["val"].shape))[0]
    lines = int(indices.shape[0])
    return rows // lines if lines > 1 and groups % lines == 0 and rows % lines == 0 else None


def _indices(node: fx.Node) -> fx.Node:
    return as_node(node.args[1])
