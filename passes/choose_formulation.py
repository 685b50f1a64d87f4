"""Replace every structured operator by the formulation that is predicted to run fastest.

    before   y = padst.block_linear(x, values, indices, bias, 3072)
    after    t = x.view(...).transpose(0, 1).index_select(0, indices) ...
             y = bmm(t, values) ... + bias            # "bmm_token_major", or
             y = addmm(bias, x, unpack(values, indices).t())      # "dense"

Predictions, not timings: the same model gets the same graph and hits the compile cache. A sparse
formulation must promise 1.25x dense to be taken: predictions were measured to be off by up to
30 %, and slower than dense is worse than a gain forgone. ``prefer="dense"`` and
``prefer="sparse"`` take that side wherever it exists.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from padst_compiler.compat import size_hint
from padst_compiler.formulation import Candidates, Formulation, Geometry
from padst_compiler.insertion import inline
from padst_compiler.ops import LINEAR, LINEAR_DW, LINEAR_DX, STRUCTURE_OF
from padst_compiler.rewrite import Facts, Report, Rule, shape_of
from padst_compiler.structures import Shape, unit_of

__all__ = ["ChooseFormulation"]

MARGIN = 0.8  # a prediction must be this much cheaper than dense to be worth leaving dense

_LINEAR, _DX, _DW = (frozenset(ops.values()) for ops in (LINEAR, LINEAR_DX, LINEAR_DW))


@dataclass(frozen=True)
class ChooseFormulation:
    """Lower structured operators to ATen, one choice per site."""

    candidates: Candidates = field(repr=False)
    prefer: str = "auto"
    name: str = "choose_formulation"

    def __call__(self, graph: fx.Graph, facts: Facts) -> Report:
        """Lower every structured operator of the graph."""
        fired = []
        traces: dict[object, fx.GraphModule] = {}  # the layers of a model are much alike
        for node in list(graph.nodes):
            if node.op != "call_function" or node.target not in self.candidates:
                continue
            geometry = _geometry(node, facts)
            choice, why = self._choose(self.candidates[node.target], geometry)
            site = facts.owner(_indices(node))
            fired.append(Rule(site, f"{choice.name}: {why}"))
            arguments = [_constant(argument) for argument in node.args]
            new = inline(graph, node, choice.run, arguments, facts.table, traces)
            node.replace_all_uses_with(new)
            graph.erase_node(node)
        return Report(self.name, tuple(fired))

    def _choose(
        self, candidates: Sequence[Formulation], geometry: Geometry
    ) -> tuple[Formulation, str]:
        costs = [(c.cost(geometry), c) for c in candidates]
        dense_cost, dense = costs[-1]
        assert dense_cost is not None
        sparse = [(cost, c) for cost, c in costs[:-1] if cost is not None]
        if self.prefer == "dense":
            return dense, "dense was asked for"
        if not sparse:
            return dense, f"no sparse formulation of {geometry.structure.name} applies here"
        cost, best = min(sparse, key=lambda pair: pair[0])
        ratio = dense_cost / cost
        if self.prefer == "sparse":
            return best, f"sparse was asked for; predicted {ratio:.1f}x dense"
        if cost > MARGIN * dense_cost:
            return dense, f"{best.name} is predicted at {ratio:.2f}x dense"
        return best, f"predicted {ratio:.1f}x dense"


def _geometry(node: fx.Node, facts: Facts) -> Geometry:
    first, indices = shape_of(node.args[0]), _indices(node)
    assert first is not None and isinstance(node.target, torch._ops.OpOverload)
    if node.target in _DW:
        second = shape_of(node.args[1])
        assert second is not None
        shape = Shape(int(first[-1]), int(second[-1]))
    elif node.target in _DX:
        shape = Shape(int(first[-1]), _integer(node.args[3]))
    else:
        shape = Shape(_integer(node.args[4]), int(first[-1]))
    values = node.args[1] if node.target not in _DW else None
    unit = _constant(node.args[3]) if values is None else unit_of(_val(values), _val(indices))
    assert isinstance(unit, Sequence)
    structure = STRUCTURE_OF[node.target].of_storage(_val(indices), shape, unit)
    value = node.meta["val"]
    return Geometry(
        structure=structure,
        shape=shape,
        kept=structure.slots(_val(indices), shape).shape[1],
        tokens=math.prod(size_hint(n) for n in first[:-1]),
        dtype=value.dtype,
        device=value.device.type,
        frozen=facts.is_frozen(values) and facts.is_frozen(indices),
    )


def _indices(node: fx.Node) -> fx.Node:
    indices = node.args[2]
    assert isinstance(indices, fx.Node)
    return indices


def _val(node: object) -> torch.Tensor:
    assert isinstance(node, fx.Node) and isinstance(node.meta["val"], torch.Tensor)
    return node.meta["val"]


def _constant(argument: object) -> fx.Node | int | list[int] | None:
    """Return an operator's argument; widths that were traced as symbols, as their numbers."""
    if isinstance(argument, list | tuple):
        return [_integer(size) for size in argument]
    if isinstance(argument, fx.Node) and isinstance(argument.meta["val"], torch.Tensor):
        return argument
    return None if argument is None else _integer(argument)


def _integer(value: object) -> int:
    if isinstance(value, fx.Node):
        value = value.meta["val"]
    assert isinstance(value, int | torch.SymInt)
    return int(value)  # widths are those of weights, so a symbol has one value only
