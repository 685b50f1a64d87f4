"""Work on frozen Parameters is done once, not on every call; a write to them is noticed.

``split`` moves every node that depends on frozen placeholders only into a *prologue*.
``FrozenCall`` runs it once, keeps the results as inputs of the main graph, and looks at each call
whether a tensor that the prologue read was written (version counter) or replaced (address): then
it runs again. Writes through ``tensor.data`` do not move the version counter and go unseen: use
``copy_`` under no_grad.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils.weak import WeakIdKeyDictionary

from padst_compiler.rewrite import ATEN, Facts

__all__ = ["FrozenCall", "Split", "split"]

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
    """Move the nodes that depend on frozen placeholders only into a prologue."""
    graph = graph_module.graph
    holders = [n for n in graph.nodes if n.op == "placeholder"]
    early = {n for n in graph.nodes if n.op == "call_function" and facts.is_frozen(n)}
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


class FrozenCall:
    """A compiled main graph with its prologue's results, kept up to date.

    Dynamo runs one compiled graph for every module of a class (the blocks of a transformer), so the
    results are kept per module: by the identity of the first tensor that the prologue reads.
    """

    def __init__(
        self,
        parts: Split,
        compiled: Callable[..., Any],
        original: Callable[..., Any],
        watched: Sequence[int],
        arguments: Sequence[Any],
    ) -> None:
        """Remember the numbers that the graph was derived from.

        Args:
            parts: the split graph.
            compiled: runs ``parts.main``.
            original: the graph as it was captured, right for any numbers.
            watched: positions of the tensors whose numbers shaped the graph (permutations).
            arguments: the present tensors, in the order of the original placeholders.
        """
        self._parts, self._compiled, self._original = parts, compiled, original
        self._watched = list(watched)
        self._shaped_by = [arguments[i].detach().clone() for i in self._watched]
        self._shape_seen = _state(arguments, self._watched)
        self._derived: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._warned = False

    def __call__(self, *arguments: Any) -> Any:
        """Run on the original graph's inputs."""
        if not self._shape_holds(arguments):
            return self._run_original(arguments)
        parts = self._parts
        derived: Sequence[Tensor] = ()
        if parts.prologue is not None:
            key = arguments[parts.prologue_inputs[0]]
            state = _state(arguments, parts.prologue_inputs)
            seen, derived = self._derived.get(key, (None, ()))
            if seen != state:
                with torch.no_grad():
                    derived = parts.prologue(*(arguments[i] for i in parts.prologue_inputs))
                self._derived[key] = (state, derived)
        return self._compiled(*(arguments[i] for i in parts.main_inputs), *derived)

    def _shape_holds(self, arguments: Sequence[Any]) -> bool:
        """Whether the permutations that shaped the graph still have the numbers that they had."""
        state = _state(arguments, self._watched)
        if state == self._shape_seen:
            return True
        now = (arguments[i] for i in self._watched)
        if any(not torch.equal(a, b) for a, b in zip(now, self._shaped_by, strict=True)):
            return False
        self._shape_seen = state
        return True

    def _run_original(self, arguments: Sequence[Any]) -> Any:
        if not self._warned:
            self._warned = True
            warnings.warn(
                "A permutation that was folded at compile time has changed (a new state_dict?). "
                "The unfolded graph runs for it: right, but slower. Call torch.compile again on "
                "the model after torch.compiler.reset().",
                stacklevel=3,
            )
        return self._original(*arguments)


def _state(arguments: Sequence[Any], positions: Sequence[int]) -> _State:
    return _State([arguments[position] for position in positions])


class _State:
    """Which tensors were seen, where their numbers lay and how often they had been written to."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = [weakref.ref(t) for t in tensors]
        self.numbers = [(t.data_ptr(), t._version) for t in tensors]

    def __eq__(self, other: object) -> bool:
        """Whether both saw the same living tensors, unwritten in between."""
        if not isinstance(other, _State) or self.numbers != other.numbers:
            return False
        pairs = zip(self.tensors, other.tensors, strict=True)
        return all(one() is not None and one() is two() for one, two in pairs)

    __hash__ = None  # type: ignore[assignment]
