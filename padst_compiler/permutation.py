"""Permutations of a layer's input or output: soft while they are learned, then index maps.

One contract: ``forward`` applies the permutation to the last axis; a soft one also answers
``soft()`` (a doubly stochastic matrix), ``penalty()``, ``gap()`` and ``harden()``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from padst_compiler.index_map import IndexMap

__all__ = [
    "GAP_LIMIT",
    "FixedPermutation",
    "Permutation",
    "SinkhornPermutation",
    "decode",
    "gaps",
    "penalty",
    "sinkhorn",
]

GAP_LIMIT = 1.0 - 1.0 / math.sqrt(2.0)
"""Below this gap in every row and column, argmax is a permutation: 0.2929.

``max_j M_ij >= ||M_i||_2^2 > 1/2`` then holds in every row, and a column that sums to 1 has room
for one such entry only."""


def sinkhorn(logits: Tensor, iterations: int) -> Tensor:
    """Return a nearly doubly stochastic matrix: scale columns and rows in turn, in log space.

    Args:
        logits: ``(n, n)``.
        iterations: number of column and row steps; rows come last and sum to 1 exactly.

    Example:
        >>> sinkhorn(torch.zeros(4, 4), 2).sum(dim=0).tolist()
        [1.0, 1.0, 1.0, 1.0]
    """
    log = logits
    for _ in range(iterations):
        log = log - log.logsumexp(dim=0, keepdim=True)
        log = log - log.logsumexp(dim=1, keepdim=True)
    matrix: Tensor = log.exp()
    return matrix


def penalty(matrix: Tensor) -> Tensor:
    """Return P(M), the sum over rows and columns of ``l1 - l2`` (AutoShuffleNet, arXiv 1901.08624).

    On doubly stochastic matrices it is 0 exactly at permutations; at the uniform one it is
    ``2 n (1 - 1/sqrt n)``.

    Example:
        >>> round(penalty(torch.full((64, 64), 1 / 64)).item(), 3)
        112.0
    """
    magnitude = matrix.abs()
    l1 = magnitude.sum(dim=1).sum() + magnitude.sum(dim=0).sum()
    l2: Tensor = matrix.norm(dim=1).sum() + matrix.norm(dim=0).sum()
    return l1 - l2


def gaps(matrix: Tensor) -> Tensor:
    """Return ``1 - l2 / l1`` of every row, then of every column: ``(2 n,)``."""
    magnitude = matrix.abs()
    rows = matrix.norm(dim=1) / magnitude.sum(dim=1)
    columns = matrix.norm(dim=0) / magnitude.sum(dim=0)
    return 1.0 - torch.cat([rows, columns])


def decode(matrix: Tensor) -> IndexMap:
    """Return the permutation nearest to ``matrix``: argmax where proved, else linear assignment.

    Raises:
        ValueError: the matrix holds NaN or infinity.
    """
    exact = matrix.detach().double().cpu()
    if not bool(exact.isfinite().all()):
        raise ValueError(
            "Expected a finite soft permutation. Got NaN or infinity. "
            "Lower the learning rate of the logits, or resume from an earlier checkpoint."
        )
    best = exact.argmax(dim=1)
    if bool((best.bincount(minlength=best.numel()) == 1).all()):
        return IndexMap.of(best)
    from scipy.optimize import linear_sum_assignment  # here: it is slow to import

    return IndexMap.of(torch.from_numpy(linear_sum_assignment(exact.numpy(), maximize=True)[1]))


class Permutation(nn.Module):
    """A permutation of ``size`` features, applied to the last axis."""

    size: int
    is_soft: bool

    def matrix(self) -> Tensor:
        """Return the ``(size, size)`` matrix M of ``M x``."""
        raise NotImplementedError(f"{type(self).__name__} must say its matrix.")


class FixedPermutation(Permutation):
    """A hard permutation: one index map in a persistent buffer.

    Example:
        >>> FixedPermutation(IndexMap.of([1, 0]))(torch.tensor([5.0, 7.0])).tolist()
        [7.0, 5.0]
    """

    is_soft = False
    perm: Tensor

    def __init__(self, index_map: IndexMap, device: torch.device | None = None) -> None:
        """Store the map on ``device``."""
        super().__init__()
        self.size = index_map.size
        self.register_buffer("perm", index_map.perm.to(device, copy=True))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x[..., perm]``."""
        result: Tensor = torch.ops.padst.permute(x, self.perm)
        return result

    def matrix(self) -> Tensor:
        """Return the permutation matrix, float32."""
        return torch.eye(self.size, device=self.perm.device)[self.perm]

    def extra_repr(self) -> str:
        """Name the width."""
        return f"{self.size}, hard"


