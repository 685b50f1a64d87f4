"""Replace every structured operator by the formulation that runs fastest.

    before   y = padst.block_linear(x, values, indices, bias, 3072)
    after    t = x.view(...).transpose(0, 1).index_select(0, indices) ...
             y = bmm(t, values) ... + bias            # "bmm_token_major", or
             y = addmm(bias, x, unpack(values, indices).t())      # "dense"

By default that is predicted: the same model gets the same graph and hits the compile cache. A
sparse formulation must promise 1.25x dense to be taken: predictions were measured to be off by up
to 30 %, and slower than dense is worse than a gain forgone. With a clock it is timed, and what is
not faster than dense beyond the noise is left out. ``prefer="dense"`` and ``prefer="sparse"`` take
that side wherever it exists.

All sites are chosen together, because memory has a format: between two feature-major sites with
nothing but pointwise operators between them Inductor keeps ``x^T`` and transposes nothing. What
that saves is predicted always, a share of dense's predicted cost; so a timed site counts its
formulations in that unit too, at their measured ratios to dense.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import fx

from padst_compiler.contest import Contest, Measured, Prefer
from padst_compiler.formulation import BYTE, Candidates, Formulation, Geometry
from padst_compiler.geometry import geometry_of
from padst_compiler.insertion import inline
from padst_compiler.ops import LINEAR, LINEAR_DW, LINEAR_DX
from padst_compiler.passes.folding.solver import Table, minimise
from padst_compiler.rewrite import Facts, Report, Rule, shape_of

__all__ = ["ChooseFormulation"]

MARGIN = 0.8  # a prediction must be this much cheaper than dense to be worth leaving dense

_LINEAR, _DX, _DW = (frozenset(ops.values()) for ops in (LINEAR, LINEAR_DX, LINEAR_DW))


@dataclass(frozen=True)
class ChooseFormulation:
    """Lower structured operators to ATen, one choice per site.

    Args:
        candidates: the formulations of every operator, dense last.
        prefer: "auto" predicts; "dense" or "sparse" takes that; a clock times.
    """

    candidates: Candidates = field(repr=False)
    prefer: Prefer = "auto"
    name: str = "choose_formulation"

    def __call__(self, graph: fx.Graph, facts: Facts) -> Report:
        """Lower every structured operator of the graph."""
        nodes = [node for node in graph.nodes if node.target in self.candidates]
        sites = {node: _geometry(node, facts) for node in nodes}
        fired = []
        traces: dict[object, fx.GraphModule] = {}  # the layers of a model are much alike
        for node, (choice, why) in self._choose(sites).items():
            site = facts.owner(_indices(node))
            fired.append(Rule(site, f"{choice.name}: {why}"))
            arguments = [_constant(argument) for argument in node.args]
            new = inline(graph, node, choice.run, arguments, facts.table, traces)
            node.replace_all_uses_with(new)
            graph.erase_node(node)
        return Report(self.name, tuple(fired))

    def _choose(self, sites: Mapping[fx.Node, Geometry]) -> dict[fx.Node, tuple[Formulation, str]]:
        """Return the formulations that cost least together, and why each."""
        position = {node: at for at, node in enumerate(sites)}
        priced = [_priced(self.candidates[node.target], g) for node, g in sites.items()]
        timed = self._timed(sites, priced)
        options = [
            self._admitted(known) if found is None else _measured(known, found)
            for known, found in zip(priced, timed, strict=True)
        ]
        unary = [np.array(list(given.values())) for given in options]
        pairs: dict[tuple[int, int], Table] = {}
        for at, (node, geometry) in enumerate(sites.items()):
            for writer in _writers(node, sites):
                other = position[writer]  # earlier: a graph is in order
                here, there = (
                    np.array([way.feature_major for way in options[i]], dtype=np.float64)
                    for i in (at, other)
                )
                pairs[other, at] = -_kept_transposed(geometry) * there[:, None] * here
        most = max((table.max() for table in unary), default=1.0)  # far from the solver's LARGE
        chosen = minimise([t / most for t in unary], {ij: t / most for ij, t in pairs.items()})
        together = {at for (i, j), t in pairs.items() if t[chosen[i], chosen[j]] for at in (i, j)}
        picked = {}
        for at, (node, geometry) in enumerate(sites.items()):
            way, found = list(options[at])[chosen[at]], timed[at]
            why = self._why(priced[at], way, geometry) if found is None else _said(way, found)
            why += ", x^T kept between sites" if at in together else ""
            picked[node] = (way, why)
        return picked

    def _timed(
        self, sites: Mapping[fx.Node, Geometry], priced: Sequence[Mapping[Formulation, float]]
    ) -> list[Measured | None]:
        """Return what the clock says of every site; None where it is to be predicted."""
        if isinstance(self.prefer, str):
            return [None] * len(sites)
        contests = [
            Contest(_operator(node), g, node.target in _LINEAR and bool(node.args[3]), tuple(known))
            for (node, g), known in zip(sites.items(), priced, strict=True)
        ]
        found = self.prefer.time(contests)
        return [found.get(contest) for contest in contests]

    def _admitted(self, priced: Mapping[Formulation, float]) -> dict[Formulation, float]:
        """Return the costs that decide of the formulations that the preference leaves."""
        *sparse, dense = priced  # the last one given
        if self.prefer == "dense":
            sparse = []
        left = sparse if self.prefer == "sparse" and sparse else [*sparse, dense]
        return {way: priced[way] * (MARGIN if way is dense else 1.0) for way in left}

    def _why(
        self, priced: Mapping[Formulation, float], chosen: Formulation, geometry: Geometry
    ) -> str:
        *sparse, dense = priced
        if self.prefer == "dense":
            return "dense was asked for"
        if not sparse:
            return f"no sparse formulation of {geometry.structure.name} applies here"
        if chosen is dense:
            best = min(sparse, key=priced.__getitem__)
            return f"{best.name} is predicted at {priced[dense] / priced[best]:.2f}x dense"
        asked = "sparse was asked for; " if self.prefer == "sparse" else ""
        return f"{asked}predicted {priced[dense] / priced[chosen]:.1f}x dense"


def _measured(priced: Mapping[Formulation, float], found: Measured) -> dict[Formulation, float]:
    """Return the costs of dense and of what is faster, in the unit of dense's prediction."""
    dense = list(priced)[-1]
    faster = [way for way in priced if way is not dense and found.is_faster(way.name)]
    unit = priced[dense] / found.seconds.get(dense.name, 1.0)
    return {way: unit * found.seconds[way.name] for way in faster} | {dense: priced[dense]}


