"""Turn products with an unpacked sparse weight into sparse operators, in both directions.

    before   W = padst.unpack(values, indices, "block", o, i)
             y = addmm(bias, x, permute(W, invert(p)).t())
    after    y = padst.block_linear(padst.permute(x, p), values, indices, bias, o)

The weight may stand on either side of a product, be transposed, cast, reshaped or one slice of its
rows. In a joint graph the gradient ``pack(mm(dy.t(), x))`` becomes ``padst.block_linear_dw``, and a
recorder that wanted the dense gradient gets its two factors. Stacked experts in a batched product
are taken apart. What no product reads in such a way stays dense: it is unpacked, once where it is
frozen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from padst_compiler.dense_operand import Operand, call, inverse, find_operand, permuted
from padst_compiler.ops import LINEAR, LINEAR_DW, LINEAR_DX
from padst_compiler.rewrite import ATEN, Facts, Refusal, Report, Rule, as_contiguous, inline
from padst_compiler.structures import STRUCTURES, Shape, Structure
from padst_compiler.unpacking import PACK, UNPACK

__all__ = ["UseSparseOperator"]

_EXPERTS = 32  # a batched product of more is left dense
# Products: where their operands stand.
_PRODUCTS = {ATEN.mm.default: 0, ATEN.bmm.default: 0, ATEN.addmm.default: 1}
_OBSERVE = "padst.observe.default"


@dataclass(frozen=True)
class UseSparseOperator:
    """Rewrite products with unpacked weights; unpack in plain ATen what is left."""

    name: str = "use_sparse_operator"

    def __call__(self, graph: fx.Graph, facts: Facts) -> Report:
        """Rewrite the whole graph."""
        fired, left = [], []
        unpacked = [n for n in graph.nodes if n.op == "call_function" and n.target is UNPACK]
        if not unpacked:
            return Report(self.name)
        for node in list(graph.nodes):
            done = node.op == "call_function" and (_product(graph, node) or _gradient(graph, node))
            if done:
                fired.append(Rule(facts.owner(done), f"{done.target} in the place of {node.name}"))
        graph.eliminate_dead_code()
        for node in unpacked:
            if node.users:
                said = ", ".join(sorted({str(user.target) for user in _readers(node)}))
                left.append(Refusal(facts.owner(_indices(node)), f"unpacked for {said}"))
        _lower(graph, facts)
        return Report(self.name, tuple(fired), tuple(left))


def _product(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """Write one product with the sparse operator; return that operator's node."""
    if node.target not in _PRODUCTS or node.kwargs:
        return None
    at = _PRODUCTS[node.target]
    bias = node.args[0] if at else None
    first, second = (_node(node.args[place]) for place in (at, at + 1))
    for weight, x, late in ((second, first, True), (first, second, False)):
        operand = find_operand(weight)
        if operand is None or operand.base.target is not UNPACK or (bias is not None and not late):
            continue
        if operand.batch > 1 and (operand.batch > _EXPERTS or not late):
            continue
        # A weight behind x is E or E^T; one before it, its transpose, on x transposed.
        forward = operand.flipped == late
        with graph.inserting_before(node):
            parts = _stored(graph, operand)
            if parts is None:
                return None
            if not late:
                x = _transposed(graph, x)
            made, y = _apply(graph, node, operand, parts, x, forward, bias)
            if not late:
                y = _transposed(graph, y)
        node.replace_all_uses_with(as_contiguous(graph, node, y))
        graph.erase_node(node)
        return made
    return None


