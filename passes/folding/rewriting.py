"""Make a graph compute in chosen orders: reorder constants, move what must be moved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from padst_compiler.index_map import IndexMap
from padst_compiler.insertion import as_contiguous, constant, inline
from padst_compiler.passes.folding.problem import Edge, Gather

__all__ = ["Rewriter"]


class Rewriter:
    """Edits of one graph.

    An edit names operands as they were when the graph was read; what has replaced them since is
    looked up, so that edits come in any order.
    """

    def __init__(self, graph: fx.Graph) -> None:
        """Start with nothing replaced."""
        self.graph = graph
        self._moved: dict[fx.Node, fx.Node] = {}
        self._read: dict[tuple[fx.Node, fx.Node], fx.Node] = {}
        self._constants: dict[bytes, fx.Node] = {}

    def current(self, reader: fx.Node, operand: fx.Node) -> fx.Node:
        """Return what ``reader`` reads now where it read ``operand``."""
        return self._read.get((reader, operand), self._moved.get(operand, operand))

    def order(self, order: IndexMap) -> fx.Node:
        """Return the node that holds an order's numbers."""
        key = order.perm.numpy().tobytes()
        if key not in self._constants:
            self._constants[key] = constant(self.graph, "order", order.perm)
        return self._constants[key]

    def replace(
        self, reader: fx.Node, operand: fx.Node, function: Callable[..., Tensor], order: IndexMap
    ) -> None:
        """Let ``reader`` read ``function(operand, order)`` instead of ``operand``."""
        present = self.current(reader, operand)
        new = inline(self.graph, reader, function, (present, self.order(order)))
        reader.replace_input_with(present, new)
        self._read[reader, operand] = new

    def restructure(self, node: fx.Node, function: Callable[..., Any], order: IndexMap) -> None:
        """Change the values and indices of a structured linear by ``function``."""
        x, values, indices, *rest = node.args
        assert isinstance(values, fx.Node) and isinstance(indices, fx.Node)
        new = inline(self.graph, node, function, (values, indices, self.order(order)))
        node.args = (x, *new, *rest)

    def gather(self, where: Gather, order: IndexMap) -> fx.Node:
        """Move data: into ``order`` after a node, back from it before a reader; return the map."""
        if where.reader is not None:
            self.replace(where.reader, where.node, _moved(where.dim), order.inverse)
            return self.order(order.inverse)
        start = self._moved.get(where.node, where.node)
        before = start.next
        while before.op == "placeholder":
            before = before.next
        new = inline(self.graph, before, _moved(where.dim), (start, self.order(order)))
        start.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        self._moved[where.node] = new
        return self.order(order)

    def settle(self, edge: Edge, rest: IndexMap) -> fx.Node | None:
        """Give a permutation the map that is left of it, and return it; None if nothing is left."""
        x = edge.node.args[0]
        assert isinstance(x, fx.Node)
        if not rest.is_identity:
            edge.node.args = (x, self.order(rest))
            return self.order(rest)
        same = as_contiguous(self.graph, edge.node, x)
        edge.node.replace_all_uses_with(same)
        self._moved[edge.node] = same
        self.graph.erase_node(edge.node)
        return None


def _moved(dim: int) -> Callable[..., Tensor]:
    def move(x: Tensor, perm: Tensor) -> Tensor:
        if dim == x.dim() - 1:
            moved: Tensor = torch.ops.padst.permute(x, perm)
            return moved
        return x.index_select(dim, perm)

    return move
