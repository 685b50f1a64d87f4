"""The augmented Lagrangian of ADEPT: a multiplier per row and column in the place of one lambda."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["RHO", "Multipliers"]

RHO = 0.1
"""Step of the multipliers, and weight of the squares, as ADEPT sets it."""


class Multipliers:
    """Multipliers ``lam`` of soft permutations, by name, all 0 at the start.

    With ``d = l1 - l2`` of every row and column, the penalty is the mean of
    ``lam (d + rho / 2 d^2)``, and an update adds ``rho (d + rho / 2 d^2)`` to ``lam``. ADEPT sums
    where this takes a mean, so that it compares with P(M) / (2 N) for every width; and when ADEPT
    updates is not known: here a controller does at every look.

    Example:
        >>> multipliers = Multipliers()
        >>> parts = torch.tensor([1.0, 0.0])
        >>> multipliers.update("fc", parts)
        >>> round(multipliers.weigh("fc", parts).item(), 6)  # 0.1 * 1.05^2 / 2
        0.055125
    """

    def __init__(self) -> None:
        """Start without any."""
        self._held: dict[str, Tensor] = {}

    def weigh(self, name: str, parts: Tensor) -> Tensor:
        """Return the penalty of one permutation, a scalar.

        Args:
            name: of the permutation.
            parts: d of all its rows and columns.
        """
        return (self._of(name, parts) * _stretched(parts)).mean()

    @torch.no_grad()
    def update(self, name: str, parts: Tensor) -> None:
        """Raise the multipliers of one permutation, in place."""
        self._of(name, parts).add_(RHO * _stretched(parts))

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of all multipliers."""
        return {name: held.clone() for name, held in self._held.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from ``state``."""
        self._held = {name: held.clone() for name, held in state.items()}

    def _of(self, name: str, parts: Tensor) -> Tensor:
        if name not in self._held:
            self._held[name] = torch.zeros_like(parts, requires_grad=False)
        if self._held[name].device != parts.device:  # read from a file on the CPU
            self._held[name] = self._held[name].to(parts.device)
        return self._held[name]


def _stretched(parts: Tensor) -> Tensor:
    return parts + RHO / 2 * parts.square()
