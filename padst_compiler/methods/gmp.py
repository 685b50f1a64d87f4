"""GMP: gradual magnitude pruning with a cubic schedule (Zhu and Gupta, arXiv 1710.01878)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from padst_compiler.layers import SparseLayer
from padst_compiler.memory import Memory
from padst_compiler.methods.base import Job, Method
from padst_compiler.schedule import Schedule

__all__ = ["GMP", "cubic", "keep"]


@dataclass(frozen=True)
class GMP(Method):
    """Start with more units than asked for and prune the smallest, never to grow any.

    Make the model with ``SparseConfig(sparsity=0.9, start_sparsity=0.0)``. Every group keeps its
    largest units by norm, the same number in each. Compact storage shrinks at each update, so a
    compiled step compiles again at each: its shapes are other ones, which cannot be helped.

    An update that gradients with NaN prevented is made up for by the next.

    Args:
        start: share of ``total_steps`` before which nothing is pruned.

    Raises:
        ValueError: ``start`` is not a share below 1.
    """

    name: ClassVar[str] = "gmp"
    start: float = 0.0

    def __post_init__(self) -> None:
        """Check the share."""
        if not 0.0 <= self.start < 1.0:
            raise ValueError(
                f"Expected 0 <= start < 1, a share of total_steps. Got {self.start}. Use 0.0."
            )

    def refusal(self, layers: Mapping[str, SparseLayer]) -> str | None:
        """Every layer must know where it starts and ends."""
        for name, layer in layers.items():
            if layer.config is None or layer.config.start_sparsity is None:
                return (
                    f"Expected a start_sparsity in {name or 'the model'} for gmp. Got none. "
                    "Use sparsify(model, SparseConfig(sparsity=0.9, start_sparsity=0.0))."
                )
        return None

    def updates_at(self, step: int, schedule: Schedule) -> bool:
        """At every update, and from the end on, when the last is due at any step."""
        due = step % schedule.update_every == 0 or step >= schedule.end_step
        return due and step >= self.start * schedule.total_steps

    def move(self, job: Job) -> float | None:
        """Prune to this step's sparsity; None where that is reached."""
        layer, schedule = job.layer, job.schedule
        config = layer.config
        begin = min(self.start * schedule.total_steps, schedule.end_step)
        sparsity = cubic(job.step, begin, schedule.end_step, config.start_sparsity, config.sparsity)
        width, kept = layer.structure.kept(layer.shape, sparsity), layer.kept
        if width >= kept:
            return None
        scores = layer.structure.slot_scores(layer.values, layer.shape)
        best = scores.argsort(dim=1, descending=True, stable=True)[:, :width]
        keep(layer, job.memory, best.sort(dim=1).values)
        return 1.0 - width / kept


def cubic(step: float, begin: float, end: float, start: float, final: float) -> float:
    """Return ``s_f + (s_i - s_f) (1 - (t - t_0) / (t_end - t_0))^3``, constant outside.

    Args:
        step: t.
        begin: t_0.
        end: the step of the last update.
        start: s_i.
        final: s_f.

    Example:
        >>> [round(cubic(t, 0, 100, 0.0, 0.8), 3) for t in (0, 50, 100, 200)]
        [0.0, 0.7, 0.8, 0.8]
    """
    if step >= end:
        return final
    left = 1.0 - max(0.0, step - begin) / (end - begin)
    return float(final + (start - final) * left**3)


def keep(layer: SparseLayer, memory: Memory, places: Tensor) -> None:
    """Keep some units of each group only; the storage shrinks and the Parameter stays.

    Args:
        layer: without ablated neurons.
        memory: of its optimiser.
        places: ``(g, k')``, the slots that stay, int64.
    """
    structure, shape = layer.structure, layer.shape
    groups, width = places.shape
    units = structure.slots(layer.indices, shape).gather(1, places)
    kept, size = layer.kept, layer.values.numel() // (groups * layer.kept)
    rows = torch.arange(groups, device=places.device)[:, None] * kept + places
    source = rows[..., None] * size + torch.arange(size, device=places.device)
    layout = structure.index_shape(shape, width)
    memory.shrink(layer.values, source, (*layout, *structure.unit(shape)))
    layer.indices = units.view(layout).contiguous()
