"""Turn the maps that remain into ATen movements, which Inductor fuses with their neighbours.

    before   y = padst.permute(x, p)
    after    y = index_select(x, -1, p)
    or       y = views, rolls and flips of x, where a formula says p: no table is loaded

Every map that is lowered here is reported as left: it costs a movement.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from padst_compiler.index_map import invert
from padst_compiler.insertion import inline
from padst_compiler.rewrite import Facts, Refusal, Report
from padst_compiler.symbolic import recognise

__all__ = ["LowerMaps"]


@dataclass(frozen=True)
class LowerMaps:
    """Lower ``padst::permute`` and ``padst::invert``."""

    name: str = "lower_maps"

    def __call__(self, graph: fx.Graph, facts: Facts) -> Report:
        """Lower every map of the graph."""
        left = []
        lowered: dict[Any, Callable[..., Tensor]] = {
            torch.ops.padst.permute.default: _gather,
            torch.ops.padst.invert.default: invert,
        }
        for node in list(graph.nodes):
            if node.op != "call_function" or node.target not in lowered:
                continue
            operands = [a for a in node.args if isinstance(a, fx.Node)]
            lower = lowered[node.target]
            if len(operands) == 2:
                known = facts.map_of(operands[1])
                symbolic = None if known is None else recognise(known)
                what = "a gather remains"
                if symbolic is not None:
                    facts.rely_on(operands.pop())
                    lower, what = symbolic.laid_out, f"a movement by {symbolic.formula} remains"
                if not facts.is_frozen(node):  # else it moves once, before the first call
                    left.append(Refusal(facts.owner(node), f"{what}, fused with its neighbours"))
            new = inline(graph, node, lower, operands, facts.table)
            node.replace_all_uses_with(new)
            graph.erase_node(node)
        return Report(self.name, (), tuple(left))


def _gather(x: Tensor, perm: Tensor) -> Tensor:
    return x.index_select(-1, perm)
