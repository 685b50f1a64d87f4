"""SET: drop the weakest units, grow others at random (Mocanu et al. 2018)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from padst_compiler.methods.base import Job, Method
from padst_compiler.methods.slots import swap_for_random

__all__ = ["SET"]


@dataclass(frozen=True)
class SET(Method):
    """Grow uniformly at random.

    SET drops a constant share; here the share follows the schedule, as in RigL.
    """

    name: ClassVar[str] = "set"

    def move(self, job: Job) -> Tensor:
        """Drop by the units' norms, grow at random."""
        slots, layer = job.slots, job.layer
        scores = layer.structure.slot_scores(layer.values, layer.shape)
        candidates, n_drop = layer.structure.table(layer.shape)[1], int(job.drop * slots.numel())
        return job.replace(*swap_for_random(scores, slots, n_drop, candidates, job.generator))
