"""What a structure is: a family of masks, how it is stored, and its reference product.

A structure sees the weight ``w: (o, i)`` as a table of *units* in *groups*. Every group keeps the
same number ``k`` of units for ever, so nothing that is stored ever changes its shape:

==================  ===========================  ======================  =================
structure           groups                       candidates in a group   unit
==================  ===========================  ======================  =================
block               block rows (o / r)           block columns (i / c)   r x c weights
block, free         1                            all blocks              r x c weights
nm                  o * (i / m)                  m                       one weight
diagonal            1                            max(o, i) offsets       min(o, i) weights
diagonal, in bands  1                            max(o, i) / b bands     b offsets
diagonal, modulo g  1                            g residue classes       max(o, i) / g offsets
fan_in              o                            i                       one weight
unstructured        1                            o * i                   one weight
==================  ===========================  ======================  =================

``indices`` (int32) names the kept candidates and ``values`` holds their weights, so the trainable
numbers are ``nnz`` numbers. All growth rules work on ``slots (groups, k)``, the kept units: what
``indices`` says, and where a unit is several indices (a band), one number for all of them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from padst_compiler.index_map import IndexMap
from padst_compiler.structures.shape import Shape

__all__ = ["ElementStructure", "Shape", "Structure", "unit_of"]


@dataclass(frozen=True)
class Structure(ABC):
    """A family of masks; the fields of a subclass are its parameters."""

    name: ClassVar[str]

    @classmethod
    def of_storage(cls, indices: Tensor, shape: Shape, unit: Sequence[int]) -> Structure:
        """Return a structure that reads this storage right, with the sizes that it implies.

        Products and folds need no more. Units may be coarser than storage tells (bands of
        diagonals): what moves a topology must know the structure itself.

        Args:
            indices: of the stored units.
            shape: of the weight.
            unit: the axes of ``values`` behind those of ``indices``.
        """
        del indices, shape, unit
        return cls()

    # -- which masks are allowed ---------------------------------------------------------------

    def refusal(self, shape: Shape) -> str | None:
        """Return why the structure cannot tile ``shape``, with the cure; None where it can."""
        del shape
        return None

    @abstractmethod
    def table(self, shape: Shape) -> tuple[int, int]:
        """Return ``(groups, candidates)``."""

    @abstractmethod
    def unit(self, shape: Shape) -> tuple[int, ...]:
        """Return the shape of the weights behind one index; ``()`` for single weights."""

    def indices_per_unit(self, shape: Shape) -> int:
        """Return how many indices name one unit; they lie side by side, ascending."""
        del shape
        return 1

    def unit_size(self, shape: Shape) -> int:
        """Return how many weights a unit has."""
        return self.indices_per_unit(shape) * math.prod(self.unit(shape))

    def rows_per_slab(self, shape: Shape) -> int:
        """Return the least number of rows of a weight whose units are a run of the table.

        The table follows the rows; 0 where it does not, as with diagonals.
        """
        del shape
        return 1

    def index_shape(self, shape: Shape, kept: int) -> tuple[int, ...]:
        """Return the shape of ``indices``, unless a structure says otherwise ``(groups, kept)``."""
        return (self.table(shape)[0], kept)

    def kept(self, shape: Shape, sparsity: float) -> int:
        """Return how many units each group keeps: the nearest to ``1 - sparsity``, at least 1."""
        candidates = self.table(shape)[1]
        return min(candidates, max(1, round((1.0 - sparsity) * candidates)))

    def actual_sparsity(self, shape: Shape, kept: int) -> float:
        """Return the sparsity reached, the fraction of zeros in the effective weight."""
        groups, _ = self.table(shape)
        return 1.0 - groups * kept * self.unit_size(shape) / shape.numel

    # -- scores and selection ------------------------------------------------------------------

    @abstractmethod
    def unit_scores(self, dense: Tensor) -> Tensor:
        """Score every candidate unit.

        Args:
            dense: ``(o, i)``, a weight or a gradient; its magnitudes count.

        Returns:
            ``(groups, candidates)``, non-negative, float32 or wider.
        """

    def select(self, dense: Tensor, kept: int) -> Tensor:
        """Return the indices of the ``kept`` best units of each group, ascending."""
        scores = self.unit_scores(dense)
        return self.indices_of(
            scores.topk(kept, dim=1).indices.sort(dim=1).values, _shape_of(dense)
        )

    def slots(self, indices: Tensor, shape: Shape) -> Tensor:
        """Return the kept units of every group, ``(groups, k)``; -1 stays -1."""
        return indices.view(self.table(shape)[0], -1)

    def indices_of(self, slots: Tensor, shape: Shape) -> Tensor:
        """Return the ``indices`` of the units ``slots (groups, k)``: what ``slots`` undoes."""
        return slots.to(torch.int32).view(self.index_shape(shape, slots.shape[1]))

    def slot_values(self, values: Tensor, shape: Shape) -> Tensor:
        """Return ``values`` as ``(groups, k, weights of a unit)``, a view where it can be one."""
        return values.reshape(self.table(shape)[0], -1, self.unit_size(shape))

    def slot_scores(self, values: Tensor, shape: Shape) -> Tensor:
        """Score the stored units as ``unit_scores`` does: ``(groups, k)``."""
        scores: Tensor = self.slot_values(values, shape).float().norm(dim=2)
        return scores

    # -- storage -------------------------------------------------------------------------------

    @abstractmethod
    def pack(self, dense: Tensor, indices: Tensor) -> Tensor:
        """Gather the kept weights of ``dense: (o, i)`` into ``values``."""

    @abstractmethod
    def unpack(self, values: Tensor, indices: Tensor, shape: Shape) -> Tensor:
        """Scatter ``values`` into a dense ``(o, i)`` weight; differentiable in ``values``."""

    def mask(self, indices: Tensor, shape: Shape) -> Tensor:
        """Return the boolean mask ``(o, i)``."""
        size = self.unit(shape)
        ones = torch.ones((*indices.shape, *size), dtype=torch.float32, device=indices.device)
        return self.unpack(ones, indices, shape) != 0

    # -- the reference product -----------------------------------------------------------------

    def linear(self, x: Tensor, values: Tensor, indices: Tensor, out_features: int) -> Tensor:
        """Return ``x S^T``: ``x (..., i) -> (..., o)``."""
        shape = Shape(out_features, x.shape[-1])
        return F.linear(x, self.unpack(values, indices, shape))

    def linear_dx(self, grad: Tensor, values: Tensor, indices: Tensor, in_features: int) -> Tensor:
        """Return the gradient of ``x``: ``grad (..., o) -> (..., i)``."""
        shape = Shape(grad.shape[-1], in_features)
        return grad @ self.unpack(values, indices, shape)

    def linear_dw(self, grad: Tensor, x: Tensor, indices: Tensor) -> Tensor:
        """Return the gradient of ``values`` from ``grad (..., o)`` and ``x (..., i)``."""
        full = grad.reshape(-1, grad.shape[-1]).t() @ x.reshape(-1, x.shape[-1])
        return self.pack(full, indices)

    # -- symmetry: the permutations that the family absorbs for free ----------------------------

    @property
    @abstractmethod
    def vacuous_sides(self) -> frozenset[str]:
        """Sides ("input", "output") on which every permutation is absorbed: nothing to learn."""

    @abstractmethod
    def absorbs_columns(self, perm: IndexMap, shape: Shape) -> bool:
        """Whether ``S (P x)`` is again in the family, for every S in it."""

    @abstractmethod
    def absorbs_rows(self, perm: IndexMap, shape: Shape) -> bool:
        """Whether ``P (S x)`` is again in the family, for every S in it."""

    @abstractmethod
    def fold_columns(
        self, values: Tensor, indices: Tensor, perm: Tensor, shape: Shape
    ) -> tuple[Tensor, Tensor]:
        """Return the values and indices of ``S P``; call where ``absorbs_columns`` holds."""

    @abstractmethod
    def fold_rows(
        self, values: Tensor, indices: Tensor, perm: Tensor, shape: Shape
    ) -> tuple[Tensor, Tensor]:
        """Return the values and indices of ``P S``; call where ``absorbs_rows`` holds."""


@dataclass(frozen=True)
class ElementStructure(Structure):
    """A structure whose stored weights each have one coordinate in the dense weight."""

    @abstractmethod
    def coordinates(self, indices: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
        """Return the row and the column (int64, broadcastable to ``values``) of every weight."""

    def pack(self, dense: Tensor, indices: Tensor) -> Tensor:
        """Gather the kept weights of ``dense: (o, i)`` into ``values``."""
        rows, columns = self.coordinates(indices, _shape_of(dense))
        return dense.flatten()[rows * dense.shape[1] + columns]

    def unpack(self, values: Tensor, indices: Tensor, shape: Shape) -> Tensor:
        """Scatter ``values`` into a dense ``(o, i)`` weight; differentiable in ``values``."""
        rows, columns = self.coordinates(indices, shape)
        flat = (rows * shape.in_features + columns).reshape(-1)
        dense = values.new_zeros(shape.numel).scatter(0, flat, values.reshape(-1))
        return dense.view(shape.out_features, shape.in_features)


def unit_of(values: Tensor, indices: Tensor) -> Sequence[int]:
    """Return the axes of the weights behind one index: those of ``values`` after ``indices``.

    Example:
        >>> unit_of(torch.zeros(4, 2, 16, 8), torch.zeros(4, 2))
        torch.Size([16, 8])
    """
    return values.shape[indices.dim() :]


def _shape_of(dense: Tensor) -> Shape:
    return Shape(dense.shape[0], dense.shape[1])
