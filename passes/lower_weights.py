"""Write in plain ATen what still makes weights dense, takes gradients apart, or moves them.

    before   W = padst.permute(padst.unpack(values, indices, "block", o, i), p)
    after    W = index_select(scatter(zeros, 1, indices, values).view(o, i), -1, p)

What is frozen in it is computed once (``frozen.py``). No map on activations is touched.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from padst_compiler.dense_operand import find_operand, readers, structure_of
from padst_compiler.insertion import inline
from padst_compiler.rewrite import Facts, Report, Rule, as_node
from padst_compiler.structures import Shape, Structure
from padst_compiler.unpacking import PACK, UNPACK

__all__ = ["LowerWeights"]

_PERMUTE = torch.ops.padst.permute.default


@dataclass(frozen=True)
class LowerWeights:
    """Lower ``padst::unpack``, ``padst::pack``, and the maps on what they make and take."""

    name: str = "lower_weights"

    def __call__(self, graph: fx.Graph, facts: Facts) -> Report:
        """Lower them all."""
        fired = []
        weights = {n for n in graph.nodes if n.target in (UNPACK, PACK)}
        moved = [n for n in graph.nodes if n.target is _PERMUTE]
        moved = [n for n in moved if weights and _is_weight(n, weights)]
        for node in [n for n in graph.nodes if n in weights or n in moved]:
            tensors = [as_node(argument) for argument in node.args[:2]]
            fired.append(Rule(facts.owner(tensors[1]), f"{node.name} is plain ATen"))
            new = inline(graph, node, _lowered(node), tensors, facts.table)
            node.replace_all_uses_with(new)
            graph.erase_node(node)
        return Report(self.name, tuple(fired))


def _is_weight(node: fx.Node, weights: set[fx.Node]) -> bool:
    """Whether a map moves a dense weight or its gradient."""
    operand = find_operand(node)
    if operand is not None and operand.base in weights:
        return True
    users = readers(node)
    fine = [user in weights or str(user.args[:1]) == "(padst.observe.default,)" for user in users]
    return bool(fine) and all(fine)


def _lowered(node: fx.Node) -> Callable[..., Tensor]:
    if node.target is _PERMUTE:
        return _gather
    structure = structure_of(node)
    if node.target is PACK:
        return structure.pack
    out_features, in_features = (int(n) for n in node.meta["val"].shape)
    return _unpacking(structure, Shape(out_features, in_features))


def _unpacking(structure: Structure, shape: Shape) -> Callable[..., Tensor]:
    return lambda values, indices: structure.unpack(values, indices, shape)


def _gather(x: Tensor, perm: Tensor) -> Tensor:
    return x.index_select(-1, perm)
