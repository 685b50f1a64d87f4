"""The contract of a pass: it changes an ATen graph, and says where it fired and what it left.

A pass may rely on the numbers of a tensor only through ``Facts``: in an inference graph
Parameters and buffers are *frozen*, their values are known; in a training graph nothing is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from padst_compiler.index_map import IndexMap

__all__ = [
    "Facts",
    "Pass",
    "PassError",
    "Refusal",
    "Report",
    "Rule",
    "as_node",
    "has_operators",
    "is_from_a_pass",
    "is_random",
    "run_pipeline",
    "shape_of",
]

ATEN = torch.ops.aten


@dataclass(frozen=True)
class Refusal:
    """One place where a pass did not fire, and why."""

    where: str
    why: str


@dataclass(frozen=True)
class Rule:
    """One place where a pass fired, and what it did."""

    where: str
    what: str


@dataclass(frozen=True)
class Report:
    """What one run of a pass did."""

    name: str
    fired: tuple[Rule, ...] = ()
    left: tuple[Refusal, ...] = ()


@dataclass
class Facts:
    """What is known about a graph beside its nodes.

    Attributes:
        frozen: placeholders of Parameters and buffers with their tensors; empty in training.
        names: placeholders with the module that owns them; passes add what they make of these.
        table: decompositions that the graph has seen, and inserted nodes must see too.
        read: the frozen placeholders whose numbers a pass relied on: a change voids the graph.
            What a pass did not do because of numbers stays right for any, and is not noted.
    """

    frozen: Mapping[fx.Node, Tensor] = field(default_factory=dict)
    names: dict[fx.Node, str] = field(default_factory=dict)
    table: Mapping[Any, Callable[..., Any]] | None = None
    read: set[fx.Node] = field(default_factory=set)
    _known: dict[fx.Node, bool] = field(default_factory=dict)
    _live: set[fx.Node] = field(default_factory=set)

    def is_frozen(self, node: object) -> bool:
        """Whether ``node`` depends on frozen placeholders, and beside them on constants only."""
        return isinstance(node, fx.Node) and self.is_settled(node) and self._known[node]

    def is_settled(self, node: fx.Node) -> bool:
        """Whether ``node`` never changes: it is frozen, or depends on constants only.

        Asked from inputs to outputs it goes one node deep: what is live stays known as such.
        """
        if node in self._known:
            return True
        if node in self._live:
            return False
        if node.op == "get_attr":
            self._known[node] = False
            return True
        if node.op == "placeholder":
            settled, known = node in self.frozen, True
        else:
            settled = node.op == "call_function" and not is_random(node)
            settled = settled and all(self.is_settled(n) for n in node.all_input_nodes)
            known = settled and any(self._known[n] for n in node.all_input_nodes)
        if settled:
            self._known[node] = known
        else:
            self._live.add(node)
        return settled

    def map_of(self, node: fx.Node) -> IndexMap | None:
        """Return the permutation that ``node`` holds where its numbers are known.

        A pass that fires because of them must say so with ``rely_on``.
        """
        if not self.is_settled(node):
            return None
        return IndexMap.of(self._value(node))

    def rely_on(self, node: fx.Node) -> None:
        """Note that the graph is right only for the present numbers of ``node``."""
        if node.op == "placeholder":
            self.read.add(node)
        for source in node.all_input_nodes:
            self.rely_on(source)

    def _value(self, node: fx.Node) -> Tensor:
        if node.op == "placeholder":
            return self.frozen[node].detach().cpu()
        if node.op == "get_attr":
            held = getattr(node.graph.owning_module, str(node.target))
            assert isinstance(held, Tensor)
            return held.detach().cpu()
        assert callable(node.target)
        args, kwargs = fx.map_arg((node.args, node.kwargs), self._value)
        with torch.no_grad():
            result = node.target(*args, **kwargs)
        assert isinstance(result, Tensor)
        return result

    def owner(self, node: fx.Node) -> str:
        """Return the module that a structured operator or a map belongs to, for reports."""
        start = node.args[1] if str(node.target) == "padst.permute.default" else node
        queue, seen = [start], []
        while queue:
            current = queue.pop(0)
            if not isinstance(current, fx.Node):
                continue
            if current in self.names:
                seen.append(self.names[current])
            elif current is start or self.is_frozen(current):
                near = current.all_input_nodes
                queue += [n for n in near if self.is_frozen(n) or n in self.names]
        layers = [name for name in seen if not name.endswith("permutation")]
        return (layers or seen or [node.name])[0]


class Pass(Protocol):
    """Graph to graph; a frozen dataclass whose repr is part of the cache key."""

    @property
    def name(self) -> str:
        """The pass's verb_object name."""

    def __call__(self, graph: fx.Graph, facts: Facts) -> Report:
        """Rewrite in place; leave a valid graph; say what was done and what was left."""


class PassError(RuntimeError):
    """A pass failed; the message names it, the passes before it and the node where it stood."""


def run_pipeline(pipeline: Sequence[Pass], graph: fx.Graph, facts: Facts) -> tuple[Report, ...]:
    """Run the passes in order; an error names the pass, those before it and the node.

    Raises:
        PassError: a pass failed or left an invalid graph.
    """
    reports: list[Report] = []
    for step in pipeline:
        try:
            reports.append(step(graph, facts))
            graph.eliminate_dead_code()
            graph.lint()
        except Exception as error:
            before = ", ".join(r.name for r in reports) or "none"
            node = _node_at(error, graph)
            where = "" if node is None else f"; at: {node.format_node()}"
            said = f"Pass {step.name} failed (after: {before}{where}): {error}"
            raise PassError(said) from error
    return tuple(reports)


def has_operators(graph_module: fx.GraphModule) -> bool:
    """Whether a graph, or one inside it, calls an operator of ours."""
    graphs = (m.graph for m in graph_module.modules() if isinstance(m, fx.GraphModule))
    return any("padst." in str(node.target) for graph in graphs for node in graph.nodes)


def is_from_a_pass(error: BaseException | None) -> bool:
    """Whether an error is a pass's, however Dynamo and Inductor have wrapped it."""
    while error is not None and not isinstance(error, PassError):
        error = error.__cause__ or error.__context__
    return error is not None


def as_node(argument: object) -> fx.Node:
    """Return an argument of a node that is a node itself."""
    assert isinstance(argument, fx.Node)
    return argument


def shape_of(node: object) -> tuple[Any, ...] | None:
    """Return the shape of a tensor-valued node, else None."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return tuple(value.shape) if isinstance(value, Tensor) else None


def _node_at(error: BaseException, graph: fx.Graph) -> fx.Node | None:
    """Return the node that the innermost frame with one was working on: passes need not say it."""
    found: fx.Node | None = None
    trace = error.__traceback__
    while trace is not None:
        local = trace.tb_frame.f_locals
        nodes = [v for v in local.values() if isinstance(v, fx.Node) and v.graph is graph]
        named = local.get("node")
        found = named if named in nodes else (nodes[-1] if nodes else found)
        trace = trace.tb_next
    return found


def is_random(node: fx.Node) -> bool:
    """Whether a node draws random numbers; attention is tagged so, and draws for its dropout."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    assert isinstance(node.target, torch._ops.OpOverload)
    for position, argument in enumerate(node.target._schema.arguments):
        if argument.name == "dropout_p":
            given = node.kwargs.get("dropout_p", argument.default_value)
            return bool(node.args[position] if position < len(node.args) else given)
    return True
