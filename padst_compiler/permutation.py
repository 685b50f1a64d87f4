"""Permutations of a layer's input or output: soft while they are learned, then index maps.

One contract: ``forward`` applies the permutation to the last axis. A soft one, ``SoftPermutation``,
also says how far it is from a permutation, and hardens; its parametrisations are in
``relaxations/``, one file each.
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor, nn

from padst_compiler.index_map import IndexMap

__all__ = [
    "GAP_LIMIT",
    "FixedPermutation",
    "Permutation",
    "SoftPermutation",
    "decode",
    "gaps",
    "norms",
    "penalty",
    "sinkhorn",
]

GAP_LIMIT = 1.0 - 1.0 / math.sqrt(2.0)
"""Below this gap in every row and column, argmax is a permutation: 0.2929.

``max_j M_ij >= ||M_i||_2^2 > 1/2`` then holds in every row, and a column that sums to 1 has room
for one such entry only."""


def sinkhorn(logits: Tensor, iterations: int) -> Tensor:
    """Return a nearly doubly stochastic matrix: scale columns and rows in turn.

    The first step is in log space, where no exponential can overflow. The others scale its result
    by one vector for the columns and one for the rows, which costs a product with a vector each: 3
    to 5 times faster, forward and backward, than to stay in log space. A column whose sum
    underflows stays empty, where log space would fill it slowly; ``balanced`` does that.

    Args:
        logits: ``(..., n, n)``.
        iterations: number of column and row steps; rows come last and sum to 1 exactly.

    Example:
        >>> sinkhorn(torch.zeros(4, 4), 2).sum(dim=0).tolist()
        [1.0, 1.0, 1.0, 1.0]
    """
    log = logits - logits.logsumexp(dim=-2, keepdim=True)
    matrix: Tensor = (log - log.logsumexp(dim=-1, keepdim=True)).exp()
    if iterations == 1:
        return matrix
    rows, smallest = torch.ones_like(matrix[..., :1]), torch.finfo(matrix.dtype).tiny ** 0.75
    columns = rows
    with torch.autocast(matrix.device.type, enabled=False):  # sums of thousands, in full precision
        for _ in range(iterations - 1):
            columns = 1.0 / (matrix.transpose(-2, -1) @ rows).clamp_min(smallest)
            rows = 1.0 / (matrix @ columns)
    return rows * matrix * columns.transpose(-2, -1)


def norms(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the l1 and the l2 norm of every row, then of every column: two of ``(2 n,)``.

    Args:
        matrix: ``(n, n)``, or a batch ``(..., n, n)`` whose norms stand one after the other.
    """
    magnitude = matrix.abs()
    l1 = torch.cat([magnitude.sum(dim=-1).flatten(), magnitude.sum(dim=-2).flatten()])
    l2 = torch.cat([matrix.norm(dim=-1).flatten(), matrix.norm(dim=-2).flatten()])
    return l1, l2


def penalty(matrix: Tensor) -> Tensor:
    """Return P(M), the sum over rows and columns of ``l1 - l2`` (AutoShuffleNet, arXiv 1901.08624).

    On doubly stochastic matrices it is 0 exactly at permutations; at the uniform one it is
    ``2 n (1 - 1/sqrt n)``.

    Example:
        >>> round(penalty(torch.full((64, 64), 1 / 64)).item(), 3)
        112.0
    """
    l1, l2 = norms(matrix)
    return l1.sum() - l2.sum()


def gaps(matrix: Tensor) -> Tensor:
    """Return ``1 - l2 / l1`` of every row, then of every column: ``(2 n,)``."""
    l1, l2 = norms(matrix)
    return 1.0 - l2 / l1


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


class SoftPermutation(Permutation):
    """A permutation while it is learned: a point between permutations, with parameters.

    A parametrisation gives ``name``, ``soft``, ``sharpen``, ``harden`` and ``settings``; the rest
    follows, or is overridden where a cheaper way exists. All its parameters are learned. Numbers
    that change during the training are tensors, so that a compiled step stays compiled.
    """

    name: ClassVar[str]
    annealing: ClassVar[float] = 1.0
    """Factor by which the controller sharpens it between step 0 and the end of the updates."""
    folds: ClassVar[bool] = False
    """Whether it may be multiplied into a weight: where ``soft()`` is what ``forward`` costs."""
    option: ClassVar[str] = ""
    """The constructor's argument that stands behind the colon in its text form, as in clos:3."""
    is_soft = True

    @classmethod
    def refusal(cls, size: int, option: int | None = None) -> str | None:
        """Return why it cannot permute ``size`` features with the number in its text, or None."""
        del size, option
        return None

    @classmethod
    def count(cls, size: int, option: int | None = None) -> int:
        """Return how many numbers it learns for ``size`` features."""
        del option
        return size * size

    def soft(self) -> Tensor:
        """Return the doubly stochastic matrix M, ``(size, size)``, float32; differentiable."""
        raise NotImplementedError(f"{type(self).__name__} must say its matrix.")

    def sharpen(self, factor: float) -> None:
        """Move M towards the assignment that it decodes to; ``factor > 1``, in place."""
        raise NotImplementedError(f"{type(self).__name__} must say how it sharpens.")

    def harden(self) -> IndexMap:
        """Return the index map: argmax where that is a permutation, else linear assignment."""
        raise NotImplementedError(f"{type(self).__name__} must say how it hardens.")

    def settings(self) -> dict[str, float]:
        """Return the constructor's arguments that a file must hold, besides the tensors."""
        raise NotImplementedError(f"{type(self).__name__} must say its settings.")

    def forward(self, x: Tensor) -> Tensor:
        """Return ``M x`` along the last axis."""
        return x @ self.soft().to(x.dtype).t()

    def matrix(self) -> Tensor:
        """Return M."""
        return self.soft()

    def norms(self) -> tuple[Tensor, Tensor]:
        """Return l1 and l2 of every row, then column, of M; or of its factors, one by one."""
        return norms(self.soft())

    def penalty(self) -> Tensor:
        """Return P(M), a scalar: the sum of ``l1 - l2``."""
        l1, l2 = self.norms()
        return l1.sum() - l2.sum()

    @torch.no_grad()
    def gaps(self) -> Tensor:
        """Return ``1 - l2 / l1`` for each of ``norms()``."""
        l1, l2 = self.norms()
        return 1.0 - l2 / l1

    def gap(self) -> float:
        """Return the worst gap of any row or column."""
        return float(self.gaps().max())

    @torch.no_grad()
    def anneal(self, factor: float) -> None:
        """Sharpen as part of a schedule, by ``factor`` for one step."""
        self.sharpen(factor)

    @torch.no_grad()
    def balance(self) -> None:
        """Make the columns of M sum to 1 again; what it converges to does not change."""

    @torch.no_grad()
    def resample(self) -> None:
        """Draw new noise, where there is any; the controller calls it after every step."""

    def extra_repr(self) -> str:
        """Name the width, the form and its numbers."""
        buffers = {n: b for n, b in self.named_buffers() if b.dim() == 0 and not b.is_meta}
        numbers = {n: b.item() for n, b in buffers.items()} | self.settings()
        return ", ".join([f"{self.size}, soft", *(f"{n}={v:.4g}" for n, v in numbers.items())])
