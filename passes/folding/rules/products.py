"""Contractions: linear layers read and write in any order that their weight follows."""

from __future__ import annotations

import torch
from torch import fx

from padst_compiler.index_map import IndexMap, invert
from padst_compiler.ops import LINEAR, STRUCTURE_OF
from padst_compiler.passes.folding.analysis import Analysis, Rule, Side, unknown
from padst_compiler.passes.folding.factors import Dims, Factor, Field, fields_of, renewed
from padst_compiler.passes.folding.problem import ANY, Allows, Edge, Endpoint, Gather
from padst_compiler.passes.folding.rewriting import Rewriter
from padst_compiler.passes.folding.rules.pointwise import follow, reordered
from padst_compiler.passes.folding.spaces import Axis, Space, leaves, total
from padst_compiler.rewrite import ATEN
from padst_compiler.structures import Shape, Structure, unit_of

__all__ = ["RULES"]

CONTRACTED = "the operands of a product come in other orders"


def permute(analysis: Analysis, node: fx.Node) -> None:
    """A permutation: the edge between two spaces."""
    x, perm = node.args
    assert isinstance(x, fx.Node) and isinstance(perm, fx.Node)
    known = analysis.facts.map_of(perm) if analysis.is_live(x) else None
    if known is None:
        unknown(analysis, node)
        return
    dims = analysis.dims(x)
    if int(x.meta["val"].shape[-1]) != known.size:
        unknown(analysis, node)
        return
    if known.size == 1:
        one = (Space(1),)
        analysis.problem.edges.append(Edge(node, one, one, known, 0.0))
        analysis.keep(node, renewed(dims))
        return
    dims = renewed(dims)
    why = "what it permutes is put together of parts"
    axis = _axis_of(analysis.whole(dims[-1], why), known.size)
    if axis is None:
        analysis.pin(dims[-1], why)
        axis = (Space(known.size),)
        analysis.pin((Field(axis, (known.size,)).whole,), why)
    target = Field((Space(known.size),), (known.size,))
    edge = Edge(node, axis, target.axis, known, analysis.bytes(node))
    analysis.problem.edges.append(edge)
    analysis.keep(node, (*dims[:-1], (target.whole,)))


def _axis_of(field: Field | None, size: int) -> Axis | None:
    """Return the axis of a field; a symbol for its size becomes a number."""
    if field is None:
        return None
    axis = leaves(field.axis)
    if len(axis) == 1 and not isinstance(axis[0].size, int):
        axis[0].size = size
    return axis if total(axis) == size else None


def matmul(analysis: Analysis, node: fx.Node) -> None:
    """mm, bmm, addmm, baddbmm: a constant matrix follows, live ones are contracted."""
    added = node.target in (ATEN.addmm.default, ATEN.baddbmm.default)
    bias, a, b = node.args[:3] if added else (None, *node.args[:2])
    assert isinstance(a, fx.Node) and isinstance(b, fx.Node)
    rank = len(analysis.shape(node))
    if not analysis.is_live(a) and not analysis.is_live(b):
        unknown(analysis, node)
        return
    left = analysis.dims(a) if analysis.is_live(a) else None
    right = renewed(analysis.dims(b)) if analysis.is_live(b) else None
    if left is not None and right is not None:
        out = _contract(analysis, node, (a, left), (b, right))
    elif left is not None:
        out = (*left[: rank - 1], _written(analysis, node, b, rank - 1))
        _read(analysis, node, a, left, rank - 1, b, rank - 2)
        _experts(analysis, node, left, b, rank)
    else:
        assert right is not None
        out = (*right[: rank - 2], _written(analysis, node, a, rank - 2), right[rank - 1])
        _read(analysis, node, b, right, rank - 2, a, rank - 1)
        _experts(analysis, node, right, a, rank)
    if isinstance(bias, fx.Node):
        if analysis.is_live(bias):
            own = analysis.dims(bias)
            own_bias = None if bias in (a, b) else bias
            shift = rank - len(own)
            pairs: list[tuple[Side, Side]] = [
                ((out[shift + at], None, shift + at), (f, own_bias, at))
                for at, f in enumerate(own)
                if f
            ]
            analysis.align(pairs, node, CONTRACTED)
        else:
            follow(analysis, node, bias, out, "a bias")
    analysis.keep(node, out)


def _contract(
    analysis: Analysis, node: fx.Node, one: tuple[fx.Node, Dims], two: tuple[fx.Node, Dims]
) -> Dims:
    """Align batch and contracted dimensions of two live operands."""
    (a, left), (b, right) = one, two
    rank = len(left)
    pairs: list[tuple[Side, Side]] = [
        ((left[at], None, at), (right[at], None, at))
        for at in range(rank - 2)
        if left[at] or right[at]
    ]
    if left[rank - 1] or right[rank - 2]:
        first, second = (None, None) if a is b else (a, b)
        pairs.append(((left[rank - 1], first, rank - 1), (right[rank - 2], second, rank - 2)))
    analysis.align(pairs, node, CONTRACTED)
    # Heads stand with the features that they belong to.
    batch = left[: rank - 2]
    inner = fields_of([right[rank - 1]])
    if any(field in inner for field in fields_of(right[: rank - 2])):
        batch = right[: rank - 2]
    return (*batch, left[rank - 2], right[rank - 1])


