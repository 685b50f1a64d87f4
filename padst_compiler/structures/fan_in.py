"""Constant fan-in structure: every output reads the same number of inputs, anywhere."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from padst_compiler.index_map import IndexMap
from padst_compiler.structures.base import ElementStructure, Shape

__all__ = ["FanIn"]


@dataclass(frozen=True)
class FanIn(ElementStructure):
    """k inputs per output (SRigL, arXiv 2305.02299).

    ``values (o, k)`` and ``indices (o, k)``, the input. Without ``k`` the sparsity decides it.

    Example:
        >>> FanIn().kept(Shape(64, 768), sparsity=0.9)
        77
    """

    name: ClassVar[str] = "fan_in"
    k: int | None = None

    def refusal(self, shape: Shape) -> str | None:
        """Return why the structure cannot tile ``shape``."""
        if self.k is not None and not 0 < self.k <= shape.in_features:
            return (
                f"Expected 0 < k <= in_features. Got k = {self.k} and {shape}. "
                "Use a smaller k, or leave it out."
            )
        return None

    def table(self, shape: Shape) -> tuple[int, int]:
        """Return ``(outputs, inputs)``."""
        return shape.out_features, shape.in_features

    def unit(self, shape: Shape) -> tuple[int, ...]:
        """One weight."""
        del shape
        return ()

    def kept(self, shape: Shape, sparsity: float) -> int:
        """Return k."""
        return self.k if self.k is not None else super().kept(shape, sparsity)

    def unit_scores(self, dense: Tensor) -> Tensor:
        """Return magnitudes: ``(o, i)``."""
        return dense.float().abs()

    def coordinates(self, indices: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
        """Return row and column of every weight."""
        return torch.arange(shape.out_features, device=indices.device)[:, None], indices.long()

    @property
    def vacuous_sides(self) -> frozenset[str]:
        """The family already contains every S P and P S."""
        return frozenset({"input", "output"})

    def absorbs_columns(self, perm: IndexMap, shape: Shape) -> bool:
        """Every permutation of the inputs."""
        return perm.size == shape.in_features

    def absorbs_rows(self, perm: IndexMap, shape: Shape) -> bool:
        """Every permutation of the outputs."""
        return perm.size == shape.out_features

    def fold_columns(
        self, values: Tensor, indices: Tensor, perm: Tensor, shape: Shape
    ) -> tuple[Tensor, Tensor]:
        """Rename the inputs."""
        del shape
        return values, perm[indices.long()].to(indices.dtype)

    def fold_rows(
        self, values: Tensor, indices: Tensor, perm: Tensor, shape: Shape
    ) -> tuple[Tensor, Tensor]:
        """Reorder the rows."""
        del shape
        return values[perm], indices[perm]
