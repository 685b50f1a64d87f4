"""Where an operand of a recorded run comes from: which weights made it, which tensor it is."""

from __future__ import annotations

import math
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx

from padst_compiler.unpacking import UNPACK

__all__ = ["scaled_weight", "summed_axes", "weights_behind", "without_reshapes"]

_ATEN = torch.ops.aten
# Copies through which a weight stays the same weight, besides views.
_COPIES = {_ATEN.clone, _ATEN._to_copy, _ATEN._unsafe_view, _ATEN.lift_fresh}
_JOINS = {_ATEN.cat, _ATEN.stack}  # several weights become one operand
_PICKS = {_ATEN.index, _ATEN.index_select}  # some experts of a stack
# What keeps the zeros of its first operand, or of either: norms of weights, masks.
_SCALES = {_ATEN.mul, _ATEN.div, _ATEN.neg, _ATEN._weight_norm_interface}
# What leaves the features of a tensor where they are, if the last axis keeps its size.
_RESHAPES = {_ATEN.view, _ATEN._unsafe_view, _ATEN.reshape, _ATEN.unsqueeze, _ATEN.squeeze}
_RESHAPES |= {_ATEN.alias, _ATEN.detach, _ATEN._to_copy, _ATEN.clone}


def weights_behind(node: fx.Node) -> list[Any]:
    """Return the uses of the matrices that a node is made of, through views, copies and joins.

    Args:
        node: of a trace; parameters have their use in ``meta["use"]``.
    """
    while node.op == "call_function" and node.all_input_nodes:
        packet = getattr(node.target, "overloadpacket", None)
        if packet in _JOINS:
            parts = [weights_behind(part) for part in node.all_input_nodes]
            return [use for part in parts for use in part] if all(parts) else []
        copied = node.target is getitem or packet in _COPIES or _is_pick(node)
        if not copied and node.target is not UNPACK and not _is_view(node.target):
            return []
        node = node.all_input_nodes[0]
    use = node.meta.get("use")
    return [use] if use and len(use.shape) >= 2 else []


def scaled_weight(node: fx.Node) -> Any:
    """Return the use of the one matrix that a node has scaled, its zeros kept; or None.

    Args:
        node: of a trace, as what ``weight_norm``, ``spectral_norm`` or a mask leaves.
    """
    while node.op == "call_function" and not weights_behind(node):
        packet = getattr(node.target, "overloadpacket", None)
        known = node.target is getitem or packet in _SCALES | _COPIES
        if not known and not _is_view(node.target):
            return None
        scaled = _scaled_input(node)
        if scaled is None:
            return None
        node = scaled
    found = weights_behind(node)
    return found[0] if len(found) == 1 else None


