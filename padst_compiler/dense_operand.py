"""What an operand of a captured product is made of: a matrix, moved by views and by maps.

``find_operand`` looks through views, casts and ``padst::permute`` to the matrix below, and says
which of its rows and columns stand where, so that a product with the operand can be written with
the matrix itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx

from padst_compiler.rewrite import ATEN, as_node
from padst_compiler.structures import STRUCTURES, Shape, Structure
from padst_compiler.unpacking import PACK

__all__ = ["Map", "Operand", "find_operand", "follow", "readers", "structure_of", "undo"]

_VIEWS = {
    ATEN.view.default,
    ATEN._unsafe_view.default,
    ATEN.reshape.default,
    ATEN.t.default,
    ATEN.transpose.int,
    ATEN.permute.default,
    ATEN.unsqueeze.default,
    ATEN.squeeze.default,
    ATEN.squeeze.dim,
    ATEN.squeeze.dims,
    ATEN.expand.default,
    ATEN.select.int,
    ATEN.slice.Tensor,
    ATEN.alias.default,
    ATEN.detach.default,
}
_SPLITS = {ATEN.split.Tensor, ATEN.split_with_sizes.default, ATEN.unbind.int, ATEN.chunk.default}
_CASTS = {ATEN._to_copy.default, torch.ops.prims.convert_element_type.default}
_PERMUTE, _INVERT = torch.ops.padst.permute.default, torch.ops.padst.invert.default


@dataclass(frozen=True)
class Map:
    """A permutation in a graph, or its inverse."""

    perm: fx.Node
    inverted: bool = False


@dataclass(frozen=True)
class Operand:
    """A matrix E with ``E[r, c] = M[rows[r], columns[c]]``, perhaps transposed or a part of it.

    Attributes:
        base: the node of M, ``(o, i)``.
        rows: the maps that gathered rows of M, in their order.
        columns: the maps that gathered its columns.
        flipped: whether the operand is the transpose of E.
        start: its first row in M; 0 where maps moved them.
        height: how many rows each of its matrices has.
        batch: how many matrices of that many rows it stacks; 1 where it is one.
        cast: the node that changed the numbers' type, if any.
    """

    base: fx.Node
    height: int
    rows: tuple[Map, ...] = ()
    columns: tuple[Map, ...] = ()
    flipped: bool = False
    start: int = 0
    batch: int = 1
    cast: fx.Node | None = None

    @property
    def whole(self) -> bool:
        """Whether every row of M is in it, once, in one matrix."""
        return self.batch == 1 and self.height == _value(self.base).shape[-2]


def find_operand(node: fx.Node) -> Operand | None:
    """Return what ``node`` is made of; None where it is no such matrix.

    Args:
        node: of an ATEN graph with fake values; axes of size 1 and expanded ones do not count.
    """
    source = node
    while source.op == "call_function" and _is_part(source):
        source = as_node(source.args[0])
    value, held = node.meta.get("val"), source.meta.get("val")
    if not isinstance(value, Tensor) or not isinstance(held, Tensor) or held.dim() not in (2, 3):
        return None
    if not held.is_contiguous() or not all(isinstance(n, int) for n in (*held.shape, *value.shape)):
        return None
    below = _below(source)
    return None if below is None else _through_views(below, value, held)


def _below(source: fx.Node) -> Operand | None:
    """Return the operand that a node is which is no view."""
    target = source.target if source.op == "call_function" else None
    held = _value(source)
    if target is _PERMUTE or target in _CASTS or target is ATEN.clone.default:
        inner = find_operand(as_node(source.args[0]))
        if inner is None or not inner.whole or held.dim() != 2:
            return None
        if target in _CASTS:
            return replace(inner, cast=source) if inner.cast is None else None
        if target is ATEN.clone.default:
            return inner
        perm = _map(as_node(source.args[1]))
        if inner.flipped:
            return replace(inner, rows=(*inner.rows, perm))
        return replace(inner, columns=(*inner.columns, perm))
    if held.dim() == 3:
        return Operand(source, held.shape[1], batch=held.shape[0])
    return Operand(source, held.shape[0])


def _through_views(below: Operand, value: Tensor, held: Tensor) -> Operand | None:
    """Say which part of ``held``, whose operand is ``below``, a view of it with ``value`` is."""
    *_, height, width = held.shape
    if below.batch > 1:  # the result of a batched product: one matrix of all rows
        height *= below.batch
    axes = [(n, s) for n, s in zip(value.shape, value.stride(), strict=True) if n != 1 and s != 0]
    sizes, strides = [n for n, _ in axes], [s for _, s in axes]
    offset = int(value.storage_offset()) - int(held.storage_offset())
    if min(height, width) < 2 or len(axes) not in (2, 3) or offset % width:
        return None
    batch = sizes[0] if len(axes) == 3 else 1
    (one, other), (first, second) = sizes[-2:], strides[-2:]
    flipped = (first, second) == (1, width)
    if not flipped and (first, second) != (width, 1):
        return None
    taken, across = (other, one) if flipped else (one, other)
    if across != width or (batch > 1 and strides[0] != taken * width):
        return None
    part = batch > 1 or taken != height
    if below.batch > 1:
        fits = (batch, taken) == (below.batch, height // below.batch) or not part
        return replace(below, flipped=flipped) if fits else None
    if part and (below.flipped or below.rows):
        return None
    flipped = flipped != below.flipped
    return (
        replace(below, flipped=flipped, start=offset // width, height=taken, batch=batch)
        if part
        else replace(below, flipped=flipped)
    )


def follow(x: Tensor, maps: Sequence[Map], tensors: Sequence[Tensor]) -> Tensor:
    """Return ``x`` with its last axis gathered by each map in turn.

    Args:
        x: any tensor.
        maps: as an operand has them.
        tensors: the permutations that they stand for, in the same order.
    """
    for one, perm in zip(maps, tensors, strict=True):
        x = torch.ops.padst.permute(x, torch.ops.padst.invert(perm) if one.inverted else perm)
    return x


def undo(maps: Sequence[Map]) -> tuple[Map, ...]:
    """Return the maps that undo ``maps``, in their order.

    Example:
        >>> perm = fx.Graph().placeholder("p")
        >>> undo([Map(perm)])[0].inverted
        True
    """
    return tuple(Map(one.perm, not one.inverted) for one in reversed(maps))


def readers(node: fx.Node) -> list[fx.Node]:
    """Return what reads a node, through views of it and maps.

    Args:
        node: any.
    """
    found: list[fx.Node] = []
    for user in node.users:
        found += (
            readers(user)
            if user.target is _PERMUTE or _is_part(user) or _is_alias(user)
            else [user]
        )
    return found


def structure_of(node: fx.Node) -> Structure:
    """Return the structure of an ``unpack`` or a ``pack``.

    Args:
        node: such a node, with fake values.
    """
    packs = node.target is PACK
    kind = next(kind for kind in STRUCTURES if kind.name == node.args[2])
    dense = _value(as_node(node.args[0]) if packs else node)
    shape = Shape(int(dense.shape[0]), int(dense.shape[1]))
    indices = as_node(node.args[1]).meta["val"]
    unit: Any = node.args[3] if packs else as_node(node.args[0]).meta["val"].shape[indices.dim() :]
    return kind.of_storage(indices, shape, [int(n) for n in unit])


def _is_part(node: fx.Node) -> bool:
    """Whether a node is a view of what it reads, or the views that a split makes."""
    parts = node.args[0] if node.target is getitem else node
    return node.target in _VIEWS or (isinstance(parts, fx.Node) and parts.target in _SPLITS)


def _is_alias(node: fx.Node) -> bool:
    alias = getattr(node.target, "_schema", None)
    first = alias.arguments[0].alias_info if alias is not None and alias.arguments else None
    return first is not None and not first.is_write


def _map(perm: fx.Node) -> Map:
    inverted = False
    while perm.op == "call_function" and perm.target is _INVERT:
        perm, inverted = as_node(perm.args[0]), not inverted
    return Map(perm, inverted)


def _value(node: fx.Node) -> Tensor:
    value = node.meta["val"]
    assert isinstance(value, Tensor)
    return value
