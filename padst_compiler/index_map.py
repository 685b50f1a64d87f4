"""Integer permutations of one axis.

Legend: ``y = x[..., perm]``, that is ``(P x)_j = x_{perm[j]}``; ``perm`` is an int64 tensor of
shape ``(n,)``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["BlockSplit", "IndexMap", "invert"]


def invert(perm: Tensor) -> Tensor:
    """Return the inverse of a permutation.

    Args:
        perm: integer tensor of shape ``(n,)``.

    Example:
        >>> invert(torch.tensor([2, 0, 1])).tolist()
        [1, 2, 0]
    """
    positions = torch.arange(perm.numel(), dtype=perm.dtype, device=perm.device)
    return torch.empty_like(perm).scatter(0, perm.long(), positions)


@dataclass(frozen=True)
class BlockSplit:
    """A map that moves whole blocks and shuffles within them.

    ``perm[j * b + c] == outer[j] * b + inner[j, c]``: the part that a block structure absorbs.
    """

    outer: Tensor  # (n / b,)
    inner: Tensor  # (n / b, b)


@dataclass(frozen=True)
class IndexMap:
    """One permutation of ``n`` features with the algebra that passes need.

    Example:
        >>> swap = IndexMap.of([1, 0, 3, 2])
        >>> swap.then(swap).is_identity
        True
        >>> IndexMap.of([1, 2, 3, 0]).shift
        1
    """

    perm: Tensor

    @classmethod
    def of(cls, perm: Tensor | list[int]) -> IndexMap:
        """Check and wrap a permutation.

        Raises:
            ValueError: ``perm`` is not a permutation of ``0 .. n-1``.
        """
        given = torch.as_tensor(perm).detach()
        table = given.to(device="cpu", dtype=torch.int64, copy=True)
        whole = not (given.is_floating_point() or given.is_complex())
        if (
            not whole
            or table.dim() != 1
            or not torch.equal(table.sort().values, torch.arange(table.numel()))
        ):
            raise ValueError(
                f"Expected a permutation of 0..n-1 in one dimension. Got {_preview(table)}. "
                "Pass each index once."
            )
        return cls(table)

    @property
    def size(self) -> int:
        """Number of features."""
        return self.perm.numel()

    @property
    def is_identity(self) -> bool:
        """Whether nothing moves."""
        return bool(torch.equal(self.perm, torch.arange(self.size)))

    @property
    def inverse(self) -> IndexMap:
        """The map that undoes this one."""
        return IndexMap(invert(self.perm))

    @property
    def shift(self) -> int | None:
        """``s`` where ``perm[j] == (j + s) mod n``, else None."""
        offset = int(self.perm[0])
        rolled = (torch.arange(self.size) + offset) % self.size
        return offset if torch.equal(self.perm, rolled) else None

    def then(self, other: IndexMap) -> IndexMap:
        """Compose: first this map, then ``other`` (``x[self.perm][other.perm]``)."""
        return IndexMap(self.perm[other.perm])

    def blocks(self, side: int) -> BlockSplit | None:
        """Split into a movement of whole blocks and shuffles within them, or None."""
        if self.size % side:
            return None
        table = self.perm.view(-1, side)
        outer = table.div(side, rounding_mode="floor")
        if not bool((outer == outer[:, :1]).all()):
            return None
        return BlockSplit(outer[:, 0].contiguous(), table % side)


def _preview(table: Tensor) -> str:
    values = table.flatten()[:8].tolist()
    return f"shape {tuple(table.shape)} starting {values}"
