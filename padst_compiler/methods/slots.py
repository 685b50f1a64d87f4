"""Arithmetic on slots ``(g, k)``, the kept candidates of every group (see ``structures.base``)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Regrown", "fill", "swap_for_random", "weakest"]


class Regrown(NamedTuple):
    """New slots ``(g, k)``, and which of them hold another unit than before ``(g, k)``, bool."""

    slots: Tensor
    changed: Tensor


def weakest(scores: Tensor, n_drop: int) -> Tensor:
    """Mark the ``n_drop`` lowest scores of the layer; ties go by place, NaN counts as strong.

    Example:
        >>> weakest(torch.tensor([[3.0, 1.0], [1.0, 2.0]]), 1).tolist()
        [[False, True], [False, False]]
    """
    order = scores.flatten().argsort(stable=True)
    dropped = torch.zeros(scores.numel(), dtype=torch.bool, device=scores.device)
    dropped.scatter_(0, order[:n_drop], True)
    return dropped.view(scores.shape)


def fill(slots: Tensor, opened: Tensor, units: Tensor) -> Regrown:
    """Put ``units`` into the opened slots, both ordered by group; what is left over is not used."""
    return Regrown(slots.masked_scatter(opened, units.to(slots.dtype)), opened)


def swap_for_random(
    scores: Tensor, slots: Tensor, n_drop: int, candidates: int, generator: torch.Generator
) -> Regrown:
    """Drop the weakest units; grow others uniformly at random, as many in each group.

    Args:
        scores: ``(g, k)``, the strength of the kept units; larger is stronger.
        slots: ``(g, k)``, the kept units.
        n_drop: how many units the layer drops.
        candidates: number of candidates of each group.
        generator: on the CPU, so that every device grows the same units.

    Memory is in the order of the kept units: no table over all candidates is made.

    Example:
        >>> slots = torch.tensor([[0, 1], [2, 3]])
        >>> scores = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> generator = torch.Generator().manual_seed(0)
        >>> swap_for_random(scores, slots, 1, 1000, generator).slots[:, 1].tolist()
        [1, 3]
    """
    dropped = weakest(scores, n_drop)
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
    return fill(slots, opened, grown[~torch.isin(grown, old)] % candidates)


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
