"""SRigL: RigL under a constant fan-in, with dynamic ablation of neurons (arXiv 2305.02299).

Steps 1 to 7 of an update, per layer, as published (section 3, and the published code):

1. ``n_prune = int(nnz f)``, ``n_keep = nnz - n_prune``, at most the weights that are not zero.
2. Drop by |w|, grow by |dense gradient|.
3. A weight is *salient* among the n_keep largest |w| or the n_prune largest |g| of the layer. A
   neuron with fewer salient weights than ``max(1, int(gamma_sal k))`` is ablated. It may come back
   at a later update: its gradient still counts.
4. ``k' = floor(numbers / neurons left)``.
5. Keep the n_keep largest |w| of the neurons left, none that is zero, at most k' of each.
6. Every neuron grows the largest |g| among what it does not keep, to k'. What was dropped just now
   may come back, with its weight; others start at zero.
7. The optimiser's memory follows the weights.

Where a neuron keeps too many, the published code truncates by sorting a boolean mask, so chance
decides which stay; here the largest magnitudes do. Zero gradients are never salient. The gradient
lists that a recorder holds are finite: a neuron grows to at most four times the width it has, so
the neurons that stay are at least as many as that needs, next to the published minimum
``floor(numbers / inputs)``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from padst_compiler.layers import SparseLayer
from padst_compiler.methods.base import Job, Method
from padst_compiler.methods.slots import weakest
from padst_compiler.schedule import Schedule
from padst_compiler.structures import NM, FanIn, Shape
from padst_compiler.topology import width_of

__all__ = ["Lists", "SRigL", "least_salient", "salient_counts", "topology"]

REACH = 4
"""How many times wider a neuron may become at one update."""


class Lists(NamedTuple):
    """One layer's units, ``g`` groups: kept ones ``(g, k)`` and the best others ``(g, w)``.

    ``slots`` is -1 and ``scores`` -inf in the groups of ablated neurons.
    """

    slots: Tensor
    scores: Tensor
    active: Tensor
    candidates: Tensor
    gains: Tensor


@dataclass(frozen=True)
class SRigL(Method):
    """Keep fan-in constant over the neurons that are left, on ``fan_in`` and ``nm``.

    A compiled step compiles again whenever another number of neurons is left, and torch goes eager
    after ``torch._dynamo.config.recompile_limit`` such changes (8 by default): raise it for long
    runs. Without ablation nothing compiles again.

    N:M groups are filled like neurons, ``n' = floor(numbers / groups left)``; with N given it
    stays N, and ablation lowers the number of weights.

    Args:
        ablation: whether neurons that have too few salient weights leave the computation.
        gamma_sal: that share of k (0.3 for CNNs, 0.95 for ViT), or, from 1 on, that number.
        spare: names of layers that are never ablated; by default the model's last sparse layer.

    Raises:
        ValueError: ``gamma_sal`` is not above 0.

    Example:
        >>> SRigL(gamma_sal=0.95).threshold(77)
        73
    """

    name: ClassVar[str] = "srigl"
    records: ClassVar[bool] = True
    ablates: ClassVar[bool] = True
    ablation: bool = True
    gamma_sal: float = 0.3
    spare: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        """Check the share."""
        if not 0.0 < self.gamma_sal < math.inf:
            raise ValueError(
                f"Expected gamma_sal above 0. Got {self.gamma_sal}. "
                "Use 0.3, or ablation=False to keep every neuron."
            )

    def refusal(self, layers: Mapping[str, SparseLayer]) -> str | None:
        """Other structures have no neurons of their own width; spared names must exist."""
        for name, layer in layers.items():
            if not isinstance(layer.structure, (FanIn, NM)):
                return (
                    f"Expected structure fan_in or nm in {name or 'the model'} for srigl. "
                    f"Got {layer.structure.name}. Use method 'rigl', which is for every structure."
                )
        if unknown := sorted(set(self.spare or ()) - layers.keys()):
            return (
                f"Expected names of sparse layers in spare. Got {unknown[0]!r}. "
                f"Use {', '.join(map(repr, list(layers)[:3]))}, say."
            )
        return super().refusal(layers)

    def threshold(self, k: int) -> int:
        """Return how many salient weights a neuron of fan-in ``k`` needs."""
        share = self.gamma_sal * k if self.gamma_sal < 1.0 else self.gamma_sal
        return max(1, int(share))

    def record(self, layer: SparseLayer, schedule: Schedule) -> tuple[int, int]:
        """Ask for lists as long as a neuron may grow, and for the layer's largest gradients."""
        if not self.ablation and not layer.ablated:
            return layer.kept, 0
        candidates = layer.structure.table(layer.shape)[1]
        most = int(schedule.drop_fraction * layer.values.numel()) + 1
        return min(candidates, REACH * layer.kept), min(most, layer.shape.numel)

    def move(self, job: Job) -> float:
        """Ablate, drop and grow; move the weights to where they are stored now."""
        layer, seen = job.layer, job.seen
        scores = layer.values.new_full(job.slots.shape, -torch.inf, dtype=torch.float32)
        packed = layer.packed()
        old = layer.structure.slot_scores(packed.values, packed.shape)
        scores[job.slots[:, 0] >= 0] = old
        lists = Lists(job.slots, scores, seen.active, seen.candidates, seen.gains)
        n_prune = int(job.drop * old.numel())
        n_keep = min(old.numel() - n_prune, int((old > 0).sum()))
        neurons, limit = layer.shape.out_features, layer.values.numel()
        left = torch.ones(neurons, dtype=torch.bool, device=old.device)
        spared = job.last if self.spare is None else job.name in self.spare
        if self.ablation and not spared:
            counts = salient_counts(lists, n_keep, n_prune, seen.top, neurons)
            per_neuron = lists.slots.shape[0] // neurons
            fewest = max(
                limit // layer.shape.in_features,
                math.ceil(limit / (per_neuron * lists.gains.shape[1])),
            )
            left = ~least_salient(counts, self.threshold(limit // neurons), fewest)
        shape = Shape(int(left.sum()), layer.shape.in_features)
        units, source = topology(lists, left, n_keep, width_of(layer.structure, limit, shape))
        self._store(layer, job, left, units, source)
        return (source < 0).float().mean().item()

    def _store(
        self, layer: SparseLayer, job: Job, left: Tensor, units: Tensor, source: Tensor
    ) -> None:
        rows = left.nonzero()[:, 0]
        whole = source.new_full((layer.values.numel(),), -1)
        whole[: source.numel()] = source.reshape(-1)
        layer.store(units, None if bool(left.all()) else rows)
        job.memory.move(layer.values, whole)


def salient_counts(lists: Lists, n_keep: int, n_prune: int, top: Tensor, neurons: int) -> Tensor:
    """Return the number of salient weights of each neuron: ``(neurons,)``, step 3.

    Args:
        lists: of the layer.
        n_keep: how many of the largest |w| are salient.
        n_prune: how many of the largest |g| are.
        top: the largest |g| of the layer, ``n_prune`` or more.
        neurons: of the layer, ablated or not.
    """
    strong = ~weakest(lists.scores, lists.scores.numel() - n_keep)
    limit = top.topk(n_prune).values.min() if n_prune else top.new_tensor(torch.inf)
    limit = limit.clamp_min(torch.finfo(top.dtype).tiny)  # a gradient of zero is not salient
    kept = strong | ((lists.active >= limit) & (lists.slots >= 0))
    return kept.view(neurons, -1).sum(dim=1) + (lists.gains >= limit).view(neurons, -1).sum(dim=1)


def least_salient(counts: Tensor, threshold: int, fewest: int) -> Tensor:
    """Return which neurons are ablated: ``(neurons,)``, bool; at least ``fewest`` stay.

    Example:
        >>> least_salient(torch.tensor([0, 5, 2, 2]), threshold=3, fewest=2).tolist()
        [True, False, False, False]
    """
    fewest = min(max(1, fewest), counts.numel())
    last = int(counts.sort(descending=True).values[fewest - 1])
    return counts < min(threshold, last)


def topology(lists: Lists, left: Tensor, n_keep: int, width: int) -> tuple[Tensor, Tensor]:
    """Drop and grow, steps 5 and 6.

    Args:
        lists: of the layer.
        left: ``(neurons,)``, bool: which are not ablated now.
        n_keep: how many of the largest |w| the layer keeps at most.
        width: k', how many units each group keeps.

    Returns:
        The units ``(groups left, k')``, and where each one's weight is stored now, counted over
        the kept units of neurons that are not ablated; -1 for a new one.
    """
    groups, kept = lists.slots.shape
    here = left.repeat_interleave(groups // left.numel())
    scores = lists.scores.masked_fill(~here[:, None], -torch.inf)
    strong = ~weakest(scores, scores.numel() - n_keep) & (scores > 0)
    rank = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    strong &= rank < width
    missing = torch.where(here, width - strong.sum(dim=1), 0)
    back = lists.active.masked_fill(strong | (lists.slots < 0), -torch.inf)
    pool = torch.cat([back, lists.gains], dim=1)
    order = pool.argsort(dim=1, descending=True, stable=True)
    chosen = torch.zeros_like(pool, dtype=torch.bool)
    places = torch.arange(pool.shape[1], device=pool.device).expand_as(order)
    chosen.scatter_(1, order, places < missing[:, None])
    chosen[:, :kept] |= strong
    at = (~chosen).int().argsort(dim=1, stable=True)[here, :width]
    units = torch.cat([lists.slots, lists.candidates], dim=1)[here].gather(1, at)
    stored = (lists.slots[:, 0] >= 0).cumsum(0) - 1
    source = torch.where(at < kept, stored[here][:, None] * kept + at, -1)
    return units, source
