"""See the dense gradient of a sparse layer for a moment, without ever having a dense parameter.

RigL grows the units with the largest gradient, so it needs gradients of weights that do not exist.

    forward    y = padst::watch(y, x, armed, ...)        # a copy of y
    backward   padst::observe(..., armed, dL/dy, x, ...) # if armed: scores of (dL/dy)^T x

``observe`` forms the dense gradient in slabs of at most ``SLAB`` numbers and keeps three numbers
per kept unit. Both operators are always in the graph and ``armed`` is a tensor, so a compiled
training step is not compiled again when recording starts or stops.

``armed`` stays on the CPU: reading it never waits for a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from padst_compiler.layers import SparseLayer
from padst_compiler.structures import STRUCTURES, Diagonal, Shape, Structure

__all__ = ["SLAB", "Recorder"]

SLAB = 2**20
"""Numbers of the dense gradient that exist at once (a row of blocks may be larger)."""

_KINDS: dict[str, type[Structure]] = {kind.name: kind for kind in STRUCTURES}


class Recorder(nn.Module):
    """Gradient scores of one layer: of its kept units and of the best units that it does not keep.

    Scores are ``structure.unit_scores`` of the dense gradient of S: a norm for blocks and
    diagonals, a magnitude for single weights. What several backward passes record while armed (a
    module used twice, gradients accumulated over micro-batches), precisely:

    * ``active (g, k)``: the sum over the passes of the scores of the kept units;
    * ``candidates (g, k)`` and ``gains (g, k)``: after each pass, the k units of a group, not
      kept, with the largest total. The total of a unit on the list so far is its gain plus this
      pass's score; of any other unit it is this pass's score alone. So a unit's gain is the sum
      over the passes since it last entered the list: after one pass, or where all units fit on the
      list, the sum over all.

    A sum of scores is at least the score of the summed gradient, which would need the dense
    gradient to be kept between passes. A candidate whose total is not finite is left out, and
    gains of places without a candidate are ``-inf``. A kept unit's score may become NaN; growth
    then treats it as unknown.

    The buffers are not saved with the model; ``DynamicSparsity.state_dict`` holds them when needed.

    Example:
        >>> from padst_compiler.layers import SparseLinear
        >>> from padst_compiler.structures import FanIn
        >>> start = torch.tensor([[0], [1]], dtype=torch.int32)
        >>> layer = SparseLinear.adopt(nn.Linear(3, 2), FanIn(), start, None, "input")
        >>> layer.recorder = Recorder(layer)
        >>> layer.recorder.arm()
        >>> layer(torch.tensor([[1.0, 5.0, 3.0]])).sum().backward()
        >>> layer.recorder.candidates.tolist(), layer.recorder.gains.tolist()
        ([[1], [2]], [[5.0], [3.0]])
    """

    armed: Tensor
    candidates: Tensor
    gains: Tensor
    active: Tensor

    def __init__(self, layer: SparseLayer) -> None:
        """Make room for ``layer``'s units; attach with ``layer.recorder = Recorder(layer)``."""
        super().__init__()
        slots = layer.structure.slots(layer.indices, layer.shape)
        # A tuple, for it must not be a submodule. Not the indices: ``Module.to`` replaces them.
        self._layer = (layer,)
        self.armed = torch.zeros((), dtype=torch.bool)  # no buffer: it stays on the CPU
        scores = torch.zeros(slots.shape, device=slots.device)
        self.register_buffer("candidates", torch.zeros_like(slots), persistent=False)
        self.register_buffer("gains", scores - torch.inf, persistent=False)
        self.register_buffer("active", scores, persistent=False)

    def arm(self) -> None:
        """Forget everything, and record from the next backward pass on."""
        self.gains.fill_(-torch.inf)
        self.active.zero_()
        self.candidates.zero_()
        self.armed.fill_(True)

    def disarm(self) -> None:
        """Stop recording; what was recorded stays."""
        self.armed.fill_(False)

    @property
    def has_seen(self) -> bool:
        """Whether a finite gradient of any unit, kept or not, was recorded since ``arm``."""
        return bool((self.gains.isfinite() | (self.active > 0)).any())

    def forward(self, y: Tensor, x: Tensor) -> Tensor:
        """Return ``y``, and record while its gradient is computed.

        Args:
            y: ``(..., o)``, the structured product.
            x: ``(..., i)``, what the structured product read.
        """
        if not torch.compiler.is_compiling() and not self.armed:
            return y
        (layer,) = self._layer
        watched: Tensor = torch.ops.padst.watch(
            y,
            x,
            self.armed,
            self.candidates,
            self.gains,
            self.active,
            layer.indices,
            layer.structure.name,
        )
        return watched

    def extra_repr(self) -> str:
        """Say whether it records."""
        return f"armed={bool(self.armed)}"


