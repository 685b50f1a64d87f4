"""The shape of a weight, as structures see it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

__all__ = ["Shape"]


@dataclass(frozen=True)
class Shape:
    """A weight's shape, ``(out_features, in_features)``.

    A convolution's weight is seen as ``(o, i * kh * kw)``; ``kernel`` is ``(kh, kw)`` then. It
    matters to a distribution of sparsity only, and shapes are equal without it.

    Example:
        >>> Shape(64, 576, kernel=(3, 3)).perimeter  # of 64 x 64 x 3 x 3
        134
    """

    out_features: int
    in_features: int
    kernel: tuple[int, ...] = field(default=(), compare=False, repr=False)

    @property
    def numel(self) -> int:
        """Number of weights of the dense layer."""
        return self.out_features * self.in_features

    @property
    def perimeter(self) -> int:
        """Return the sum of the dense weight's dimensions: ``o + i``, or ``o + i + kh + kw``."""
        channels = self.in_features // math.prod(self.kernel)
        return self.out_features + channels + sum(self.kernel)

    def __str__(self) -> str:
        """``out x in``."""
        return f"{self.out_features}x{self.in_features}"
