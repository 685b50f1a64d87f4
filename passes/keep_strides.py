"""Keep the strides of what an operator with graphs inside reads.

    before   z = cond(p, true_graph, false_graph, (y,))
    after    z = cond(p, true_graph, false_graph, (force_stride_order(y, strides),))

Inductor compiles the graphs inside for the strides that ``y`` was traced with and may give ``y``
others: its own assertion then fails, without us too (torch 2.13). Left alone: all else.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from padst_compiler.compat import force_strides
from padst_compiler.rewrite import Facts, Report

__all__ = ["KeepStrides"]


@dataclass(frozen=True)
class KeepStrides:
    """Fix the strides of the operands of ``torch.cond`` and its like."""

    name: str = "keep_strides"

    def __call__(self, graph: fx.Graph, facts: Facts) -> Report:
        """Put a copy in front of them, which costs nothing where the strides are right."""
        del facts
        for node in list(graph.nodes):
            if not isinstance(node.target, torch._ops.HigherOrderOperator):
                continue
            for operand in node.all_input_nodes:
                value = operand.meta.get("val")
                if operand.op == "call_function" and isinstance(value, torch.Tensor):
                    with graph.inserting_before(node):
                        kept = graph.call_function(force_strides(), (operand, [*value.stride()]))
                    kept.meta.update(operand.meta)
                    node.replace_input_with(operand, kept)
        return Report(self.name, ())
