"""Where an operand of a recorded run comes from: which weights made it, which tensor it is."""

from __future__ import annotations

import math
from operator import getitem
from typing import Any

import torch
from torch import fx

__all__ = ["weights_behind", "without_reshapes"]

_ATEN = torch.ops.aten
# Copies through which a weight stays the same weight, besides views.
_COPIES = {_ATEN.clone, _ATEN._to_copy, _ATEN._unsafe_view}
_JOINS = {_ATEN.cat, _ATEN.stack}  # several weights become one operand
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
        if node.target is not getitem and packet not in _COPIES and not _is_view(node.target):
            return []
        node = node.all_input_nodes[0]
    use = node.meta.get("use")
    return [use] if use and len(use.shape) >= 2 else []


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


def _is_view(op: Any) -> bool:
    alias = op._schema.arguments[0].alias_info
    return alias is not None and not alias.is_write
