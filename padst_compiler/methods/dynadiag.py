"""DynaDiag: learn which diagonals to keep, by a soft top-K over all of them (arXiv 2506.11449)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from padst_compiler.layers import SparseLayer
from padst_compiler.methods.base import Job, Method
from padst_compiler.methods.gmp import keep
from padst_compiler.schedule import Schedule

__all__ = ["DynaDiag", "cosine"]


@dataclass(frozen=True)
class DynaDiag(Method):
    """Train all ``max(o, i)`` diagonals, each scaled by ``alpha~``, then freeze the K best.

    Make the model with ``sparsify(structure="dynadiag", sparsity=0.9)``. ``alpha~ = clamp(K
    softmax(alpha / T), 0, 1)`` (``selection.SoftSelection``); T falls by a cosine until the
    freeze. There the K largest alpha stay with their values as they are and ``alpha~ = 1``, as in
    the published code; storage becomes compact, alpha leaves the optimiser, and a compiled step
    compiles once more. Until then the layer has dense parameters: that is the method.

    Args:
        freeze: share of ``total_steps`` after which the choice is hard (README: 30 of 100 epochs).
        hot: T at the start.
        cold: T at the freeze.
        l1: weight of the penalty, the mean over soft layers of ``sum(alpha~) / K``. The paper's
            weight is not known.

    Raises:
        ValueError: an option is out of its range.
    """

    name: ClassVar[str] = "dynadiag"
    freeze: float = 0.3
    hot: float = 5.0
    cold: float = 0.05
    l1: float = 0.01

    def __post_init__(self) -> None:
        """Check every option."""
        if not 0.0 < self.freeze < 1.0:
            raise ValueError(
                f"Expected 0 < freeze < 1, a share of total_steps. Got {self.freeze}. Use 0.3."
            )
        if not 0.0 < self.cold <= self.hot < math.inf:
            raise ValueError(
                f"Expected 0 < cold <= hot, temperatures. Got {self.cold} and {self.hot}. "
                "Use 0.05 and 5.0."
            )
        if not 0.0 <= self.l1 < math.inf:
            raise ValueError(f"Expected a finite l1 of at least 0. Got {self.l1}. Use 0.01.")

    def refusal(self, layers: Mapping[str, SparseLayer]) -> str | None:
        """At least one layer must choose its diagonals softly."""
        if all(layer.selection is None for layer in layers.values()):
            return (
                "Expected soft diagonals for dynadiag. Got none. "
                "Use sparsify(model, structure='dynadiag'), or method 'rigl' on hard diagonals."
            )
        return None

    def updates_at(self, step: int, schedule: Schedule) -> bool:
        """From the freeze on: a layer whose gradients were not finite freezes later."""
        return step >= self.freeze * schedule.total_steps

    def move(self, job: Job) -> float | None:
        """Freeze one layer."""
        layer, selection = job.layer, job.layer.selection
        if selection is None:
            return None
        chosen = selection.hard()
        layer.selection = None
        job.memory.drop(selection.alpha)
        keep(layer, job.memory, chosen[None])
        return 1.0 - chosen.numel() / selection.alpha.numel()

    @torch.no_grad()
    def advance(self, layers: Mapping[str, SparseLayer], step: int, schedule: Schedule) -> None:
        """Cool the soft layers."""
        now = cosine(step, self.freeze * schedule.total_steps, self.hot, self.cold)
        for layer in layers.values():
            if layer.selection is not None:
                layer.selection.temperature.fill_(now)

    def penalty(self, layers: Mapping[str, SparseLayer]) -> Tensor | None:
        """Return ``l1 * mean(sum(alpha~) / K)``."""
        soft = [s for layer in layers.values() if (s := layer.selection) is not None]
        if not soft:
            return None
        shares = [selection.weights().sum() / selection.kept for selection in soft]
        return self.l1 * torch.stack([share.to(shares[0].device) for share in shares]).mean()


def cosine(step: float, end: float, start: float, final: float) -> float:
    """Return a value that falls from ``start`` to ``final`` at ``end`` as a half cosine.

    Example:
        >>> [cosine(t, 10, 5.0, 1.0) for t in (0, 5, 10, 20)]
        [5.0, 3.0, 1.0, 1.0]
    """
    share = min(1.0, step / end)
    return final + (start - final) * (1.0 + math.cos(math.pi * share)) / 2.0
