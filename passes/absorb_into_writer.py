"""Move a permutation up through pointwise operations into the rows of the linear that writes.

    before   h = addmm(bias, x, w)                  # or padst.fan_in_linear, padst.nm_linear
             a = gelu(h)
             y = padst.permute(a, p)
    after    h = addmm(bias[p], x, w[:, p])
             y = gelu(h)                               # already in the new order

What moves is proved node by node: operations that torch tags as pointwise, views that keep the
last axis, frozen vectors along that axis, scalars. Dense, fan-in, N:M and unstructured writers
absorb any map; block and diagonal writers what their symmetry absorbs. Left alone: an operation
on the way is not proved to move with the map, another reader wants the old order, a writer's
weights are not frozen, or the map comes from a graph input.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from padst_compiler.ops import LINEAR, STRUCTURE_OF
from padst_compiler.rewrite import (
    ATEN,
    Facts,
    Refusal,
    Report,
    Rule,
    as_contiguous,
    inline,
    shape_of,
)
from padst_compiler.structures import Shape, unit_of

__all__ = ["AbsorbIntoWriter"]

PERMUTE = torch.ops.padst.permute.default
KEEPS_LAST_AXIS = frozenset(
    {ATEN.view.default, ATEN._unsafe_view.default, ATEN.reshape.default, ATEN.clone.default}
)
STRUCTURED = frozenset(LINEAR.values())


@dataclass(frozen=True)
class AbsorbIntoWriter:
    """Move permutations into the rows of the linears that write what they read."""

    name: str = "absorb_into_writer"

    def __call__(self, graph: fx.Graph, facts: Facts) -> Report:
        """Prove the whole way up first; change nothing unless all of it is proved."""
        fired, left = [], []
        for permute in list(graph.find_nodes(op="call_function", target=PERMUTE)):
            x, perm = permute.args
            assert isinstance(x, fx.Node) and isinstance(perm, fx.Node)
            proof = _Proof(graph, facts, permute, perm)
            refusal = proof.move(x) or proof.escapes()
            if refusal is not None:
                left.append(Refusal(facts.owner(permute), refusal))
                continue
            fired.append(Rule(facts.owner(permute), f"rows of {', '.join(proof.writers)}"))
            if proof.relies_on_numbers:
                facts.rely_on(perm)
            for edit in proof.edits:
                edit()
            permute.replace_all_uses_with(as_contiguous(graph, permute, x))
            graph.erase_node(permute)
        return Report(self.name, tuple(fired), tuple(left))


@dataclass
class _Proof:
    """The region of nodes that would all change to the permuted order, and the edits that do it."""

    graph: fx.Graph
    facts: Facts
    permute: fx.Node
    perm: fx.Node
    region: set[fx.Node] = field(default_factory=set)
    edits: list[Callable[[], None]] = field(default_factory=list)
    writers: list[str] = field(default_factory=list)
    relies_on_numbers: bool = False

    def move(self, node: fx.Node) -> str | None:
        """Prove that ``node`` can be computed in permuted order; return why not."""
        if node in self.region:
            return None
        if not self.facts.is_frozen(self.perm):
            return "the map is not frozen: it may change between calls"
        if node.op == "placeholder":
            return f"it permutes a graph input ({node.name})"
        self.region.add(node)
        if node.target in (ATEN.mm.default, ATEN.addmm.default):
            return self._dense(node)
        if node.target in STRUCTURED:
            return self._structured(node)
        if node.target in KEEPS_LAST_AXIS and _same_last_axis(node, node.args[0]):
            assert isinstance(node.args[0], fx.Node)
            return self.move(node.args[0])
        if _is_pointwise(node):
            return self._pointwise(node)
        return f"{_name(node)} is not proved to move with a permutation"

    def escapes(self) -> str | None:
        """Return why not, where a node of the region has a reader that wants the old order."""
        for node in self.region:
            for user in node.users:
                if user not in self.region and user is not self.permute:
                    return f"{_name(node)} has another reader ({_name(user)})"
        return None

    def _pointwise(self, node: fx.Node) -> str | None:
        width = _last(node)
        for position, operand in enumerate(node.args):
            if not isinstance(operand, fx.Node):
                if isinstance(operand, list | tuple):
                    return f"{_name(node)} takes a list"
                continue
            shape = shape_of(operand)
            if shape is None:
                return f"{_name(node)} takes a value that is not a tensor"
            if not shape or (isinstance(shape[-1], int) and shape[-1] == 1):
                continue  # the same number along the whole axis
            if shape[-1] != width:
                return f"{_name(node)} changes the width of its operand"
            if self.facts.is_frozen(operand):
                self._reorder(node, position, operand)
            elif (why := self.move(operand)) is not None:
                return why
        if any(isinstance(v, fx.Node) for v in node.kwargs.values()):
            return f"{_name(node)} takes a tensor by keyword"
        return None

    def _reorder(self, node: fx.Node, position: int, operand: fx.Node) -> None:
        def edit() -> None:
            reordered = inline(
                self.graph, node, lambda v, p: v.index_select(-1, p), (operand, self.perm)
            )
            node.update_arg(position, reordered)

        self.edits.append(edit)

    def _dense(self, node: fx.Node) -> str | None:
        position = 1 if node.target is ATEN.mm.default else 2
        weight = node.args[position]
        if not isinstance(weight, fx.Node) or not self.facts.is_frozen(weight):
            return "the writer's weight is not frozen"
        if position == 2:
            bias = node.args[0]
            if not isinstance(bias, fx.Node) or not self.facts.is_frozen(bias):
                return "the writer's bias is not frozen"
            if (shape_of(bias) or (0,))[-1] != _last(node):
                return "the writer's bias is broadcast"
            self._reorder(node, 0, bias)
        self._reorder(node, position, weight)
        self.writers.append("a dense linear")
        return None

    def _structured(self, node: fx.Node) -> str | None:
        x, values, indices, bias, out_features = node.args
        assert isinstance(values, fx.Node) and isinstance(indices, fx.Node)
        assert isinstance(node.target, torch._ops.OpOverload)
        weights = [values, indices] if bias is None else [values, indices, bias]
        if not all(self.facts.is_frozen(w) for w in weights):
            return "the writer's weight is not frozen"
        shape = Shape(int(_last(node)), int((shape_of(x) or (0,))[-1]))
        structure = STRUCTURE_OF[node.target].of_storage(
            indices.meta["val"], shape, unit_of(values.meta["val"], indices.meta["val"])
        )
        if "output" not in structure.vacuous_sides:
            known = self.facts.map_of(self.perm)
            if known is None or not structure.absorbs_rows(known, shape):
                return f"the map lies outside what the rows of {structure.name} absorb"
            self.relies_on_numbers = True

        def edit() -> None:
            values2, indices2 = inline(
                self.graph,
                node,
                lambda v, i, p: structure.fold_rows(v, i, p, shape),
                (values, indices, self.perm),
            )
            node.args = (x, values2, indices2, bias, out_features)

        self.edits.append(edit)
        if isinstance(bias, fx.Node):
            self._reorder(node, 3, bias)
        self.writers.append(self.facts.owner(indices))
        return None


def _is_pointwise(node: fx.Node) -> bool:
    if node.target is ATEN._to_copy.default:  # a cast: pointwise, though torch does not tag it
        return True
    tags = getattr(node.target, "tags", ())
    return torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags


def _same_last_axis(node: fx.Node, operand: object) -> bool:
    before, after = shape_of(operand), shape_of(node)
    if not before or not after:
        return False
    return isinstance(after[-1], int) and after[-1] == before[-1]


def _last(node: fx.Node) -> Any:
    shape = shape_of(node)
    return shape[-1] if shape else None


def _name(node: fx.Node) -> str:
    return node.name if node.op != "call_function" else str(getattr(node.target, "__name__", node))