def _apply(
    graph: fx.Graph,
    node: fx.Node,
    operand: Operand,
    parts: Sequence[tuple[fx.Node, fx.Node]],
    x: fx.Node,
    forward: bool,
    bias: Any,
) -> tuple[fx.Node, fx.Node]:
    """Return the (last) sparse operator, and the product ``x E^T``, or ``x E``, plus bias."""
    before, after = (operand.columns, operand.rows) if forward else (operand.rows, operand.columns)
    x = permuted(graph, x, [inverse(graph, perm) for perm in reversed(before)])
    kind, width = operand.base.args[2], int(operand.base.args[4])  # type: ignore[arg-type]
    assert isinstance(kind, str)
    inside = bias if forward and not after and bias is not None and _dims(bias) == 1 else None
    results = []
    for number, (values, indices) in enumerate(parts):
        own = x if len(parts) == 1 else call(graph, ATEN.select.int, x, 0, number)
        if forward:
            results.append(
                call(graph, LINEAR[kind], own, values, indices, inside, operand.height)
            )
        else:
            results.append(call(graph, LINEAR_DX[kind], own, values, indices, width))
    y = results[0] if len(parts) == 1 else call(graph, ATEN.stack.default, results)
    y = permuted(graph, y, after)
    if bias is not None and inside is None:
        y = call(graph, ATEN.add.Tensor, y, bias)
    return results[-1], y


