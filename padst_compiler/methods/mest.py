"""MEST: drop the units with the least |w| + lambda |g|, grow others at random (NeurIPS 2021)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from padst_compiler.methods.base import Job, Method
from padst_compiler.methods.slots import swap_for_random

__all__ = ["Mest"]


@dataclass(frozen=True)
class Mest(Method):
    """Drop by ``|w| + weight |g|``, g the gradient that the optimiser's step used; grow at random.

    A unit of several weights counts by the norm of these sums. MEST's soft memory bound (grow more
    than stays, prune back later) is left out: the number of stored weights never changes here.

    Args:
        weight: lambda; 0.01 as in published code.

    Raises:
        ValueError: the weight is negative or not finite.
    """

    name: ClassVar[str] = "mest"
    weight: float = 0.01

    def __post_init__(self) -> None:
        """Check the weight."""
        if not 0.0 <= self.weight < math.inf:
            raise ValueError(
                f"Expected a finite weight of at least 0. Got {self.weight}. Use 0.01."
            )

    def move(self, job: Job) -> Tensor:
        """Drop by weights and gradients, grow at random."""
        slots, layer = job.slots, job.layer
        strength = layer.values.detach().abs()
        if layer.values.grad is not None:
            strength = strength + self.weight * layer.values.grad.abs()
        scores = layer.structure.slot_scores(strength, layer.shape)
        candidates, n_drop = layer.structure.table(layer.shape)[1], int(job.drop * slots.numel())
        return job.replace(*swap_for_random(scores, slots, n_drop, candidates, job.generator))
