"""Growth rules: which units of a layer are dropped, and which grow in their place.

Pure functions on *slots*, the kept candidates of every group: ``slots (g, k)``, one row per group
(see ``structures.base``). A layer drops its ``n_drop`` weakest units wherever they are, then every
group grows as many as it lost. So k per group never changes: SRigL's layer-wide drop under a
constant fan-in (arXiv 2305.02299, section 3; without its ablation of neurons), for every
structure. A unit that stays keeps its slot; so slots need not be sorted.

A unit that was just dropped may grow back at once. It then never left: its slot is not ``changed``
and its weights stay, as in the published code of RigL.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["METHODS", "Regrown", "rigl", "set_"]

METHODS = ("rigl", "set")


class Regrown(NamedTuple):
    """New slots ``(g, k)``, and which of them hold another unit than before ``(g, k)``, bool."""

    slots: Tensor
    changed: Tensor


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
    dropped = _weakest(scores, n_drop)
    kept = slots.shape[1]
    # Below every real score, which is >= 0: a dropped unit of unknown gain, then a candidate, then
    # what stays anyway. So a group always finds as many units as it lost, at worst its own.
    back = torch.where(active.isfinite(), active, -1.0).masked_fill(~dropped, -torch.inf)
    pool = torch.cat([back, torch.where(gains.isfinite(), gains, -2.0)], dim=1)
    best = pool.argsort(dim=1, descending=True, stable=True)
    ranks = torch.arange(2 * kept, device=slots.device).expand_as(best)
    grows = torch.zeros_like(pool, dtype=torch.bool)
    grows.scatter_(1, best, ranks < dropped.sum(dim=1, keepdim=True))
    return _fill(slots, dropped & ~grows[:, :kept], candidates[grows[:, kept:]])


def set_(
    scores: Tensor, slots: Tensor, n_drop: int, candidates: int, generator: torch.Generator
) -> Regrown:
    """Drop the weakest units; grow others uniformly at random.

    Args:
        scores: ``(g, k)``, the strength of the kept units; larger is stronger.
        slots: ``(g, k)``, the kept units.
        n_drop: how many units the layer drops.
        candidates: number of candidates of each group.
        generator: on the CPU, so that every device grows the same units.

    SET (Mocanu et al. 2018) drops a constant share; here the share follows the schedule. Memory is
    in the order of the kept units: no table over all candidates is made.

    Example:
        >>> slots = torch.tensor([[0, 1], [2, 3]])
        >>> scores = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> set_(scores, slots, 1, 1000, torch.Generator().manual_seed(0)).slots[:, 1].tolist()
        [1, 3]
    """
    dropped = _weakest(scores, n_drop)
    if slots.shape[1] == candidates or n_drop == 0:
        return Regrown(slots.clone(), torch.zeros_like(dropped))
    group = torch.arange(slots.shape[0], device=slots.device)[:, None]
    keys = group * candidates + slots.long()  # one number per unit of the layer, sorted by group
    owner = dropped.nonzero()[:, 0]
    old = keys[dropped]
    stay = keys[~dropped].sort().values
    lost = dropped.sum(dim=1)
    free = candidates - slots.shape[1] + lost  # positions of each group that may grow
    ranks = _distinct(owner, free[owner], candidates, generator)

    # Unit of rank r among those not kept: r plus the kept units before it. Of the sorted kept units
    # p_0 < p_1 < ... of a group, p_i lies before it exactly where p_i - i <= r.
    staying = slots.shape[1] - lost
    starts = staying.cumsum(0) - staying
    within = torch.arange(stay.numel(), device=stay.device) - starts[stay // candidates]
    wanted = owner * candidates + ranks
    before = torch.searchsorted(stay - within, wanted, right=True) - starts[owner]
    grown = wanted + before

    opened = dropped.masked_scatter(dropped, ~torch.isin(old, grown))
    return _fill(slots, opened, grown[~torch.isin(grown, old)] % candidates)


def _weakest(scores: Tensor, n_drop: int) -> Tensor:
    """Mark the ``n_drop`` lowest scores of the layer; NaN counts as strong."""
    order = scores.flatten().argsort(stable=True)
    dropped = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    dropped[order[:n_drop]] = True
    return dropped.view(scores.shape)


def _fill(slots: Tensor, opened: Tensor, units: Tensor) -> Regrown:
    """Put ``units`` into the opened slots; both are ordered by group, with equal counts."""
    return Regrown(slots.masked_scatter(opened, units.to(slots.dtype)), opened)


def _distinct(owner: Tensor, below: Tensor, stride: int, generator: torch.Generator) -> Tensor:
    """Draw ``0 <= rank < below``, no two equal for one owner; every such set is as likely."""
    ranks = torch.zeros_like(owner)
    pending = torch.arange(owner.numel(), device=owner.device)
    while pending.numel():
        draw = torch.rand(pending.numel(), generator=generator, dtype=torch.float64)
        ranks[pending] = (draw.to(owner.device) * below[pending]).long()
        ordered, order = (owner * stride + ranks).sort(stable=True)
        pending = order[1:][ordered[1:] == ordered[:-1]]
    return ranks
