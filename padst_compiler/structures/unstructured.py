"""Unstructured sparsity: any weight may stay. The baseline of RigL and SET, not a fast path."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from padst_compiler.index_map import IndexMap, invert
from padst_compiler.structures.base import ElementStructure, Shape

__all__ = ["Unstructured"]


@dataclass(frozen=True)
class Unstructured(ElementStructure):
    """nnz weights anywhere in the layer.

    ``values (1, nnz)`` and ``indices (1, nnz)``, the position ``row * i + column``. Products use
    the materialised dense weight: no kernel makes this structure faster than dense, and none is
    claimed.

    Example:
        >>> Unstructured().kept(Shape(4, 5), sparsity=0.9)
        2
    """

    name: ClassVar[str] = "unstructured"

    def refusal(self, shape: Shape) -> str | None:
        """Return why the structure cannot tile ``shape``."""
        if shape.numel >= 2**31:
            return (
                f"Expected at most {2**31 - 1} weights for int32 positions. Got {shape}. "
                "Use structure fan_in."
            )
        return None

    def table(self, shape: Shape) -> tuple[int, int]:
        """One group with every weight as a candidate."""
        return 1, shape.numel

    def unit(self, shape: Shape) -> tuple[int, ...]:
        """One weight."""
        del shape
        return ()

    def unit_scores(self, dense: Tensor) -> Tensor:
        """Return magnitudes: ``(1, o * i)``."""
        return dense.float().abs().reshape(1, -1)

    def coordinates(self, indices: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
        """Return row and column of every weight."""
        flat = indices.long()
        return flat // shape.in_features, flat % shape.in_features

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
        """Rename the columns."""
        rows, columns = self.coordinates(indices, shape)
        return values, (rows * shape.in_features + perm[columns]).to(indices.dtype)

    def fold_rows(
        self, values: Tensor, indices: Tensor, perm: Tensor, shape: Shape
    ) -> tuple[Tensor, Tensor]:
        """Rename the rows."""
        rows, columns = self.coordinates(indices, shape)
        moved = invert(perm)[
            rows
        ]  # output j reads row perm[j], so row r is read by invert(perm)[r]
        return values, (moved * shape.in_features + columns).to(indices.dtype)
