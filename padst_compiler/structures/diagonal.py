"""Diagonal structure: K wrapped diagonals."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from padst_compiler.index_map import IndexMap
from padst_compiler.structures.base import ElementStructure, Shape

__all__ = ["Diagonal"]


@dataclass(frozen=True)
class Diagonal(ElementStructure):
    """K wrapped diagonals (DynaDiag, arXiv 2506.11449).

    ``values (1, K, min(o, i))`` and ``indices (1, K)``, the offset. The index rule is DynaDiag's:
    with ``o >= i`` weight c of offset d lies at row ``(c + d) mod o`` and column c; with ``o <
    i`` weight r lies at row r and column ``(r + d) mod i``. Candidates are the ``max(o, i)``
    offsets.

    Example:
        >>> Diagonal().kept(Shape(768, 768), sparsity=0.9)
        77
    """

    name: ClassVar[str] = "diagonal"

    def kept(self, shape: Shape, sparsity: float) -> int:
        """Return K, rounded up as DynaDiag does: ``ceil((1 - sparsity) * max(o, i))``."""
        candidates = self.table(shape)[1]
        return min(candidates, max(1, math.ceil(round((1.0 - sparsity) * candidates, 6))))

    def table(self, shape: Shape) -> tuple[int, int]:
        """One group of ``max(o, i)`` offsets."""
        return 1, max(shape.out_features, shape.in_features)

    def unit(self, shape: Shape) -> tuple[int, ...]:
        """Return the length of a diagonal."""
        return (min(shape.out_features, shape.in_features),)

    def unit_scores(self, dense: Tensor) -> Tensor:
        """Return the norm of every diagonal: ``(1, max(o, i))``."""
        shape = Shape(dense.shape[0], dense.shape[1])
        squares = dense.float().square()
        offsets = torch.arange(self.table(shape)[1], device=dense.device)
        rows, columns = self.coordinates(offsets[None], shape)
        return squares.flatten()[rows * shape.in_features + columns].sum(dim=2).sqrt()

    def coordinates(self, indices: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
        """Return row and column of every weight, each ``(1, K, min(o, i))``."""
        along = torch.arange(self.unit(shape)[0], device=indices.device)[None, None, :]
        around = (along + indices.long()[..., None]) % self.table(shape)[1]
        along = along.expand_as(around)
        return (around, along) if shape.out_features >= shape.in_features else (along, around)

    @property
    def vacuous_sides(self) -> frozenset[str]:
        """No side is vacuous."""
        return frozenset()

    def absorbs_columns(self, perm: IndexMap, shape: Shape) -> bool:
        """Cyclic shifts, where the diagonals wrap around the columns."""
        wraps = shape.out_features <= shape.in_features
        return perm.size == shape.in_features and wraps and perm.shift is not None

    def absorbs_rows(self, perm: IndexMap, shape: Shape) -> bool:
        """Cyclic shifts, where the diagonals wrap around the rows."""
        wraps = shape.out_features >= shape.in_features
        return perm.size == shape.out_features and wraps and perm.shift is not None

    def fold_columns(
        self, values: Tensor, indices: Tensor, perm: Tensor, shape: Shape
    ) -> tuple[Tensor, Tensor]:
        """Shift every offset; a square layer's weights move along with their columns."""
        size, shift = shape.in_features, perm[0]
        if shape.out_features < shape.in_features:
            return values, ((indices + shift) % size).to(indices.dtype)
        source = (torch.arange(size, device=perm.device) - shift) % size
        return values[..., source], ((indices - shift) % size).to(indices.dtype)

    def fold_rows(
        self, values: Tensor, indices: Tensor, perm: Tensor, shape: Shape
    ) -> tuple[Tensor, Tensor]:
        """Shift every offset back."""
        return values, ((indices - perm[0]) % shape.out_features).to(indices.dtype)
