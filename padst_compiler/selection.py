"""Soft choice of units: DynaDiag's differentiable top-K over all wrapped diagonals."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["SoftSelection"]


class SoftSelection(nn.Module):
    """Scale every unit by ``alpha~ = clamp(K softmax(alpha / T), 0, 1)`` while K are chosen.

    Source: DynaDiag (arXiv 2506.11449; formula and start from its published code). ``alpha``
    starts at ``1 / units``; T lives in a buffer, so that cooling it compiles nothing again.

    Args:
        units: number of candidates, all of which the layer stores.
        kept: K.
        device: of the layer.

    Example:
        >>> SoftSelection(4, kept=2)(torch.ones(1, 4, 3))[0, :, 0].tolist()
        [0.5, 0.5, 0.5, 0.5]
    """

    temperature: Tensor

    def __init__(self, units: int, kept: int, device: torch.device | None = None) -> None:
        """Start even: every unit has the same share."""
        super().__init__()
        self.kept = kept
        self.alpha = nn.Parameter(torch.full((units,), 1.0 / units, device=device))
        self.register_buffer("temperature", torch.ones((), device=device))

    def weights(self) -> Tensor:
        """Return ``alpha~``: ``(units,)``."""
        shares = torch.softmax(self.alpha.float() / self.temperature.float(), dim=0)
        return (self.kept * shares).clamp(0.0, 1.0)

    def forward(self, values: Tensor) -> Tensor:
        """Return ``values (1, units, ...)``, each unit scaled by its weight."""
        return values * self.weights().to(values.dtype)[None, :, None]

    @torch.no_grad()
    def hard(self) -> Tensor:
        """Return the K units with the largest ``alpha``, ascending; ties go to the first."""
        order = self.alpha.argsort(descending=True, stable=True)
        return order[: self.kept].sort().values

    def extra_repr(self) -> str:
        """Name K and the number of units."""
        return f"{self.kept} of {self.alpha.numel()}"