def _stored(graph: fx.Graph, operand: Operand) -> list[tuple[fx.Node, fx.Node]] | None:
    """Return values and indices of each matrix of an operand; None where rows are no part."""
    values, indices = _node(operand.base.args[0]), _node(operand.base.args[1])
    pieces = [(values, indices)]
    if not operand.whole:
        lines = _rows_per_line(operand.base)
        ends = [operand.start + at * operand.height for at in range(operand.batch + 1)]
        if lines is None or any(end % lines for end in ends):
            return None
        spans = [(a // lines, b // lines) for a, b in zip(ends, ends[1:], strict=False)]
        pieces = [
            (call(graph, ATEN.slice.Tensor, values, 0, a, b),
             call(graph, ATEN.slice.Tensor, indices, 0, a, b))
            for a, b in spans
        ]
    if (cast := operand.cast) is not None:
        pieces = [(call(graph, cast.target, v, *cast.args[1:], **cast.kwargs), i) for v, i in pieces]
    return pieces


def _rows_per_line(base: fx.Node) -> int | None:
    """Return how many rows of the weight one line of its storage holds; None where they mix."""
    indices, rows = _indices(base).meta["val"], base.meta["val"].shape[0]
    structure = _structure(base)
    groups = structure.table(Shape(*base.meta["val"].shape))[0]
    lines = int(indices.shape[0])
    return rows // lines if lines > 1 and groups % lines == 0 and rows % lines == 0 else None


def _gradient(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """Take the stored part of a gradient from its factors; give a recorder the factors."""
    if node.target is PACK:
        indices, kind, unit = node.args[1:]
        with graph.inserting_before(node):
            terms = _factors(graph, _node(node.args[0]), False)
            made = [call(graph, LINEAR_DW[str(kind)], g, x, indices, unit) for g, x in terms or ()]
            if not made:
                return None
            total = made[0]
            for other in made[1:]:
                total = call(graph, ATEN.add.Tensor, total, other)
        node.replace_all_uses_with(total)
        graph.erase_node(node)
        return made[0]
    if node.args and str(node.args[0]) == _OBSERVE and node.kwargs.get("x") is None:
        with graph.inserting_before(node):
            terms = _factors(graph, _node(node.kwargs["grad"]), True)
            if terms is not None and len(terms) == 1:
                grad, x = terms[0]
                node.kwargs = {**node.kwargs, "grad": grad, "x": x}
    return None


def _factors(
    graph: fx.Graph, node: fx.Node, flipped: bool
) -> list[tuple[fx.Node, fx.Node]] | None:
    """Return dy ``(t, o)`` and x ``(t, i)`` of every term of a gradient ``(o, i)``, or of its
    transpose; None where it is no sum of products.
    """
    if node.op == "call_function" and node.target is ATEN.add.Tensor and not node.kwargs:
        parts = [_factors(graph, _node(one), flipped) for one in node.args]
        return None if None in parts else [term for part in parts for term in part or ()]
    operand = find_operand(node)
    if operand is None or not operand.whole or operand.cast is not None:
        return None
    base = operand.base
    if base.op != "call_function" or base.target is not ATEN.mm.default:
        return None
    left = permuted(graph, _transposed(graph, _node(base.args[0])), operand.rows)
    right = permuted(graph, _node(base.args[1]), operand.columns)
    # A recorder's and an operator's kernels want rows that lie one behind the other.
    left, right = (_contiguous(graph, one) for one in (left, right))
    return [(right, left) if operand.flipped != flipped else (left, right)]


def _transposed(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """Return the transpose of a matrix, or of each of one batch; of a transpose what it was of."""
    dims = len(node.meta["val"].shape)
    swap = [*range(dims - 2), dims - 1, dims - 2]
    if node.op == "call_function" and (
        node.target is ATEN.t.default
        or (node.target is ATEN.permute.default and list(node.args[1]) == swap)  # type: ignore
    ):
        return _node(node.args[0])
    return call(graph, ATEN.permute.default, node, swap)


def _contiguous(graph: fx.Graph, node: fx.Node) -> fx.Node:
    if node.meta["val"].is_contiguous():
        return node
    return call(graph, ATEN.clone.default, node, memory_format=torch.contiguous_format)


def _lower(graph: fx.Graph, facts: Facts) -> None:
    """Write in plain ATen what still makes weights dense, takes gradients apart, or moves them."""
    weights = {n for n in graph.nodes if n.target in (UNPACK, PACK)}
    moved = {n for n in graph.nodes if n.target is torch.ops.padst.permute.default}
    moved = {n for n in moved if _is_weight(n, weights)}
    for node in [n for n in graph.nodes if n in weights | moved]:
        if node in moved:
            new = inline(graph, node, _gather, [_node(a) for a in node.args], facts.table)
        else:
            structure, tensors = _structure(node), [_node(a) for a in node.args[:2]]
            shape = Shape(*(node if node.target is UNPACK else tensors[0]).meta["val"].shape)
            run = _unpacking(structure, shape) if node.target is UNPACK else structure.pack
            new = inline(graph, node, run, tensors, facts.table)
        node.replace_all_uses_with(new)
        graph.erase_node(node)


def _is_weight(node: fx.Node, weights: set[fx.Node]) -> bool:
    """Whether a map moves a dense weight or its gradient."""
    operand = find_operand(node)
    if operand is not None and operand.base in weights:
        return True
    return any(user.target is PACK or _is_weight(user, weights) for user in _readers(node)
               if user.target in (PACK, torch.ops.padst.permute.default))


def _readers(node: fx.Node) -> list[fx.Node]:
    """Return what reads a node, through views of it."""
    found: list[fx.Node] = []
    for user in node.users:
        view = user.op == "call_function" and find_operand(user) is not None
        view = view and user.target is not torch.ops.padst.permute.default
        found += _readers(user) if view and _is_alias(user) else [user]
    return found


def _is_alias(node: fx.Node) -> bool:
    alias = getattr(node.target, "_schema", None)
    first = alias.arguments[0].alias_info if alias is not None and alias.arguments else None
    return first is not None and not first.is_write


def _unpacking(structure: Structure, shape: Shape) -> Any:
    return lambda values, indices: structure.unpack(values, indices, shape)


def _gather(x: torch.Tensor, perm: torch.Tensor) -> torch.Tensor:
    return x.index_select(-1, perm)


def _structure(node: fx.Node) -> Structure:
    """Return the structure of an ``unpack`` or a ``pack``."""
    packs = node.target is PACK
    kind = next(kind for kind in STRUCTURES if kind.name == node.args[2 - packs])
    dense = _node(node.args[0]) if packs else node
    indices = _indices(node).meta["val"]
    unit = node.args[3] if packs else _node(node.args[0]).meta["val"].shape[indices.dim() :]
    return kind.of_storage(indices, Shape(*dense.meta["val"].shape), unit)  # type: ignore[arg-type]


def _indices(node: fx.Node) -> fx.Node:
    return _node(node.args[1])


def _dims(node: Any) -> int:
    return len(node.meta["val"].shape)


def _node(argument: Any) -> fx.Node:
    assert isinstance(argument, fx.Node)
    return argument