def _slabs(structure: Structure, grad: Tensor, x: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """Yield the table of unit scores in pieces: first group, first candidate, ``(g', c')``.

    Args:
        structure: of the layer, with its sizes.
        grad: ``(t, o)``.
        x: ``(t, i)``.
    """
    shape = Shape(grad.shape[1], x.shape[1])
    groups, candidates = structure.table(shape)
    if isinstance(structure, Diagonal):
        yield 0, 0, _diagonal_scores(structure, grad, x)
        return
    # Tables follow the rows of the weight, so a slab of rows is a run of the table; a unit of
    # several weights may need all the rows of its group.
    rows = shape.out_features // groups if structure.unit(shape) else 1
    rows *= max(1, SLAB // (rows * shape.in_features))
    for start in range(0, shape.out_features, rows):
        scores = structure.unit_scores(grad[:, start : start + rows].t() @ x)
        first = start * groups * candidates // shape.out_features
        yield first // candidates, first % candidates, scores


def _diagonal_scores(structure: Diagonal, grad: Tensor, x: Tensor) -> Tensor:
    """Return the norms of all diagonals of ``grad^T x``: ``(1, candidates)``.

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
        squares += structure.unit_scores(slab).roll(-start, dims=1).square()
    return squares.sqrt()


def _observe(
    candidates: Tensor,
    gains: Tensor,
    active: Tensor,
    armed: Tensor,
    grad: Tensor,
    x: Tensor,
    indices: Tensor,
    structure: str,
) -> None:
    if not armed:
        return
    grad, x = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
    shape = Shape(grad.shape[1], x.shape[1])
    kind = _KINDS[structure].of_storage(indices, shape)
    slots = kind.slots(indices, shape).long()
    listed, known = candidates.long(), gains.float()  # float: the module may be bfloat16
    best, gain = torch.zeros_like(listed), torch.full_like(known, -torch.inf)
    for group, first, scores in _slabs(kind, grad, x):
        rows, width = slice(group, group + scores.shape[0]), scores.shape[1]
        scores = F.pad(scores, (0, 1))  # a last column takes what does not belong to this slab
        at = _within(slots[rows], first, width)
        active[rows] += scores.gather(1, at).masked_fill(at == width, 0.0)
        old = _within(listed[rows].masked_fill(known[rows].isinf(), -1), first, width)
        scores.scatter_(1, old, scores.gather(1, old) + known[rows])
        scores.scatter_(1, at, -torch.inf)
        scores = scores[:, :width].masked_fill(~scores[:, :width].isfinite(), -torch.inf)
        pool = torch.cat([gain[rows], scores], dim=1)
        gain[rows], places = pool.topk(slots.shape[1], dim=1)
        fresh = first + places - slots.shape[1]
        best[rows] = torch.where(
            places < slots.shape[1],
            best[rows].gather(1, places.clamp_max(slots.shape[1] - 1)),
            fresh,
        )
    candidates.copy_(best)
    gains.copy_(gain)


def _within(units: Tensor, first: int, width: int) -> Tensor:
    """Return the columns of ``units`` in a slab; ``width`` for those outside it."""
    columns = units - first
    return columns.masked_fill((columns < 0) | (columns >= width), width)


def _watch(
    y: Tensor,
    x: Tensor,
    armed: Tensor,
    candidates: Tensor,
    gains: Tensor,
    active: Tensor,
    indices: Tensor,
    structure: str,
) -> Tensor:
    del x, armed, candidates, gains, active, indices, structure
    return y.clone()


def _watch_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    _, x, ctx.armed, ctx.candidates, ctx.gains, ctx.active, indices, ctx.structure = inputs
    # Not saved what ``observe`` writes to: a module used twice would trip the version check.
    ctx.save_for_backward(x, indices)


def _watch_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, indices = ctx.saved_tensors
    torch.ops.padst.observe(
        ctx.candidates, ctx.gains, ctx.active, ctx.armed, grad, x, indices, ctx.structure
    )
    return (grad, None, None, None, None, None, None, None)


torch.library.custom_op(
    "padst::observe",
    _observe,
    mutates_args=("candidates", "gains", "active"),
    tags=(torch.Tag.cudagraph_unsafe,),  # it reads ``armed``: a replay would not
).register_fake(lambda *args: None)
_WATCH = torch.library.custom_op("padst::watch", _watch, mutates_args=())
_WATCH.register_fake(lambda y, *args: torch.empty_like(y))
_WATCH.register_autograd(_watch_backward, setup_context=_watch_setup)
