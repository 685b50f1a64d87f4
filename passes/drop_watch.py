"""Drop the recorder's identity from a captured graph: only its backward does something.

    before   y = padst.block_linear(x, values, indices, bias, o)
             z = padst.watch(y, x, ...)
    after    z = y

Left alone: nothing; the operation has no effect of its own in forward.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from padst_compiler.rewrite import Facts, Report, Rule

__all__ = ["DropWatch"]


@dataclass(frozen=True)
class DropWatch:
    """Remove ``padst::watch``; in a training graph its backward is already recorded beside it."""

    name: str = "drop_watch"

    def __call__(self, graph: fx.Graph, facts: Facts) -> Report:
        """Forward the watched tensor to its readers."""
        fired = []
        for node in list(graph.nodes):
            if node.op == "call_function" and str(node.target) == "padst.watch.default":
                y = node.args[0]
                assert isinstance(y, fx.Node)
                node.replace_all_uses_with(y)
                graph.erase_node(node)
                fired.append(Rule(facts.owner(node), "an identity vanishes"))
        return Report(self.name, tuple(fired))
