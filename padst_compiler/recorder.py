"""See the dense gradient of a sparse layer for a moment, without ever having a dense parameter.

RigL grows the units with the largest gradient, so it needs gradients of weights that do not exist.
A recorder stands behind a layer's product (``watch`` has its operators) and, while it is armed,
keeps a few numbers per kept unit.

``armed`` stays on the CPU: reading it never waits for a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from padst_compiler.layers import SparseLayer
from padst_compiler.structure_text import describe
from padst_compiler.watch import FINITE, POISONED, wipe

__all__ = ["Recorder"]


class Recorder(nn.Module):
    """Gradient scores of one layer: of its kept units and of the best units that it does not keep.

    Scores are ``structure.unit_scores`` of the dense gradient of S: a norm for blocks and
    diagonals, a magnitude for single weights. What several backward passes record while armed (a
    module used twice, gradients accumulated over micro-batches), precisely:

    * ``active (g, k)``: the sum over the passes of the scores of the kept units;
    * ``candidates (g, w)`` and ``gains (g, w)``: after each pass, the w units of a group, not
      kept, with the largest total. The total of a unit on the list so far is its gain plus this
      pass's score; of any other unit it is this pass's score alone. So a unit's gain is the sum
      over the passes since it last entered the list: after one pass, or where all units fit on the
      list, the sum over all.
    * ``top (n,)``: the n largest totals of the whole layer, of kept units and others.

    A sum of scores is at least the score of the summed gradient, which would need the dense
    gradient to be kept between passes. Gains of places without a candidate are ``-inf``. A pass
    with NaN or infinity anywhere wipes all that was recorded and sets ``status``; a pass after it
    starts anew (a gradient scaler skips the step in between).

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
    top: Tensor
    status: Tensor

    def __init__(self, layer: SparseLayer, width: int | None = None, top: int = 0) -> None:
        """Make room for ``layer``'s units; attach with ``layer.recorder = Recorder(layer)``.

        Args:
            layer: to be watched.
            width: w, by default as many as each group keeps.
            top: n.
        """
        super().__init__()
        # A tuple, for it must not be a submodule. Not the indices: ``Module.to`` replaces them.
        self._layer = (layer,)
        self.armed = torch.zeros((), dtype=torch.bool)  # no buffer: it stays on the CPU
        self._structure = describe(layer.structure)  # text, which an operator can take
        self.fit(width, top)

    def fit(self, width: int | None = None, top: int = 0) -> None:
        """Make room again, for the units that the layer keeps now, and forget everything."""
        (layer,) = self._layer
        slots = layer.structure.slots(layer.kept_units(), layer.shape)
        groups, kept = slots.shape
        lists = (groups, kept if width is None else width)
        room = {"candidates": slots.new_zeros(lists)}
        for name, shape in (("gains", lists), ("active", (groups, kept)), ("top", (top,))):
            room[name] = torch.zeros(shape, device=slots.device)
        room["status"] = slots.new_zeros(())
        for name, tensor in room.items():
            self.register_buffer(name, tensor, persistent=False)
        self._forget()

    def fits(self, width: int, top: int) -> bool:
        """Whether ``fit(width, top)`` would change nothing in size."""
        (layer,) = self._layer
        slots = layer.structure.slots(layer.kept_units(), layer.shape)
        lists = (slots.shape[0], width)
        return (
            self.active.shape == slots.shape
            and self.gains.shape == lists
            and self.top.numel() == top
        )

    def arm(self) -> None:
        """Forget everything, and record from the next backward pass on."""
        self._forget()
        self.armed.fill_(True)

    def disarm(self) -> None:
        """Stop recording; what was recorded stays."""
        self.armed.fill_(False)

    def _forget(self) -> None:
        wipe(self.candidates, self.gains, self.active, self.top)
        self.status.zero_()

    @property
    def has_seen(self) -> bool:
        """Whether a gradient was recorded since ``arm``, and all of it was finite."""
        return int(self.status) == FINITE

    @property
    def is_poisoned(self) -> bool:
        """Whether the last pass held NaN or infinity."""
        return int(self.status) == POISONED

    def forward(self, y: Tensor, x: Tensor | None) -> Tensor:
        """Return ``y``, and record while its gradient is computed.

        Args:
            y: ``(..., o)``, the structured product.
            x: ``(..., i)``, what the structured product read; None where ``y`` is ``S^T`` itself,
                of a layer that unpacks its weight.
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
            self.top,
            self.status,
            layer.kept_units(),
            self._structure,
        )
        return watched

    def extra_repr(self) -> str:
        """Say whether it records."""
        return f"armed={bool(self.armed)}"
