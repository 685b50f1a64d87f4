"""RigL: drop the weakest units, grow those with the largest gradient (arXiv 1911.11134).

A layer drops its ``n_drop`` weakest units wherever they are, then every group grows as many as it
lost. So k per group never changes: SRigL's layer-wide drop under a constant fan-in (arXiv
2305.02299, section 3), for every structure. A unit that stays keeps its slot; so slots need not be
sorted.

A unit that was just dropped may grow back at once. It then never left: its slot is not ``changed``
and its weights stay, as in the published code of RigL.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from padst_compiler.methods.base import Job, Method
from padst_compiler.methods.slots import Regrown, fill, weakest

__all__ = ["RigL", "rigl"]


@dataclass(frozen=True)
class RigL(Method):
    """Grow by the dense gradient, seen at update steps only.

    RigL replaces the gradient step by the update; here it follows the step, so that every optimiser
    works unchanged.
    """

    name: ClassVar[str] = "rigl"
    waits: ClassVar[bool] = False
    records: ClassVar[bool] = True

    def move(self, job: Job) -> Tensor:
        """Drop by the units' norms, grow by their gradients' norms."""
        slots, layer, seen = job.slots, job.layer, job.seen
        scores = layer.structure.slot_scores(layer.values, layer.shape)
        n_drop = int(job.drop * slots.numel())
        return job.replace(*rigl(scores, slots, n_drop, seen.candidates, seen.gains, seen.active))


def rigl(
    scores: Tensor, slots: Tensor, n_drop: int, candidates: Tensor, gains: Tensor, active: Tensor
) -> Regrown:
    """Drop the weakest units; grow those with the largest gradient.

    Args:
        scores: ``(g, k)``, the strength of the kept units; larger is stronger.
        slots: ``(g, k)``, the kept units.
        n_drop: how many units the layer drops.
        candidates: ``(g, k)``, units not kept, the best of each group; their order is free.
        gains: ``(g, k)``, the gradient scores of ``candidates``, >= 0.
        active: ``(g, k)``, the gradient scores of ``slots``, >= 0: a dropped unit competes again.

    A score that is not finite never wins over one that is; where no gain is finite, nothing
    changes. Ties: the earlier slot drops, and a dropped unit stays before another one grows. RigL
    (arXiv 1911.11134) breaks ties by noise instead, which would cost reproducibility.

    Example:
        >>> new = rigl(
        ...     scores=torch.tensor([[3.0, 1.0], [2.0, 4.0]]),
        ...     slots=torch.tensor([[0, 5], [1, 2]]),
        ...     n_drop=1,
        ...     candidates=torch.tensor([[7, 3], [0, 3]]),
        ...     gains=torch.tensor([[9.0, 1.0], [9.0, 9.0]]),
        ...     active=torch.zeros(2, 2),
        ... )
        >>> new.slots.tolist(), new.changed.tolist()
        ([[0, 7], [1, 2]], [[False, True], [False, False]])
    """
    dropped = weakest(scores, n_drop)
    kept = slots.shape[1]
    # Below every real score, which is >= 0: a dropped unit of unknown gain, then a candidate, then
    # what stays anyway. So a group always finds as many units as it lost, at worst its own.
    back = active.masked_fill(~active.isfinite(), -1.0).masked_fill(~dropped, -torch.inf)
    pool = torch.cat([back, gains.masked_fill(~gains.isfinite(), -2.0)], dim=1)
    best = pool.argsort(dim=1, descending=True, stable=True)
    ranks = torch.arange(2 * kept, device=slots.device).expand_as(best)
    grows = torch.zeros_like(pool, dtype=torch.bool)
    grows.scatter_(1, best, ranks < dropped.sum(dim=1, keepdim=True))
    grown = (~grows[:, kept:]).flatten().int().argsort(stable=True)  # a mask would have to be read
    return fill(slots, dropped & ~grows[:, :kept], candidates.flatten()[grown])
