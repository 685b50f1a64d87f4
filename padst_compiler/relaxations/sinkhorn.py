"""Full logits and Sinkhorn's scaling: the reference, with ``n^2`` parameters."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from padst_compiler.index_map import IndexMap
from padst_compiler.permutation import SoftPermutation, decode, sinkhorn

__all__ = ["SinkhornPermutation", "balanced"]


def balanced(log: Tensor, tolerance: float = 0.01, limit: int = 200) -> Tensor:
    """Return logits with shifted rows and columns, whose exponentials sum to 1 along both.

    Args:
        log: ``(..., n, n)``.
        tolerance: how far a sum may be from 1.
        limit: Sinkhorn steps at most; usually two or three do.

    Example:
        >>> balanced(torch.tensor([[3.0, 0.0], [3.0, 0.0]])).exp().sum(dim=0).tolist()
        [1.0, 1.0]
    """
    for _ in range(limit):
        log = log - log.logsumexp(dim=-1, keepdim=True)
        columns = log.logsumexp(dim=-2, keepdim=True)
        log = log - columns
        if bool((columns.expm1().abs() <= tolerance).all()):
            break
    return log


class SinkhornPermutation(SoftPermutation):
    """A soft permutation: ``Sinkhorn(logits / temperature)``, learned with the layer.

    The start is near uniform: an identity start collapses under the penalty (83-100 % fixed
    points in planted experiments). Noise of one logit keeps pairs of features from staying tied
    at one half, a saddle of the penalty. ``temperature`` scales the logits so that optimisers may
    use the learning rate of the weights; it is a saved tensor, which a schedule may anneal. Costs
    ``size^2`` parameters and one ``size x size`` product per use while soft.

    Args:
        size: the number of features.
        generator: of the start; on the CPU, so that a seed gives one start on every device.
        temperature: of the logits.
        iterations: Sinkhorn steps. With 5, columns ran to sums of 0.5 and 1.9 in planted problems.
        noise: deviation of the start's logits over temperature.
        peak: share of every row and column that the start gives to one entry, those of a random
            permutation; 0 for none.
        device: of the logits.

    Example:
        >>> soft = SinkhornPermutation(8, torch.Generator().manual_seed(0))
        >>> soft(torch.ones(2, 8)).shape
        torch.Size([2, 8])
    """

    name: ClassVar[str] = "sinkhorn"
    folds = True
    temperature: Tensor

    def __init__(
        self,
        size: int,
        generator: torch.Generator,
        *,
        temperature: float = 0.1,
        iterations: int = 10,
        noise: float = 1.0,
        peak: float = 0.0,
        device: torch.device | None = None,
    ) -> None:
        """Start near uniform: logits over temperature are normal with deviation ``noise``."""
        super().__init__()
        if not 0.0 <= peak < 1.0:
            raise ValueError(f"Expected 0 <= peak < 1. Got {peak}. Use 0.4, or 0 for near uniform.")
        self.size, self.iterations = size, iterations
        start = torch.randn(size, size, generator=generator) * (noise * temperature)
        if peak > 0.0 and size > 1:
            others = (size - 1) * math.exp(noise**2 / 2.0)  # their exponentials, summed
            chosen = torch.randperm(size, generator=generator)
            start[torch.arange(size), chosen] = temperature * math.log(others * peak / (1.0 - peak))
        self.logits = nn.Parameter(start.to(device))
        self.register_buffer("temperature", torch.tensor(float(temperature), device=device))

    def log(self) -> Tensor:
        """Return the logits that Sinkhorn's scaling starts from, float32."""
        return self.logits.float() / self.temperature.float()

    def soft(self) -> Tensor:
        """Return the doubly stochastic matrix M, float32."""
        return sinkhorn(self.log(), self.iterations)

    @torch.no_grad()
    def balance(self) -> None:
        """Shift rows and columns of the logits until the columns of M sum to 1 as well.

        The fully converged M does not change. Without it two rows can share a column for ever: a
        few Sinkhorn steps from sharp logits do not tell one of them to move, and the gap stays at
        exactly 0.2929.
        """
        temperature = self.temperature.float()
        self.logits.copy_(balanced(self.logits.float() / temperature) * temperature)

    @torch.no_grad()
    def sharpen(self, factor: float) -> None:
        """Multiply the logits by ``factor > 1``: M moves towards their best assignment.

        Where the gap has decided, that is what it decodes to: each row's largest entry.
        """
        self.logits.mul_(factor)

    @torch.no_grad()
    def anneal(self, factor: float) -> None:
        """Divide the temperature by ``factor``."""
        self.temperature.div_(factor)

    @torch.no_grad()
    def harden(self) -> IndexMap:
        """Return the index map: argmax where that is a permutation, else linear assignment."""
        log = self.logits.double() / self.temperature.double()
        return decode(sinkhorn(log, 4 * self.iterations))

    def settings(self) -> dict[str, float]:
        """Return the number of Sinkhorn steps."""
        return {"iterations": self.iterations}
