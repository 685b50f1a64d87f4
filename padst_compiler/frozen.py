"""Work on frozen Parameters is taken out of a graph, to be done once and not on every call.

``split`` moves every node that depends on frozen placeholders only into a *prologue*, whose results
become inputs of the main graph. ``frozen_call.py`` runs the two.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from padst_compiler.rewrite import ATEN, Facts
from padst_compiler.static_inputs import mark

__all__ = ["Split", "outline", "split"]

_VIEWS = frozenset(
    {
        ATEN.t.default,
        ATEN.transpose.int,
        ATEN.permute.default,
        ATEN.view.default,
        ATEN.unsqueeze.default,
        ATEN.squeeze.dim,
        ATEN.expand.default,
        ATEN.detach.default,
        ATEN.alias.default,
        ATEN.slice.Tensor,
        ATEN.select.int,
        ATEN._unsafe_view.default,
    }
)


@dataclass
class Split:
    """A graph in two parts; positions count the placeholders of the original graph."""

    prologue: fx.GraphModule | None
    prologue_inputs: list[int]
    main: fx.GraphModule
    main_inputs: list[int]
    derived: list[Any]  # fake values of the prologue's results, the last inputs of main


def split(graph_module: fx.GraphModule, facts: Facts) -> Split:
    """Move the nodes that depend on frozen placeholders only into a prologue.

    The values of what is frozen are marked: they stay at their address between calls.
    """
    graph = graph_module.graph
    holders = [n for n in graph.nodes if n.op == "placeholder"]
    early = {n for n in graph.nodes if n.op == "call_function" and facts.is_frozen(n)}
    mark(n.meta["val"] for n in (*holders, *early) if facts.is_frozen(n))
    _copy_results(graph, early)
    _return_views(graph, early)
    border = [n for n in graph.nodes if n in early and any(u not in early for u in n.users)]
    if not border:
        return Split(None, [], graph_module, list(range(len(holders))), [])
    prologue, used = _prologue(graph_module, border, holders)
    for node in border:
        with graph.inserting_before(_first_non_placeholder(graph)):
            holder = graph.placeholder(f"frozen_{node.name}")
        holder.meta["val"] = node.meta["val"]
        node.replace_all_uses_with(holder, delete_user_cb=lambda user: user not in early)
    graph.eliminate_dead_code()
    kept = []
    for position, holder in enumerate(holders):
        if holder.users:
            kept.append(position)
        else:
            graph.erase_node(holder)
    graph.lint()
    main = fx.GraphModule(graph_module, graph)
    return Split(prologue, used, main, kept, [n.meta["val"] for n in border])


def _copy_results(graph: fx.Graph, early: set[fx.Node]) -> None:
    """Copy results that would share their numbers with the prologue's: callers write to them."""
    end = graph.output_node()
    for result in end.all_input_nodes:
        source: Any = result
        while source.target in _VIEWS and source not in early:
            source = source.args[0]
        if source in early:
            with graph.inserting_before(end):
                copied = graph.call_function(ATEN.clone.default, (result,))
            copied.meta["val"] = result.meta["val"]
            end.replace_input_with(result, copied)


def _return_views(graph: fx.Graph, early: set[fx.Node]) -> None:
    """Leave views at the border in the main graph: they cost nothing there."""
    for node in reversed(list(graph.nodes)):
        late = any(user not in early for user in node.users)
        if node in early and node.target in _VIEWS and late:
            early.discard(node)


def _prologue(
    root: fx.GraphModule, border: list[fx.Node], holders: list[fx.Node]
) -> tuple[fx.GraphModule, list[int]]:
    needed: set[fx.Node] = set()
    stack = list(border)
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack.extend(node.all_input_nodes)
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in border[0].graph.nodes:
        if node in needed:
            env[node] = graph.node_copy(node, lambda n: env[n])
    graph.output(tuple(env[n] for n in border))
    used = [i for i, holder in enumerate(holders) if holder in needed]
    return fx.GraphModule(root, graph), used


def _first_non_placeholder(graph: fx.Graph) -> fx.Node:
    first: fx.Node = next(n for n in graph.nodes if n.op != "placeholder")
    return first


def outline(parts: Split) -> object:
    """Return what two splits have in common whose main graphs compute the same from their inputs.

    Names do not count; the numbers of constants do.
    """
    place = {node: at for at, node in enumerate(parts.main.graph.nodes)}
    lines: list[object] = [tuple(parts.main_inputs)]
    for node in place:
        target: object = node.target
        if node.op == "placeholder":
            value = node.meta.get("val")
            laid = value.stride() if isinstance(value, Tensor) else value
            target = (str(getattr(value, "shape", "")), str(laid), str(getattr(value, "dtype", "")))
        elif node.op == "get_attr":
            held: Any = getattr(parts.main, str(node.target), None)
            if not isinstance(held, Tensor):
                return object()  # a graph in the graph: like no other
            target = (held.dtype, tuple(held.shape), held.detach().cpu().numpy().tobytes())
        arguments = fx.map_arg((node.args, node.kwargs), lambda n: f"%{place[n]}")
        lines.append((node.op, target, repr(arguments)))
    return lines
