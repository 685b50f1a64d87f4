"""Drop permutations that move nothing.

    before   y = padst.permute(x, p)          # p = 0, 1, ..., n-1
    after    y = x

Left alone: the numbers of p are not known at compile time (training).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from padst_compiler.insertion import as_contiguous
from padst_compiler.rewrite import Facts, Refusal, Report, Rule

__all__ = ["DropIdentity"]

PERMUTE = torch.ops.padst.permute.default


@dataclass(frozen=True)
class DropIdentity:
    """Remove identity maps."""

    name: str = "drop_identity"

    def __call__(self, graph: fx.Graph, facts: Facts) -> Report:
        """Look at the numbers of every map that is frozen."""
        fired, left = [], []
        for node in list(graph.find_nodes(op="call_function", target=PERMUTE)):
            x, perm = node.args
            assert isinstance(x, fx.Node) and isinstance(perm, fx.Node)
            known = facts.map_of(perm)
            if known is None:
                left.append(Refusal(facts.owner(node), "the map is not known at compile time"))
            elif known.is_identity:
                fired.append(Rule(facts.owner(node), "an identity map vanishes"))
                facts.rely_on(perm)
                node.replace_all_uses_with(as_contiguous(graph, node, x))
                graph.erase_node(node)
        return Report(self.name, tuple(fired), tuple(left))
