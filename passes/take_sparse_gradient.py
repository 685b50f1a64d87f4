"""Compute the gradient of stored numbers from its factors: no dense gradient is formed.

    before   dW = mm(dy.t(), x)
             padst.observe(..., armed, dW.t(), None, ...)
             dv = padst.pack(dW, indices, "block", unit)
    after    padst.observe(..., armed, dy, x, ...)
             dv = padst.block_linear_dw(dy, x, indices, unit)

Left alone: gradients that are no sums of such products. A recorder takes one product only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from padst_compiler.dense_operand import Operand, find_operand, follow
from padst_compiler.insertion import inline
from padst_compiler.ops import LINEAR_DW
from padst_compiler.rewrite import ATEN, Facts, Report, Rule, as_node
from padst_compiler.unpacking import PACK

__all__ = ["TakeSparseGradient"]

_OBSERVE = "padst.observe.default"


@dataclass(frozen=True)
class TakeSparseGradient:
    """Rewrite ``pack`` and ``observe`` of dense gradients; a graph of inference has none."""

    name: str = "take_sparse_gradient"

    def __call__(self, graph: fx.Graph, facts: Facts) -> Report:
        """Rewrite the whole graph."""
        fired = []
        for node in [n for n in graph.nodes if n.op == "call_function"]:
            indices = _gradient(graph, node, facts)
            if indices is not None:
                fired.append(Rule(facts.owner(indices), f"{node.name} is taken from its factors"))
        return Report(self.name, tuple(fired))


def _gradient(graph: fx.Graph, node: fx.Node, facts: Facts) -> fx.Node | None:
    """Take the stored part of a gradient from its factors, and return the indices in it.

    A recorder gets them too.
    """
    if node.target is PACK and (terms := _terms(as_node(node.args[0]), False)):
        at, (kind, unit) = as_node(node.args[1]), node.args[2:]
        nodes = [at, *(factor for term in terms for factor in term.nodes)]
        run = _summed(terms, LINEAR_DW[str(kind)], unit)
        node.replace_all_uses_with(inline(graph, node, run, nodes, facts.table))
        graph.erase_node(node)
        return at
    if node.args and str(node.args[0]) == _OBSERVE and node.kwargs.get("x") is None:
        terms = _terms(as_node(node.kwargs["grad"]), True)
        if terms is not None and len(terms) == 1:
            term = terms[0]
            grad, x = inline(graph, node, lambda *t: term.factors(t), term.nodes, facts.table)
            node.kwargs = {**node.kwargs, "grad": grad, "x": x}
    return None


def _summed(terms: Sequence[_Term], operator: Any, unit: Any) -> Callable[..., Tensor]:
    """Return the sum of the terms' stored gradients, of the indices and all their nodes."""

    def run(indices: Tensor, *tensors: Tensor) -> Tensor:
        feed = list(tensors)
        pairs = [term.factors([feed.pop(0) for _ in term.nodes]) for term in terms]
        total, *more = [operator(grad, x, indices, unit) for grad, x in pairs]
        for other in more:
            total = total + other
        result: Tensor = total
        return result

    return run


@dataclass(frozen=True)
class _Term:
    """A product in a sum: the gradient ``(o, i)``, or its transpose, is ``A B`` behind maps."""

    operand: Operand
    swapped: bool

    @property
    def nodes(self) -> list[fx.Node]:
        maps = (*self.operand.rows, *self.operand.columns)
        return [*self.operand.base.all_input_nodes, *(one.perm for one in maps)]

    def factors(self, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return dy ``(t, o)`` and x ``(t, i)``."""
        (a, b, *perms), rows = tensors, self.operand.rows
        a, b = (one if one.dim() == 2 else one[0] for one in (a, b))
        left = follow(a.t(), rows, perms[: len(rows)]).contiguous()
        right = follow(b, self.operand.columns, perms[len(rows) :]).contiguous()
        return (right, left) if self.swapped else (left, right)


def _terms(node: fx.Node, flipped: bool) -> list[_Term] | None:
    """Return the products whose sum a gradient is, or its transpose; None where it is no such."""
    if node.op == "call_function" and node.target is ATEN.add.Tensor and not node.kwargs:
        parts = [_terms(as_node(one), flipped) for one in node.args if isinstance(one, fx.Node)]
        if len(parts) != 2 or None in parts:
            return None
        return [term for part in parts for term in part or ()]
    operand = find_operand(node)
    if operand is None or not operand.whole or operand.cast is not None:
        return None
    base = operand.base
    if base.op != "call_function" or base.target not in (ATEN.mm.default, ATEN.bmm.default):
        return None
    return [_Term(operand, operand.flipped != flipped)] if len(base.all_input_nodes) == 2 else None
