"""Fold permutations into what stands around them, wherever that is proved to change nothing.

    before   h = addmm(bias, x, w)
             y = padst.permute(layer_norm(gelu(h)), p)
             z = padst.block_linear(y, values, indices, ...)
    after    h = addmm(bias[p], x, w[:, p])          # the rows of the writer follow the map,
             y = layer_norm(gelu(h))                 # and the numbers of the norm
             z = padst.block_linear(y, values, indices, ...)

Every axis of every tensor gets an order; operators tie orders to one another (``folding.rules``),
weights follow the orders that their structure absorbs, and what an operator without a rule touches
stays as it is. The orders are chosen so that the fewest bytes move (``folding.choice``). Equal
maps of one tensor become one movement. Left alone: maps whose numbers may change between calls, and
maps that cost less where they stand; the report says what stood in their way.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from padst_compiler.index_map import IndexMap
from padst_compiler.passes.folding.analysis import Analysis
from padst_compiler.passes.folding.choice import Orders, choose
from padst_compiler.passes.folding.problem import ANY, Edge, Near, Problem
from padst_compiler.passes.folding.rewriting import Rewriter
from padst_compiler.passes.folding.rules import RULES
from padst_compiler.passes.folding.rules.pointwise import pointwise
from padst_compiler.passes.folding.spaces import Axis, leaves
from padst_compiler.rewrite import Facts, Refusal, Report, Rule

__all__ = ["FoldPermutations"]

PERMUTE = torch.ops.padst.permute.default


@dataclass(frozen=True)
class FoldPermutations:
    """Choose the order of every axis, and make the graph compute in it."""

    name: str = "fold_permutations"

    def __call__(self, graph: fx.Graph, facts: Facts) -> Report:
        """Fold what can be folded; say what stood in the way of the rest."""
        permutes = list(graph.find_nodes(op="call_function", target=PERMUTE))
        if not permutes:
            return Report(self.name)
        _drop_strides(graph)
        fired = _share(graph, permutes, facts)
        problem = Analysis(graph, facts, RULES, pointwise).problem
        orders, near = choose(problem), Near(problem)
        left = []
        known = {edge.node for edge in problem.edges}
        for node in graph.find_nodes(op="call_function", target=PERMUTE):
            if node not in known and not facts.is_settled(node):  # else it moves once, not in calls
                why = "the map is not frozen: it may change between calls"
                left.append(Refusal(facts.owner(node), why))
        for edge in problem.edges:
            name, rest = facts.owner(edge.node), _residue(edge, orders)
            if rest.is_identity:
                fired.append(Rule(name, _absorbers(edge, near, orders)))
            elif torch.equal(rest.perm, edge.perm.perm):
                left.append(Refusal(name, _obstacles(edge, near, orders)))
            else:
                fired.append(Rule(name, "a simpler map is left"))
        _apply(graph, facts, problem, orders, near)
        return Report(self.name, tuple(fired), tuple(left))


def _drop_strides(graph: fx.Graph) -> None:
    """Drop what says of a tensor how it lies already: pooling to one pixel does."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.as_strided.default):
        x = node.args[0]
        assert isinstance(x, fx.Node)
        value, new = x.meta["val"], node.meta["val"]
        numbers = (*value.shape, *value.stride(), *new.stride())
        if value.shape != new.shape or not all(type(n) is int for n in numbers):
            continue
        lies = zip(value.shape, value.stride(), new.stride(), strict=True)
        offset = value.storage_offset() == new.storage_offset()
        if offset and all(a == b for size, a, b in lies if size != 1):
            node.replace_all_uses_with(x)
            graph.erase_node(node)


