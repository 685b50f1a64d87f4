"""Turn the permutations that a model writes itself into maps, so that they fold as learned ones do.

    before   y = index(x, [None, order])     # x[:, order], order a buffer
             z = roll(x, 1, -1)              # or flip
    after    y = padst.permute(x, order)
             z = padst.permute(x, (n - 1, 0, 1, ..., n - 2))

Left alone: other dimensions than the last, tables that are no permutation or may change, results
that do not lie contiguous in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from padst_compiler.insertion import constant
from padst_compiler.rewrite import ATEN, Facts, Refusal, Report, Rule, shape_of

__all__ = ["RecogniseMaps"]

PERMUTE = torch.ops.padst.permute.default
INDEXED = (ATEN.index.Tensor, ATEN.index_select.default)
COMPUTED = (ATEN.roll.default, ATEN.flip.default)


@dataclass(frozen=True)
class RecogniseMaps:
    """Replace what permutes the last dimension by ``padst::permute``."""

    name: str = "recognise_maps"

    def __call__(self, graph: fx.Graph, facts: Facts) -> Report:
        """Replace every permutation; one map is made for equal ones."""
        fired: list[Rule] = []
        left: list[Refusal] = []
        made: dict[bytes, fx.Node] = {}
        for node in [n for n in graph.nodes if n.target in (*INDEXED, *COMPUTED)]:
            x = node.args[0]
            assert isinstance(x, fx.Node)
            if facts.is_settled(x) or not _moves_features(node):
                continue
            kind = getattr(node.target, "__name__", "").split(".")[0]
            map_node = _table(node) if node.target in INDEXED else _computed(graph, node, made)
            if map_node is None or not _is_permutation(map_node, shape_of(x), facts):
                left.append(Refusal(node.name, f"the table of {kind} repeats or changes"))
                continue
            fired.append(Rule(node.name, f"{kind} is a map"))
            with graph.inserting_before(node):
                new = graph.call_function(PERMUTE, (x, map_node))
            new.meta = dict(node.meta)
            node.replace_all_uses_with(new)
            graph.erase_node(node)
        return Report(self.name, tuple(fired), tuple(left))


def _moves_features(node: fx.Node) -> bool:
    """Whether a node reads the last dimension by a table and keeps its length and the others."""
    value: Any = node.meta.get("val")
    shape = shape_of(node.args[0])
    if not isinstance(value, Tensor) or shape is None or len(shape) == 0:
        return False
    last, same = len(shape) - 1, len(value.shape) == len(shape)
    if not same or not isinstance(shape[-1], int) or value.shape[-1] != shape[-1]:
        return False
    if node.target is ATEN.index.Tensor:
        indices = node.args[1]
        assert isinstance(indices, list | tuple)
        moved = [at for at, index in enumerate(indices) if index is not None]
    elif node.target is ATEN.index_select.default:
        assert isinstance(node.args[1], int)
        moved = [node.args[1] % len(shape)]
    else:
        dims = node.args[2] if node.target is ATEN.roll.default and len(node.args) > 2 else ()
        dims = node.args[1] if node.target is ATEN.flip.default else dims
        assert isinstance(dims, list | tuple)
        moved = [int(str(dim)) % len(shape) for dim in dims]
    return moved == [last] and bool(value.is_contiguous())


def _table(node: fx.Node) -> fx.Node | None:
    """Return the node that holds the table of an indexing."""
    held = node.args[2] if node.target is ATEN.index_select.default else None
    if node.target is ATEN.index.Tensor:
        indices = node.args[1]
        assert isinstance(indices, list | tuple)
        held = indices[-1]
    return held if isinstance(held, fx.Node) else None


def _computed(graph: fx.Graph, node: fx.Node, made: dict[bytes, fx.Node]) -> fx.Node:
    """Return a constant with the table of a roll or a flip."""
    shape = shape_of(node.args[0])
    assert shape is not None
    positions = torch.arange(int(shape[-1]))
    if node.target is ATEN.flip.default:
        table = positions.flip(0)
    else:
        shifts = node.args[1]
        assert isinstance(shifts, list | tuple)
        table = positions.roll(int(str(shifts[0])))
    key = table.numpy().tobytes()
    if key not in made:
        made[key] = constant(graph, "map", table)
    return made[key]


def _is_permutation(table: fx.Node, shape: tuple[Any, ...] | None, facts: Facts) -> bool:
    value = table.meta.get("val")
    if shape is None or not isinstance(value, Tensor) or value.dtype != torch.int64:
        return False
    try:
        known = facts.map_of(table)
    except ValueError:
        return False
    return known is not None and known.size == shape[-1]