def _read(
    analysis: Analysis, node: fx.Node, x: fx.Node, dims: Dims, dim: int, weight: fx.Node, at: int
) -> None:
    """Let dimension ``at`` of a constant weight follow what ``dim`` of ``x`` runs over."""
    factors, why = dims[dim], "a linear reads a part of an axis"
    field = analysis.whole(factors, why)
    if field is None:
        analysis.pin(factors, why, analysis.before(x, dim, node))
    else:
        edit = reordered(node, weight, at)
        analysis.free(field.axis, "", edit, f"columns of {_label(analysis, weight)}")


def _written(analysis: Analysis, node: fx.Node, weight: fx.Node, at: int) -> tuple[Factor, ...]:
    """Return a free dimension that follows dimension ``at`` of a constant weight."""
    size = analysis.shape(weight)[at]
    if size == 1:
        return ()
    field = Field((Space(size),), (size,))
    edit = reordered(node, weight, at)
    analysis.free(field.axis, "", edit, f"rows of {_label(analysis, weight)}")
    return (field.whole,)


def _experts(analysis: Analysis, node: fx.Node, dims: Dims, weight: fx.Node, rank: int) -> None:
    for at in range(rank - 2):
        if len(dims[at]) == 1 and dims[at][0].is_whole:
            analysis.free(dims[at][0].field.axis, "", reordered(node, weight, at))
        else:
            analysis.pin(dims[at], "a batched linear reads a part of an axis")


def _label(analysis: Analysis, weight: fx.Node) -> str:
    name = analysis.facts.owner(weight)
    return f"{name} (dense)" if name != weight.name else "a dense linear"


def structured(analysis: Analysis, node: fx.Node) -> None:
    """A structured linear follows what its structure absorbs."""
    x, values, indices, bias, _ = node.args
    assert isinstance(x, fx.Node) and isinstance(values, fx.Node) and isinstance(indices, fx.Node)
    weights = [w for w in (values, indices, bias) if isinstance(w, fx.Node)]
    if not analysis.is_live(x):
        unknown(analysis, node)
        return
    for weight in weights:
        analysis.fix(weight, node, "a weight comes in its own order")
    dims, kind = analysis.dims(x), node.target
    assert isinstance(kind, torch._ops.OpOverload)
    # Widths are those of weights: a symbol has one value only.
    last, width = (int(t.meta["val"].shape[-1]) for t in (node, x))
    shape = Shape(last, width)
    frozen = all(analysis.facts.is_frozen(w) for w in weights)
    structure = STRUCTURE_OF[kind].of_storage(
        indices.meta["val"], shape, unit_of(values.meta["val"], indices.meta["val"])
    )
    label = f"{analysis.facts.owner(indices)} ({structure.name})"
    beyond = f"the map lies outside what the {{}} of {label} absorb"

    def fold_columns(rewriter: Rewriter, order: IndexMap) -> None:
        rewriter.restructure(
            node, lambda v, i, p: structure.fold_columns(v, i, invert(p), shape), order
        )

    def fold_rows(rewriter: Rewriter, order: IndexMap) -> None:
        rewriter.restructure(node, lambda v, i, p: structure.fold_rows(v, i, p, shape), order)

    factors, why = dims[-1], "a linear reads a part of an axis"
    read = analysis.whole(factors, why) if factors else None
    if read is None:
        analysis.pin(factors, why)
    else:
        analysis.problem.endpoints.append(
            Endpoint(
                read.axis,
                beyond.format("columns") if frozen else f"the weight of {label} is not frozen",
                _absorbs(structure, shape, "input") if frozen else None,
                fold_columns,
                analysis.before(x, len(dims) - 1, node),
                f"columns of {label}",
            )
        )
    if last == 1:
        analysis.keep(node, (*dims[:-1], ()))
        return
    field = Field((Space(last),), (last,))
    out = (*dims[:-1], (field.whole,))
    analysis.problem.endpoints.append(
        Endpoint(
            field.axis,
            beyond.format("rows") if frozen else f"the weight of {label} is not frozen",
            _absorbs(structure, shape, "output") if frozen else None,
            fold_rows,
            Gather(node, len(out) - 1, None, analysis.bytes(node)),
            f"rows of {label}",
        )
    )
    if isinstance(bias, fx.Node) and frozen:
        analysis.free(field.axis, "", reordered(node, bias, 0))
    analysis.keep(node, out)


def _absorbs(structure: Structure, shape: Shape, side: str) -> Allows:
    if side in structure.vacuous_sides:
        return ANY
    absorbs = structure.absorbs_columns if side == "input" else structure.absorbs_rows
    return lambda order: absorbs(order, shape)


RULES: dict[object, Rule] = (
    {torch.ops.padst.permute.default: permute}
    | dict.fromkeys(
        (ATEN.mm.default, ATEN.addmm.default, ATEN.bmm.default, ATEN.baddbmm.default), matmul
    )
    | dict.fromkeys(LINEAR.values(), structured)
)
