"""The operators by which a recorder sees the dense gradient of a sparse layer, slab by slab.

    forward    y = padst::watch(y, x, armed, ...)        # a copy of y
    backward   padst::observe(..., armed, dL/dy, x, ...) # if armed: scores of (dL/dy)^T x

``observe`` forms the dense gradient in slabs of at most ``SLAB`` numbers and keeps a few numbers
per kept unit, as ``recorder.Recorder`` explains. Of a layer that unpacks its weight, ``y`` is
``S^T`` and there is no x: ``dL/dy`` is the dense gradient, transposed. Both operators are always in
the graph and ``armed`` is a tensor, so a compiled training step is not compiled again when
recording starts or stops.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from padst_compiler.structure_text import parse_structure
from padst_compiler.structures import Diagonal, Shape, Structure

__all__ = ["FINITE", "POISONED", "SLAB", "wipe"]

SLAB = 2**20
"""Numbers of the dense gradient that exist at once (a row of blocks may be larger)."""

FINITE, POISONED = 1, 2
"""``status`` after a pass whose scores are all finite, and after another one; 0 before any."""


def _slabs(
    structure: Structure, grad: Tensor, x: Tensor | None
) -> Iterator[tuple[int, int, Tensor]]:
    """Yield the table of unit scores in pieces: first group, first candidate, ``(g', c')``.

    Args:
        structure: of the layer, with its sizes.
        grad: ``(t, o)``.
        x: ``(t, i)``; None where ``grad`` is the dense gradient itself, ``(i, o)``.
    """
    shape = _shape(grad, x)
    groups, candidates = structure.table(shape)
    if isinstance(structure, Diagonal) and x is not None:
        yield 0, 0, _diagonal_scores(structure, grad, x)
        return
    rows = structure.rows_per_slab(shape) or shape.out_features
    rows *= max(1, SLAB // (rows * shape.in_features))
    for start in range(0, shape.out_features, rows):
        part = grad[:, start : start + rows].t()
        scores = structure.unit_scores(part if x is None else part @ x)
        first = start * groups * candidates // shape.out_features
        yield first // candidates, first % candidates, scores


def _diagonal_scores(structure: Diagonal, grad: Tensor, x: Tensor) -> Tensor:
    """Return the norms of all units of ``grad^T x``: ``(1, candidates)``.

    A slab that starts ``start`` along the shorter axis holds a piece of every diagonal, and what
    lies on offset d of the weight lies on offset ``d + start`` of the slab.
    """
    along_rows = grad.shape[1] < x.shape[1]
    shorter, longer = (grad, x) if along_rows else (x, grad)
    step = max(1, SLAB // longer.shape[1])
    squares = torch.zeros(1, longer.shape[1], device=x.device)
    for start in range(0, shorter.shape[1], step):
        part = shorter[:, start : start + step]
        slab = part.t() @ longer if along_rows else longer.t() @ part
        squares += structure.squares(slab).roll(-start, dims=1)
    return structure.over_units(squares, Shape(grad.shape[1], x.shape[1])).sqrt()


def _shape(grad: Tensor, x: Tensor | None) -> Shape:
    """Return the shape of the weight."""
    return Shape(grad.shape[1], grad.shape[0] if x is None else x.shape[1])


def wipe(
    candidates: Tensor, gains: Tensor, active: Tensor, top: Tensor, where: Tensor | None = None
) -> None:
    """Empty what a recorder holds, in place, ``where`` that is so: nothing waits to know it."""
    where = torch.ones((), dtype=torch.bool, device=gains.device) if where is None else where
    for tensor, empty in ((gains, -torch.inf), (top, -torch.inf), (active, 0), (candidates, 0)):
        tensor.masked_fill_(where, empty)


def _observe(
    candidates: Tensor,
    gains: Tensor,
    active: Tensor,
    top: Tensor,
    status: Tensor,
    armed: Tensor,
    grad: Tensor,
    x: Tensor | None,
    indices: Tensor,
    structure: str,
) -> None:
    if not armed:
        return
    grad = grad.reshape(-1, grad.shape[-1])
    x = None if x is None else x.reshape(-1, x.shape[-1])
    shape = _shape(grad, x)
    kind = parse_structure(structure)
    slots = kind.slots(indices, shape).long()
    listed, known, lists = candidates.long(), gains.float(), gains.shape[1]  # may be bfloat16
    best, gain = torch.zeros_like(listed), torch.full_like(known, -torch.inf)
    total, largest = (
        active.to(torch.float32, copy=True),
        torch.full_like(top, -torch.inf, dtype=torch.float32),
    )
    finite = torch.ones((), dtype=torch.bool, device=grad.device)
    for group, first, scores in _slabs(kind, grad, x):
        rows, width = slice(group, group + scores.shape[0]), scores.shape[1]
        finite &= scores.isfinite().all()
        scores = F.pad(scores, (0, 1))  # a last column takes what does not belong to this slab
        at = _within(slots[rows], first, width)
        scores.scatter_add_(1, at, total[rows].masked_fill(at == width, 0.0))
        total[rows] = torch.where(at == width, total[rows], scores.gather(1, at))
        old = _within(listed[rows].masked_fill(known[rows].isinf(), -1), first, width)
        scores.scatter_(1, old, scores.gather(1, old) + known[rows])
        if largest.numel():
            pool = torch.cat([largest, scores[:, :width].reshape(-1)])
            largest = pool.topk(largest.numel()).values
        scores.scatter_(1, at, -torch.inf)
        pool = torch.cat([gain[rows], scores[:, :width]], dim=1)
        gain[rows], places = pool.topk(lists, dim=1)
        best[rows] = torch.where(
            places < lists,
            best[rows].gather(1, places.clamp_max(lists - 1)),
            first + places - lists,
        )
    for tensor, new in zip(
        (candidates, gains, active, top), (best, gain, total, largest), strict=True
    ):
        tensor.copy_(new)
    wipe(candidates, gains, active, top, where=~finite)
    status.fill_(POISONED).masked_fill_(finite, FINITE)


def _within(units: Tensor, first: int, width: int) -> Tensor:
    """Return the columns of ``units`` in a slab; ``width`` for those outside it."""
    columns = units - first
    return columns.masked_fill((columns < 0) | (columns >= width), width)


def _watch(
    y: Tensor,
    x: Tensor | None,
    armed: Tensor,
    candidates: Tensor,
    gains: Tensor,
    active: Tensor,
    top: Tensor,
    status: Tensor,
    indices: Tensor,
    structure: str,
) -> Tensor:
    del x, armed, candidates, gains, active, top, status, indices, structure
    return y.clone()


def _watch_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    _, x, ctx.armed, *ctx.written, indices, ctx.structure = inputs
    # Not saved what ``observe`` writes to: a module used twice would trip the version check.
    ctx.save_for_backward(x, indices)


def _watch_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, indices = ctx.saved_tensors
    torch.ops.padst.observe(*ctx.written, ctx.armed, grad, x, indices, ctx.structure)
    return (grad, *[None] * 9)


torch.library.custom_op(
    "padst::observe",
    _observe,
    mutates_args=("candidates", "gains", "active", "top", "status"),
    tags=(torch.Tag.cudagraph_unsafe,),  # it reads ``armed``: a replay would not
).register_fake(lambda *args: None)
_WATCH = torch.library.custom_op("padst::watch", _watch, mutates_args=())
_WATCH.register_fake(lambda y, *args: torch.empty_like(y))
_WATCH.register_autograd(_watch_backward, setup_context=_watch_setup)
