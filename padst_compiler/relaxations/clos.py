"""Clos networks: two or three block-diagonal factors with stride shuffles between them."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch

from padst_compiler.relaxations.base import FactoredPermutation

__all__ = ["ClosPermutation"]


class ClosPermutation(FactoredPermutation):
    """``D_3 K^T D_2 K D_1`` with blocks of about ``sqrt n``: about ``3 n^1.5`` numbers.

    Three factors reach every permutation of ``n = b r`` features (a rearrangeable Clos network);
    two do not. Fewer numbers than ``n^2`` and fewer operations than one ``n x n`` product, but more
    local minima: expect less of it than of the full forms (method: planted problems of
    ``benchmarks/planted.py``).

    Args:
        size: the number of features; not a prime.
        generator: of the start, on the CPU.
        factors: 2 or 3.
        block: b; by default the divisor of ``size`` nearest to its root.
        settings: as ``FactoredPermutation`` takes them.

    Raises:
        ValueError: ``size`` does not factor, or another number of factors.

    Example:
        >>> soft = ClosPermutation(64, torch.Generator().manual_seed(0))
        >>> [tuple(logits.shape) for logits in soft.logits], soft(torch.ones(2, 64)).shape
        ([(8, 8, 8), (8, 8, 8), (8, 8, 8)], torch.Size([2, 64]))
    """

    name: ClassVar[str] = "clos"
    option = "factors"

    def __init__(
        self,
        size: int,
        generator: torch.Generator,
        *,
        factors: int = 3,
        block: int | None = None,
        **settings: Any,
    ) -> None:
        """Check that the size factors."""
        if reason := self.refusal(size, factors):
            raise ValueError(reason)
        block = _near_root(size) if block is None else block
        super().__init__(size, generator, block=block, factors=factors, **settings)

    @classmethod
    def refusal(cls, size: int, option: int | None = None) -> str | None:
        """Return why ``size`` features have no such factors, or None."""
        if option is not None and option not in (2, 3):
            return f"Expected clos:2 or clos:3. Got {option} factors. Use clos:3."
        if _near_root(size) in (1, size):
            return f"Expected a width with divisors for clos. Got {size}. Use low_rank there."
        return None

    @classmethod
    def count(cls, size: int, option: int | None = None) -> int:
        """Return the numbers of all blocks."""
        block = _near_root(size)
        return sum(size * (size // block if at % 2 else block) for at in range(option or 3))


def _near_root(size: int) -> int:
    divisors = [d for d in range(1, size + 1) if size % d == 0]
    return min(divisors, key=lambda d: abs(math.log(d * d / size)))