def _share(graph: fx.Graph, permutes: list[fx.Node], facts: Facts) -> list[Rule]:
    """Let equal maps of one tensor be one movement."""
    first: dict[tuple[object, bytes], fx.Node] = {}
    fired = []
    for node in permutes:
        x, perm = node.args
        assert isinstance(perm, fx.Node)
        known = facts.map_of(perm)
        key = (x, perm.name.encode() if known is None else known.perm.numpy().tobytes())
        twin = first.setdefault(key, node)
        if twin is not node:
            if known is not None:
                for other in (node, twin):
                    held = other.args[1]
                    assert isinstance(held, fx.Node)
                    facts.rely_on(held)
            fired.append(Rule(facts.owner(node), f"shares the movement of {facts.owner(twin)}"))
            node.replace_all_uses_with(twin)
            graph.erase_node(node)
    return fired


def _residue(edge: Edge, orders: Orders) -> IndexMap:
    """Return what is left of a map between tensors in their new orders."""
    source, target = orders.of(edge.source), orders.of(edge.target)
    return IndexMap(source.inverse.perm[edge.perm.then(target).perm])


def _apply(graph: fx.Graph, facts: Facts, problem: Problem, orders: Orders, near: Near) -> None:
    for edge in problem.edges:
        if orders.moves(edge.source) or orders.moves(edge.target) or edge.perm.is_identity:
            perm = edge.node.args[1]
            assert isinstance(perm, fx.Node)
            facts.rely_on(perm)
    rewriter = Rewriter(graph)
    for endpoint in problem.endpoints:
        if not orders.moves(endpoint.axis):
            continue
        order = orders.of(endpoint.axis)
        if endpoint.allows is not None and endpoint.allows(order):
            if endpoint.edit is not None:
                endpoint.edit(rewriter, order)
        else:
            assert endpoint.gather is not None, endpoint.why
            _name(rewriter.gather(endpoint.gather, order), endpoint.axis, near, facts)
    for edge in problem.edges:
        if orders.moves(edge.source) or orders.moves(edge.target) or edge.perm.is_identity:
            name = facts.owner(edge.node)
            held = rewriter.settle(edge, _residue(edge, orders))
            if held is not None:
                facts.names.setdefault(held, name)


def _name(order: fx.Node, axis: Axis, near: Near, facts: Facts) -> None:
    """Say for reports whose maps a new movement does the work of."""
    owners = dict.fromkeys(facts.owner(edge.node) for edge in near.edges(leaves(axis)))
    if owners:
        facts.names.setdefault(order, ", ".join(owners))


def _absorbers(edge: Edge, near: Near, orders: Orders) -> str:
    """Say who follows the map."""
    spaces = (*leaves(edge.source), *leaves(edge.target))
    found = [e.absorbs for e in near.endpoints(spaces) if e.absorbs and orders.moves(e.axis)]
    return ", ".join(dict.fromkeys(found)) or "the map moves nothing"


def _obstacles(edge: Edge, near: Near, orders: Orders) -> str:
    """Say what fixes the order on both sides of a map that stays."""
    source = edge.perm.then(orders.of(edge.target))
    target = edge.perm.inverse.then(orders.of(edge.source))
    found = [
        _first_obstacle(axis, order, near)
        for axis, order in ((edge.source, source), (edge.target, target))
    ]
    return "; ".join(dict.fromkeys(why for why in found if why)) or "it costs least here"


def _first_obstacle(axis: Axis, order: IndexMap, near: Near) -> str:
    own = leaves(axis)
    if not _keeps_apart(order, own):
        return "the map mixes parts of an axis that are used apart"
    for endpoint in near.endpoints(own):
        if endpoint.allows is not ANY:
            shared = leaves(endpoint.axis)
            follows = endpoint.allows is not None and shared == own and endpoint.allows(order)
            if not follows and endpoint.why:
                return endpoint.why
    return ""


def _keeps_apart(order: IndexMap, spaces: Axis) -> bool:
    """Whether an order of an axis is made of orders of its spaces."""
    start = 0
    for space in spaces[: len(spaces) - 1]:
        assert isinstance(space.size, int)
        run = order.perm[start : start + space.size]
        if bool(((run < start) | (run >= start + space.size)).any()):
            return False
        start += space.size
    return True