def summed_axes(operand: fx.Node, use: Any, dims: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return the axes of a parameter that a product sums over; None where that is not known.

    The positions of its numbers take the parameter's way through views, copies and joins.

    Args:
        operand: of the product.
        use: of the parameter.
        dims: the axes of the operand that are summed over.
    """
    try:
        places = _places(operand, use)
    except _UnknownError:
        return None
    for dim in range(places.dim()):
        if places.stride(dim) == 0:
            places = places.narrow(dim, 0, min(1, places.shape[dim]))  # an expanded axis
    held = (places >= 0).flatten()
    if not held.numel() or not bool(held.any()):
        return None
    start = torch.unravel_index(held.int().argmax(), places.shape)
    axes: set[int] = set()
    for dim in dims:
        along: list[Any] = [int(at) for at in start]
        along[dim % places.dim()] = slice(None)
        line = places[tuple(along)]
        for axis, at in enumerate(torch.unravel_index(line[line >= 0].long(), use.shape)):
            if int(at.min()) != int(at.max()):
                axes.add(axis)
    return tuple(sorted(axes)) or None


class _UnknownError(Exception):
    """What happened to a parameter on its way is not known."""


def _places(node: fx.Node, use: Any) -> Tensor:
    """Return where each number of a node stood in the parameter of ``use``; -1 for others."""
    if node.op != "call_function":
        shape = node.meta.get("shape", ())
        held: Any = node.meta.get("use")
        if held is not use:
            return torch.full((1,), -1, dtype=torch.int32).expand(shape)
        if tuple(shape) != tuple(use.shape):
            raise _UnknownError
        return torch.arange(math.prod(shape), dtype=torch.int32).view(shape)
    packet = getattr(node.target, "overloadpacket", None)
    if packet in _SCALES or (packet in _COPIES and packet is not _ATEN._unsafe_view):
        scaled = _scaled_input(node)
        if scaled is None:
            raise _UnknownError
        return _places(scaled, use)
    if node.target is getitem:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if getattr(source.target, "overloadpacket", None) in _SCALES:
            return _places(source, use)
    elif _is_pick(node):
        shape, (first, *_) = node.meta["shape"], node.all_input_nodes
        places = _places(first, use)
        axis: Any = node.args[1] if packet is _ATEN.index_select else 0
        picked = places.narrow(axis, 0, 1)
        extra = len(shape) - places.dim()
        for _ in range(extra):
            picked = picked.unsqueeze(axis)
        return picked.expand(shape) if extra >= 0 else picked.squeeze(axis)
    elif packet not in _JOINS | _COPIES and not _is_view(node.target):
        raise _UnknownError
    assert callable(node.target)
    mapped: Any = fx.map_arg((node.args, node.kwargs), lambda n: _tree(n, use))
    args, kwargs = mapped
    if packet in {_ATEN._unsafe_view, _ATEN.view}:  # of what was copied, and here was not
        seen: Tensor = args[0].reshape(args[1])
        return seen
    result: Tensor = node.target(*args, **kwargs)
    return result


def _tree(node: fx.Node, use: Any) -> Any:
    packet = getattr(node.target, "overloadpacket", None)
    if node.op == "call_function" and packet in {_ATEN.split, _ATEN.split_with_sizes, _ATEN.unbind}:
        assert callable(node.target)
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: _places(n, use))
        return node.target(*args, **kwargs)
    return _places(node, use)


def _scaled_input(node: fx.Node) -> fx.Node | None:
    """Return the operand of a scaling that has all of its numbers, and a weight's where it can."""
    nodes, size = node.all_input_nodes, math.prod(node.meta.get("shape", (-1,)))
    if len(nodes) == 1 or getattr(node.target, "overloadpacket", None) is (
        _ATEN._weight_norm_interface
    ):
        return nodes[0]
    whole = [n for n in nodes if math.prod(n.meta.get("shape", ())) == size]
    weights = [n for n in whole if weights_behind(n)]
    return next(iter(weights or whole), None)


def without_reshapes(node: fx.Node) -> fx.Node:
    """Return the tensor that a node holds in another shape or dtype, its last axis the same.

    Args:
        node: of a trace; what is known of its shape is in ``meta["shape"]``.
    """
    while node.op == "call_function" and node.args and isinstance(node.args[0], fx.Node):
        before = node.args[0]
        ours, theirs = (tuple(one.meta.get("shape", ())) for one in (node, before))
        packet = getattr(node.target, "overloadpacket", None)
        same = bool(ours) and ours[-1:] == theirs[-1:] and math.prod(ours) == math.prod(theirs)
        if packet not in _RESHAPES or not same:
            break
        node = before
    return node


def _is_pick(node: fx.Node) -> bool:
    """Whether a node is some experts out of a stack: one index on the first axis of three."""
    packet = getattr(node.target, "overloadpacket", None)
    if packet not in _PICKS or len(node.all_input_nodes[0].meta.get("shape", ())) < 3:
        return False
    if packet is _ATEN.index_select:
        return bool(node.args[1] == 0)
    (places,) = node.args[1:]
    return isinstance(places, list | tuple) and len(places) == 1


def _is_view(op: Any) -> bool:
    arguments = getattr(getattr(op, "_schema", None), "arguments", ())
    alias = arguments[0].alias_info if arguments else None
    return alias is not None and not alias.is_write
