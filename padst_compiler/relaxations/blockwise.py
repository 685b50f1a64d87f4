"""Block-wise permutations: features move within blocks of neighbours only."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from padst_compiler.relaxations.base import FactoredPermutation

__all__ = ["BlockwisePermutation"]


class BlockwisePermutation(FactoredPermutation):
    """``diag(P_1, ..., P_G)``, each ``b x b`` (PermLLM, arXiv 2510.10136).

    PermLLM's numbers: blocks of 64, 5 Sinkhorn steps, a temperature that falls to a tenth. It runs
    a linear assignment in every forward pass and passes the gradient straight through; here the
    blocks stay soft until they harden, as every other form, so that a step needs no assignment on
    the CPU. A global shuffle is out of its reach: it is a baseline.

    Args:
        size: the number of features.
        generator: of the start, on the CPU.
        block: b, which divides ``size``; by default the largest divisor of up to 64.
        settings: as ``FactoredPermutation`` takes them.

    Raises:
        ValueError: ``block`` does not divide ``size``.

    Example:
        >>> BlockwisePermutation(768, torch.Generator().manual_seed(0)).logits[0].shape
        torch.Size([12, 64, 64])
    """

    name: ClassVar[str] = "blockwise"
    option = "block"
    annealing = 10.0
    default_iterations = 5

    def __init__(
        self,
        size: int,
        generator: torch.Generator,
        *,
        block: int | None = None,
        factors: int = 1,
        **settings: Any,
    ) -> None:
        """Check that the block divides the size."""
        if reason := self.refusal(size, block):
            raise ValueError(reason)
        block = _largest(size) if block is None else block
        super().__init__(size, generator, block=block, factors=factors, **settings)

    @classmethod
    def refusal(cls, size: int, option: int | None = None) -> str | None:
        """Return why blocks of ``option`` do not tile ``size`` features, or None."""
        if option is not None and (option < 1 or size % option):
            return (
                f"Expected a block that divides {size}. Got {option}. "
                f"Use blockwise:{_largest(size)}, or blockwise for the largest up to 64."
            )
        return None

    @classmethod
    def count(cls, size: int, option: int | None = None) -> int:
        """Return the numbers of all blocks."""
        return size * (option or _largest(size))


def _largest(size: int) -> int:
    return next(b for b in range(min(size, 64), 0, -1) if size % b == 0)
