"""Low-rank logits and Sinkhorn's scaling: ``2 n m`` parameters, and never the whole matrix."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from padst_compiler.index_map import IndexMap
from padst_compiler.permutation import SoftPermutation, decode, sinkhorn
from padst_compiler.relaxations.streaming import CHUNK, moments, potential, product

__all__ = ["KISSING", "LowRankPermutation", "default_rank", "kissing_rank"]

KISSING = (
    *(2, 6, 12, 24, 40, 72, 126, 240, 306, 500, 582, 840),
    *(1154, 1606, 2564, 4320, 5346, 7398, 10668, 17400, 27720, 49896, 93150, 196560),
)
"""Lower bounds of the kissing numbers of 1 to 24 dimensions (Conway and Sloane's table): so many
unit vectors fit with all inner products at most 1/2, so each can tell its own from all others."""


def kissing_rank(size: int) -> int:
    """Return the smallest dimension whose kissing number is at least ``size``.

    Source: Kissing to Find a Match (Droge et al., NeurIPS 2023). Beyond 196,560: 25.

    Example:
        >>> [kissing_rank(n) for n in (768, 1024, 4096, 8192, 11008)]
        [12, 13, 16, 19, 20]
    """
    return next((m for m, most in enumerate(KISSING, 1) if most >= size), len(KISSING) + 1)


def default_rank(size: int) -> int:
    """Return the kissing rank rounded up to 16 or 32; at most ``size``.

    Example:
        >>> [default_rank(n) for n in (8, 768, 4096, 8192)]
        [8, 16, 16, 32]
    """
    return min(size, 16 if kissing_rank(size) <= 16 else 32)


class LowRankPermutation(SoftPermutation):
    """``Sinkhorn(alpha V U^T)`` with unit rows in V and U, ``(size, rank)`` each.

    Row softmax alone gives the published invalid permutations; a few Sinkhorn steps mend that. They
    start from ``shift``, the potential that ``balance`` found last. The saved tensor ``alpha``
    starts at 3, which is near uniform, and a controller anneals it to 30. M is streamed
    (``streaming``): forward and backward hold some rows of it only. ``soft()`` alone forms all.

    Args:
        size: the number of features, n.
        generator: of the start, on the CPU.
        rank: m; by default ``default_rank(size)``.
        alpha: factor on the cosines at the start.
        iterations: Sinkhorn steps.
        scale: size of an entry at the start, so that optimisers may use the weights' rate.
        chunk: numbers of M that exist at once.
        device: of the factors.

    Raises:
        ValueError: a rank below 1.

    Example:
        >>> soft = LowRankPermutation(768, torch.Generator().manual_seed(0))
        >>> sum(p.numel() for p in soft.parameters()), soft(torch.ones(2, 768)).shape
        (24576, torch.Size([2, 768]))
    """

    name: ClassVar[str] = "low_rank"
    option = "rank"
    annealing = 10.0
    alpha: Tensor
    shift: Tensor

    def __init__(
        self,
        size: int,
        generator: torch.Generator,
        *,
        rank: int | None = None,
        alpha: float = 3.0,
        iterations: int = 5,
        scale: float = 0.1,
        chunk: int = CHUNK,
        device: torch.device | None = None,
    ) -> None:
        """Start near uniform: directions are random."""
        super().__init__()
        if reason := self.refusal(size, rank):
            raise ValueError(reason)
        self.size, self.iterations, self.chunk = size, iterations, chunk
        self.rank = default_rank(size) if rank is None else rank
        starts = [scale * torch.randn(size, self.rank, generator=generator) for _ in range(2)]
        self.rows, self.columns = (nn.Parameter(start.to(device)) for start in starts)
        self.register_buffer("alpha", torch.tensor(float(alpha), device=device))
        self.register_buffer("shift", torch.zeros(size, device=device))

    @classmethod
    def refusal(cls, size: int, option: int | None = None) -> str | None:
        """Return why there is no such rank, or None."""
        del size
        if option is not None and option < 1:
            return f"Expected a rank of at least 1. Got {option}. Use low_rank for the default."
        return None

    @classmethod
    def count(cls, size: int, option: int | None = None) -> int:
        """Return ``2 n m``."""
        return 2 * size * (option or default_rank(size))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``M x`` along the last axis, without M."""
        return product(x, *self._scaled(), self.chunk)

    def soft(self) -> Tensor:
        """Return M, float32: all of it, with what autograd keeps of it."""
        left, right, a, b = self._scaled()
        with torch.autocast(left.device.type, enabled=False):
            return torch.exp(left @ right.t() + a[:, None] + b)

    def norms(self) -> tuple[Tensor, Tensor]:
        """Return l1 and l2 of every row, then of every column, of M, without M."""
        sums, squares = moments(*self._scaled(), self.chunk)
        return sums, squares.clamp_min(1e-30).sqrt()

    @torch.no_grad()
    def sharpen(self, factor: float) -> None:
        """Multiply ``alpha``, and the potential that goes with it."""
        self.alpha.mul_(factor)
        self.shift.mul_(factor)

    @torch.no_grad()
    def balance(self, tolerance: float = 0.01, limit: int = 200) -> None:
        """Find the potential that makes columns sum to 1 too; Sinkhorn starts from it from now on.

        Args:
            tolerance: how far a sum may be from 1.
            limit: Sinkhorn steps at most.
        """
        left, right = self._directions()
        a, b = self.shift.float(), torch.full_like(self.shift, torch.inf, dtype=torch.float32)
        for _ in range(limit):
            before, b = b, potential(right, left, a, self.chunk)
            a = potential(left, right, b, self.chunk)
            if bool(((before - b).expm1().abs() <= tolerance).all()):
                break
        self.shift.copy_(a)

    @torch.no_grad()
    def harden(self) -> IndexMap:
        """Return the index map: argmax where that is a permutation, else linear assignment."""
        left, right = (factor.double() for factor in self._directions())
        log = left @ right.t() + self.shift.double()[:, None]
        return decode(sinkhorn(log, 8 * self.iterations))

    def settings(self) -> dict[str, float]:
        """Return the rank and the number of Sinkhorn steps."""
        return {"rank": self.rank, "iterations": self.iterations}

    def _directions(self) -> tuple[Tensor, Tensor]:
        left = F.normalize(self.rows.float(), dim=1) * self.alpha.float()
        return left, F.normalize(self.columns.float(), dim=1)

    def _scaled(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the two factors of the logits and both potentials."""
        left, right = self._directions()
        a = self.shift.float()
        for _ in range(self.iterations):
            b = potential(right, left, a, self.chunk)
            a = potential(left, right, b, self.chunk)
        return left, right, a, b