class SinkhornPermutation(Permutation):
    """A soft permutation: ``Sinkhorn(logits / temperature)``, learned with the layer.

    The start is near uniform: an identity start collapses under the penalty (83-100 % fixed
    points in planted experiments). Noise of one logit keeps pairs of features from staying tied
    at one half, a saddle of the penalty. ``temperature`` scales the logits so that optimisers may
    use the learning rate of the weights. Costs ``size^2`` parameters and one ``size x size``
    product per use while soft.

    Example:
        >>> soft = SinkhornPermutation(8, torch.Generator().manual_seed(0))
        >>> soft(torch.ones(2, 8)).shape
        torch.Size([2, 8])
    """

    is_soft = True

    def __init__(
        self,
        size: int,
        generator: torch.Generator,
        *,
        temperature: float = 0.1,
        iterations: int = 10,
        noise: float = 1.0,
        device: torch.device | None = None,
    ) -> None:
        """Start near uniform: logits over temperature are normal with deviation ``noise``."""
        super().__init__()
        self.size, self.temperature, self.iterations = size, temperature, iterations
        start = torch.randn(size, size, generator=generator) * (noise * temperature)
        self.logits = nn.Parameter(start.to(device))

    def soft(self) -> Tensor:
        """Return the doubly stochastic matrix M, float32."""
        return sinkhorn(self.logits.float() / self.temperature, self.iterations)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``M x`` along the last axis."""
        return x @ self.soft().to(x.dtype).t()

    def matrix(self) -> Tensor:
        """Return M."""
        return self.soft()

    def penalty(self) -> Tensor:
        """Return P(M), a scalar."""
        return penalty(self.soft())

    @torch.no_grad()
    def gap(self) -> float:
        """Return the worst gap of any row or column."""
        return float(gaps(self.soft()).max())

    @torch.no_grad()
    def balance(self, tolerance: float = 0.01, limit: int = 200) -> None:
        """Shift rows and columns of the logits until the columns of M sum to 1 as well.

        The fully converged M does not change. Without it two rows can share a column for ever: a
        few Sinkhorn steps from sharp logits do not tell one of them to move, and the gap stays at
        exactly 0.2929.

        Args:
            tolerance: how far a sum may be from 1.
            limit: Sinkhorn steps at most; usually two or three do.
        """
        log = self.logits.float() / self.temperature
        for _ in range(limit):
            log = log - log.logsumexp(dim=1, keepdim=True)
            columns = log.logsumexp(dim=0, keepdim=True)
            log = log - columns
            if bool((columns.expm1().abs() <= tolerance).all()):
                break
        self.logits.copy_(log * self.temperature)

    @torch.no_grad()
    def sharpen(self, factor: float) -> None:
        """Multiply the logits by ``factor > 1``: M moves towards their best assignment.

        Where the gap has decided, that is what it decodes to: each row's largest entry.
        """
        self.logits.mul_(factor)

    @torch.no_grad()
    def harden(self) -> IndexMap:
        """Return the index map: argmax where that is a permutation, else linear assignment."""
        return decode(sinkhorn(self.logits.double() / self.temperature, 4 * self.iterations))

    def extra_repr(self) -> str:
        """Name the width."""
        return f"{self.size}, soft, temperature={self.temperature}, iterations={self.iterations}"