def _said(chosen: Formulation, found: Measured) -> str:
    """Return what was timed, of the best sparse formulation where dense was chosen."""
    if chosen.name in found.low:
        return found.against(chosen.name)
    if not found.low:
        return "nothing else was seen to run right"
    best = min(found.low, key=found.seconds.__getitem__)
    return f"{best} is {found.against(best)}"


def _priced(known: Sequence[Formulation], geometry: Geometry) -> dict[Formulation, float]:
    """Return the predicted costs of the formulations that apply, dense last."""
    costs = {way: way.cost(geometry) for way in known}
    return {way: cost for way, cost in costs.items() if cost is not None}


def _kept_transposed(geometry: Geometry) -> float:
    """Return what a site saves that finds ``x^T``: reading and writing x once, in the cache.

    Not more out of it: the activation between two sites, which the transposition is fused with,
    moves the same numbers either way (fan-in at 1576 tokens loses to dense at any higher price).
    """
    return 2.0 * BYTE * geometry.tokens * geometry.shape.in_features * geometry.item


def _writers(node: fx.Node, sites: Mapping[fx.Node, Geometry]) -> list[fx.Node]:
    """Return the sites that a linear site reads through pointwise operators of its own alone."""
    if node.target not in _LINEAR:
        return []
    found, waiting = [], [node.args[0]]
    while waiting:
        at = waiting.pop()
        if not isinstance(at, fx.Node) or len(at.users) != 1:
            continue
        if at in sites:
            found.append(at)
        elif isinstance(at.target, torch._ops.OpOverload) and torch.Tag.pointwise in at.target.tags:
            waiting += [x for x in at.all_input_nodes if shape_of(x) == shape_of(at)]
    return found


def _geometry(node: fx.Node, facts: Facts) -> Geometry:
    values = node.args[1] if node.target not in _DW else None
    frozen = facts.is_frozen(values) and facts.is_frozen(_indices(node))
    given = [_constant(argument) for argument in node.args]
    arguments = [_val(a) if isinstance(a, fx.Node) else a for a in given]
    return geometry_of(_operator(node), arguments, frozen=frozen)


def _operator(node: fx.Node) -> torch._ops.OpOverload:
    assert isinstance(node.target, torch._ops.OpOverload)
    return node.target


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
