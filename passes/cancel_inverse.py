"""Compose maps that follow each other; inverse pairs cancel.

    before   a = padst.permute(x, p)
             b = padst.permute(a, q)
    after    b = padst.permute(x, p[q])       # one movement instead of two
             b = x                            # where q undoes p

Left alone: the first result has another reader (both movements are needed then).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from padst_compiler.insertion import as_contiguous, inline
from padst_compiler.rewrite import Facts, Refusal, Report, Rule

__all__ = ["CancelInverse"]

PERMUTE = torch.ops.padst.permute.default
INVERT = torch.ops.padst.invert.default


@dataclass(frozen=True)
class CancelInverse:
    """Cancel and compose neighbouring permutations."""

    name: str = "cancel_inverse"

    def __call__(self, graph: fx.Graph, facts: Facts) -> Report:
        """Walk in topological order, so that chains of any length collapse into one map."""
        fired, left = [], []
        for outer in list(graph.find_nodes(op="call_function", target=PERMUTE)):
            inner = outer.args[0]
            if not isinstance(inner, fx.Node) or inner.target is not PERMUTE:
                continue
            x, first = inner.args
            second = outer.args[1]
            assert isinstance(x, fx.Node)
            assert isinstance(first, fx.Node) and isinstance(second, fx.Node)
            if _undoes(first, second) or _is_identity_pair(first, second, facts):
                fired.append(Rule(facts.owner(outer), "an inverse pair cancels"))
                outer.replace_all_uses_with(as_contiguous(graph, outer, x))
                graph.erase_node(outer)
            elif len(inner.users) > 1:
                left.append(Refusal(facts.owner(outer), "the inner result has a second reader"))
            else:
                both = inline(graph, outer, lambda p, q: p.index_select(0, q), (first, second))
                outer.args = (x, both)
                fired.append(Rule(facts.owner(outer), "two maps become one"))
        return Report(self.name, tuple(fired), tuple(left))


def _undoes(first: fx.Node, second: fx.Node) -> bool:
    """Whether one map is ``invert`` of the other, by name: true for any numbers."""
    return (second.target is INVERT and second.args[0] is first) or (
        first.target is INVERT and first.args[0] is second
    )


def _is_identity_pair(first: fx.Node, second: fx.Node, facts: Facts) -> bool:
    if not (facts.is_frozen(first) and facts.is_frozen(second)):
        return False
    one, two = facts.map_of(first), facts.map_of(second)
    if one is None or two is None or not one.then(two).is_identity:
        return False
    facts.rely_on(first)
    facts.rely_on(second)
    return True
