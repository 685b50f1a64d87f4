"""AutoShuffleNet's form: magnitudes divided by column sums, then by row sums."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from padst_compiler.index_map import IndexMap
from padst_compiler.permutation import SoftPermutation, decode
from padst_compiler.relaxations.sinkhorn import balanced

__all__ = ["AutoShufflePermutation"]


class AutoShufflePermutation(SoftPermutation):
    """``|A|`` divided by its column sums, then by its row sums; no gradient through the sums.

    AutoShuffleNet (Lyu et al. 2019, arXiv 1901.08624) trains M itself by SGD and scales it back
    towards the constraints; the division inside the forward pass is the public variant of it
    (ADEPT). Its penalty P(M) is ``SoftPermutation.penalty``. Only one column and one row step: the
    columns sum to 1 nearly, and the penalty sees by how much they do not.

    The start is near uniform. The variant's own, a noisy identity, collapses under the penalty.

    Args:
        size: the number of features.
        generator: of the start, on the CPU.
        scale: of the magnitudes at the start, so that optimisers may use the weights' rate.
        noise: relative deviation of the start.
        device: of the magnitudes.

    Example:
        >>> soft = AutoShufflePermutation(8, torch.Generator().manual_seed(0))
        >>> bool((soft.soft().sum(dim=1) - 1.0).abs().max() < 1e-6)
        True
    """

    name: ClassVar[str] = "autoshuffle"
    folds = True

    def __init__(
        self,
        size: int,
        generator: torch.Generator,
        *,
        scale: float = 0.1,
        noise: float = 0.5,
        device: torch.device | None = None,
    ) -> None:
        """Start near uniform: all magnitudes ``scale``, with noise."""
        super().__init__()
        self.size = size
        start = scale * (1.0 + noise * torch.randn(size, size, generator=generator))
        self.magnitudes = nn.Parameter(start.to(device))

    def soft(self) -> Tensor:
        """Return M, float32; its rows sum to 1."""
        return _normalised(self.magnitudes.float())

    @torch.no_grad()
    def sharpen(self, factor: float) -> None:
        """Raise M to the power ``factor``, entry by entry, and the magnitudes' size by ``factor``.

        So the steps of an optimiser matter less and less: at a fixed size, an Adam step of 0.01 on
        every zero kept the gap near 0.1 for ever.
        """
        self._become(self.soft().clamp_min(1e-30).log() * factor, factor)

    @torch.no_grad()
    def balance(self) -> None:
        """Scale rows and columns until both sum to 1: the paper's projection, carried through."""
        self._become(balanced(self.soft().clamp_min(1e-30).log()))

    @torch.no_grad()
    def harden(self) -> IndexMap:
        """Return the index map: argmax where that is a permutation, else linear assignment."""
        return decode(_normalised(self.magnitudes.double()))

    def settings(self) -> dict[str, float]:
        """Return nothing: all is in the magnitudes."""
        return {}

    def _become(self, log: Tensor, growth: float = 1.0) -> None:
        """Take ``exp(log)`` with ``growth`` times the mean magnitude, and the signs, of before."""
        matrix, mean = log.softmax(dim=1), self.magnitudes.float().abs().mean()
        signs = torch.where(self.magnitudes < 0, -1.0, 1.0)
        self.magnitudes.copy_(matrix * signs * (growth * mean * self.size))


def _normalised(raw: Tensor) -> Tensor:
    matrix = raw.abs()
    matrix = matrix / matrix.sum(dim=0, keepdim=True).detach()
    return matrix / matrix.sum(dim=1, keepdim=True).detach()
