"""Let the linear that reads a permuted tensor absorb the permutation in its columns.

    before   a = padst.permute(x, p)
             y = addmm(bias, a, w)                  # or padst.<structure>_linear(a, v, idx, bias)
    after    y = addmm(bias, x, w[invert(p)])       # or padst.<structure>_linear(x, v', idx', bias)

Fires for dense, fan-in and unstructured readers on any map; for N:M, block and diagonal readers
on the maps that their symmetry absorbs (whole groups or blocks and moves within them; cyclic
shifts). Left alone: the weights are not frozen; the map lies outside the reader's symmetry; the
reader is not a linear operation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from padst_compiler.index_map import invert
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

__all__ = ["AbsorbIntoReader"]

PERMUTE = torch.ops.padst.permute.default
KEEPS_LAST_AXIS = frozenset(
    {ATEN.view.default, ATEN._unsafe_view.default, ATEN.reshape.default, ATEN.clone.default}
)
STRUCTURED = frozenset(LINEAR.values())


@dataclass(frozen=True)
class AbsorbIntoReader:
    """Move permutations into the columns of the linears that read them."""

    name: str = "absorb_into_reader"

    def __call__(self, graph: fx.Graph, facts: Facts) -> Report:
        """Try every linear whose input comes, through views, from a permutation."""
        fired, left = [], []
        for reader in list(graph.nodes):
            position = _input_position(reader)
            if position is None:
                continue
            chain = _chain_to_permute(reader.args[position])
            if chain is None:
                continue
            permute, label = chain[0], _label(reader, facts)
            refusal = self._absorb(graph, reader, permute, facts)
            if refusal is None:
                reader.update_arg(position, _replay(graph, reader, chain))
                fired.append(Rule(facts.owner(permute), f"columns of {label}"))
            else:
                left.append(Refusal(facts.owner(permute), refusal))
        return Report(self.name, tuple(fired), tuple(left))

    def _absorb(
        self, graph: fx.Graph, reader: fx.Node, permute: fx.Node, facts: Facts
    ) -> str | None:
        """Reorder the reader's weights; return why not."""
        perm = permute.args[1]
        assert isinstance(perm, fx.Node)
        if not facts.is_frozen(perm):
            return "the map is not frozen: it may change between calls"
        if reader.target not in STRUCTURED:
            position = 1 if reader.target is ATEN.mm.default else 2
            weight = reader.args[position]
            if not isinstance(weight, fx.Node) or not facts.is_frozen(weight):
                return "the reader's weight is not frozen"
            folded = inline(
                graph, reader, lambda w, p: w.index_select(0, invert(p)), (weight, perm)
            )
            reader.update_arg(position, folded)
            return None
        return _absorb_structured(graph, reader, perm, facts)


def _absorb_structured(graph: fx.Graph, reader: fx.Node, perm: fx.Node, facts: Facts) -> str | None:
    x, values, indices = reader.args[:3]
    assert isinstance(values, fx.Node) and isinstance(indices, fx.Node)
    assert isinstance(reader.target, torch._ops.OpOverload)
    if not (facts.is_frozen(values) and facts.is_frozen(indices)):
        return "the reader's weight is not frozen"
    width = (shape_of(x) or (0,))[-1]
    shape = Shape(int((shape_of(reader) or (0,))[-1]), int(width))
    structure = STRUCTURE_OF[reader.target].of_storage(
        indices.meta["val"], shape, unit_of(values.meta["val"], indices.meta["val"])
    )
    if "input" not in structure.vacuous_sides:
        known = facts.map_of(perm)
        if known is None or not structure.absorbs_columns(known, shape):
            return f"the map lies outside what the columns of {structure.name} absorb"
        facts.rely_on(perm)
    reader.args = (
        x,
        *inline(
            graph,
            reader,
            lambda v, i, p: structure.fold_columns(v, i, p, shape),
            (values, indices, perm),
        ),
        *reader.args[3:],
    )
    return None


def _input_position(node: fx.Node) -> int | None:
    if node.op != "call_function":
        return None
    if node.target in STRUCTURED or node.target is ATEN.mm.default:
        return 0
    return 1 if node.target is ATEN.addmm.default else None


def _chain_to_permute(node: object) -> list[fx.Node] | None:
    """Return the permute and the views after it, down to ``node``; None where there is none."""
    chain: list[fx.Node] = []
    while isinstance(node, fx.Node):
        chain.insert(0, node)
        if node.target is PERMUTE:
            return chain
        shape, below = shape_of(node), node.args[0] if node.args else None
        before = shape_of(below)
        if node.target not in KEEPS_LAST_AXIS or not shape or not before:
            return None
        if not isinstance(shape[-1], int) or shape[-1] != before[-1]:
            return None
        node = below
    return None


def _replay(graph: fx.Graph, before: fx.Node, chain: list[fx.Node]) -> fx.Node:
    """Apply the chain's views to the permutation's input."""
    x = chain[0].args[0]
    assert isinstance(x, fx.Node)
    x = as_contiguous(graph, before, x)
    for view in chain[1:]:
        with graph.inserting_before(before):
            copied = graph.node_copy(view, lambda n: n)
        copied.update_arg(0, x)
        x = copied
    return x


def _label(reader: fx.Node, facts: Facts) -> str:
    if reader.target in STRUCTURED:
        indices = reader.args[2]
        assert isinstance(indices, fx.Node)
        return f"{facts.owner(indices)} ({reader.target.__name__.split('.')[0]})"
    return "a dense linear"
