"""Give the kernels of a GPU the inverse of the map that they store through.

    before   y = padst.block_linear_mapped(x, values, indices, width, in_map, out_map)
    after    into = invert(out_map)
             y = padst.block_linear_mapped_into(x, values, indices, width, in_map, into)

A tile of outputs is computed at once, so a GPU's kernel must know where each of them goes. A frozen
map is inverted once, before the first call. Left alone: what runs on a CPU, whose kernels turn the
map themselves, and kernels that only a CPU has.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from padst_compiler.index_map import invert
from padst_compiler.insertion import inline
from padst_compiler.kernel_ops import IN_MAP, INTO
from padst_compiler.rewrite import Facts, Report, Rule

__all__ = ["InvertMaps"]


@dataclass(frozen=True)
class InvertMaps:
    """Replace maps of outputs by their inverses."""

    device: str = "cuda"
    name: str = "invert_maps"

    def __call__(self, graph: fx.Graph, facts: Facts) -> Report:
        """Replace every one that a kernel of the device stores through."""
        fired = []
        for node in list(graph.nodes):
            if node.target not in INTO or node.meta["val"].device.type != self.device:
                continue
            at = IN_MAP[node.target] + 1
            arguments = list(node.args)
            if arguments[at] is None:
                continue
            arguments[at] = inline(graph, node, invert, [arguments[at]], facts.table)
            node.target, node.args = INTO[node.target], tuple(arguments)
            fired.append(Rule(facts.owner(node), "a kernel stores through the inverse"))
        return Report(self.name, tuple(fired))
