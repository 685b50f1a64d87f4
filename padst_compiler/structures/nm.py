"""N:M structure: every output keeps N of every M consecutive inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from padst_compiler.index_map import IndexMap
from padst_compiler.structures.base import ElementStructure, Shape

__all__ = ["NM"]


@dataclass(frozen=True)
class NM(ElementStructure):
    """N of every M consecutive inputs, per output.

    ``values (o, i/m, n)`` and ``indices (o, i/m, n)``, the position within the group. Without ``n``
    the sparsity asked for decides it; with ``n`` the sparsity is ``1 - n/m`` whatever was asked.

    Example:
        >>> NM(m=16).kept(Shape(8, 32), sparsity=0.9)
        2
        >>> NM(m=4, n=2).kept(Shape(8, 32), sparsity=0.9)
        2
    """

    name: ClassVar[str] = "nm"
    m: int = 16
    n: int | None = None

    @classmethod
    def of_storage(cls, indices: Tensor, shape: Shape, unit: Sequence[int]) -> NM:
        """Read m off the number of groups."""
        del unit
        return cls(m=shape.in_features // indices.shape[1])

    def refusal(self, shape: Shape) -> str | None:
        """Return why the structure cannot tile ``shape``."""
        if self.m < 1 or (self.n is not None and not 0 < self.n <= self.m):
            return f"Expected 0 < n <= m. Got {self.n}:{self.m}. Use 2:4, 1:8 or 2:16."
        if shape.in_features % self.m:
            fits = [m for m in (32, 16, 12, 10, 8, 6, 4, 2) if shape.in_features % m == 0]
            cure = f"Use m = {' or '.join(map(str, fits[:2]))}" if fits else "Pad the layer"
            return (
                f"Expected in_features divisible by m = {self.m}. Got {shape}. "
                f"{cure}, or leave the layer dense."
            )
        return None

    def table(self, shape: Shape) -> tuple[int, int]:
        """Return ``(outputs * groups, m)``."""
        return shape.out_features * (shape.in_features // self.m), self.m

    def unit(self, shape: Shape) -> tuple[int, ...]:
        """One weight."""
        del shape
        return ()

    def index_shape(self, shape: Shape, kept: int) -> tuple[int, ...]:
        """Return ``(o, i/m, n)``."""
        return shape.out_features, shape.in_features // self.m, kept

    def kept(self, shape: Shape, sparsity: float) -> int:
        """Return n."""
        return self.n if self.n is not None else super().kept(shape, sparsity)

    def unit_scores(self, dense: Tensor) -> Tensor:
        """Return magnitudes: ``(o * i/m, m)``."""
        return dense.float().abs().reshape(-1, self.m)

    def coordinates(self, indices: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
        """Return row and column of every weight."""
        rows = torch.arange(shape.out_features, device=indices.device)[:, None, None]
        starts = torch.arange(0, shape.in_features, self.m, device=indices.device)[None, :, None]
        return rows, indices.long() + starts

    @property
    def vacuous_sides(self) -> frozenset[str]:
        """Rows are independent: every output permutation is absorbed."""
        return frozenset({"output"})

    def absorbs_columns(self, perm: IndexMap, shape: Shape) -> bool:
        """Whole groups may move, and columns within a group."""
        return perm.size == shape.in_features and perm.blocks(self.m) is not None

    def absorbs_rows(self, perm: IndexMap, shape: Shape) -> bool:
        """Every permutation of the outputs."""
        return perm.size == shape.out_features

    def fold_columns(
        self, values: Tensor, indices: Tensor, perm: Tensor, shape: Shape
    ) -> tuple[Tensor, Tensor]:
        """Move groups; rename positions within them."""
        del shape
        outer, inner = perm.view(-1, self.m)[:, 0] // self.m, perm.view(-1, self.m) % self.m
        renamed = inner[torch.arange(inner.shape[0], device=perm.device)[:, None], indices.long()]
        at = outer[None, :, None].expand_as(values)
        return (
            torch.zeros_like(values).scatter(1, at, values),
            torch.zeros_like(indices).scatter(1, at, renamed.to(indices.dtype)),
        )

    def fold_rows(
        self, values: Tensor, indices: Tensor, perm: Tensor, shape: Shape
    ) -> tuple[Tensor, Tensor]:
        """Reorder the rows."""
        del shape
        return values[perm], indices[perm]
