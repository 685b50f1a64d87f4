"""Diagonal structure: K wrapped diagonals, each by itself, in bands, or in residue classes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from padst_compiler.index_map import IndexMap, invert
from padst_compiler.structures.base import ElementStructure, Shape
from padst_compiler.structures.block import Block

__all__ = ["Diagonal"]


@dataclass(frozen=True, repr=False)
class Diagonal(ElementStructure):
    """K wrapped diagonals (DynaDiag, arXiv 2506.11449).

    ``values (1, K, min(o, i))`` and ``indices (1, K)``, the offset. The index rule is DynaDiag's:
    with ``o >= i`` weight c of offset d lies at row ``(c + d) mod o`` and column c; with ``o <
    i`` weight r lies at row r and column ``(r + d) mod i``. Candidates are the ``max(o, i)``
    offsets. Two ways to choose them are ours, because hardware likes what is dense:

    * ``band=b``: a unit is b adjacent offsets, ``u * b`` to ``u * b + b - 1``;
    * ``modulus=g``: a unit is a residue class, all offsets ``r, r + g, r + 2 g, ...``. Ordered by
      residue modulo g, rows and columns, such a weight is dense blocks of ``o/g x i/g``
      (``residue_orders``, ``as_blocks``).

    Either has the same storage and the same operators as single diagonals.

    Example:
        >>> Diagonal().kept(Shape(768, 768), sparsity=0.9)
        77
        >>> Diagonal(band=8).kept(Shape(768, 768), sparsity=0.9)
        10
    """

    name: ClassVar[str] = "diagonal"
    band: int | None = None
    modulus: int | None = None

    def __repr__(self) -> str:
        """Name what is not the default."""
        given = {"band": self.band, "modulus": self.modulus}
        return f"Diagonal({', '.join(f'{k}={v}' for k, v in given.items() if v is not None)})"

    def refusal(self, shape: Shape) -> str | None:
        """Return why the structure cannot tile ``shape``."""
        band, modulus, offsets = self.band, self.modulus, self._offsets(shape)
        if band is not None and modulus is not None:
            return f"Expected band or modulus. Got both, {band} and {modulus}. Leave one out."
        if min(band or 1, modulus or 1) < 1 or 0 in (band, modulus):
            return f"Expected a whole number of at least 1. Got {self}. Use 8 or 16."
        if band is not None and offsets % band:
            return (
                f"Expected the larger side divisible by the band {band}. Got {shape}. "
                "Use another band, or leave the layer dense."
            )
        if modulus is not None and (shape.out_features % modulus or shape.in_features % modulus):
            return (
                f"Expected features divisible by the modulus {modulus}. Got {shape}. "
                "Use another modulus, or leave the layer dense."
            )
        return None

    def kept(self, shape: Shape, sparsity: float) -> int:
        """Return K, rounded up as DynaDiag does: ``ceil((1 - sparsity) * max(o, i))``."""
        candidates = self.table(shape)[1]
        return min(candidates, max(1, math.ceil(round((1.0 - sparsity) * candidates, 6))))

    def table(self, shape: Shape) -> tuple[int, int]:
        """One group of ``max(o, i)`` offsets, or of the bands or classes of them."""
        return 1, self._offsets(shape) // self.indices_per_unit(shape)

    def unit(self, shape: Shape) -> tuple[int, ...]:
        """Return the length of a diagonal."""
        return (min(shape.out_features, shape.in_features),)

    def indices_per_unit(self, shape: Shape) -> int:
        """Return how many diagonals are kept or dropped together."""
        if self.modulus is not None:
            return self._offsets(shape) // self.modulus
        return 1 if self.band is None else self.band

    def rows_per_slab(self, shape: Shape) -> int:
        """Return 0: every diagonal runs through all rows."""
        del shape
        return 0

    def index_shape(self, shape: Shape, kept: int) -> tuple[int, ...]:
        """Return ``(1, K)``."""
        return (1, kept * self.indices_per_unit(shape))

    def slots(self, indices: Tensor, shape: Shape) -> Tensor:
        """Return the bands or classes that are kept: ``(1, k)``."""
        first = indices.view(1, -1, self.indices_per_unit(shape))[..., 0]
        if self.modulus is not None:
            return first % self.modulus
        return first if self.band is None else first.div(self.band, rounding_mode="floor")

    def indices_of(self, slots: Tensor, shape: Shape) -> Tensor:
        """Return the offsets of bands or classes: ``(1, K)``."""
        within = torch.arange(self.indices_per_unit(shape), device=slots.device)
        start, step = (1, self.modulus) if self.modulus is not None else (within.numel(), 1)
        return (slots[..., None] * start + within * step).reshape(1, -1).to(torch.int32)

    def unit_scores(self, dense: Tensor) -> Tensor:
        """Return the norm of every unit: ``(1, candidates)``."""
        shape = Shape(dense.shape[0], dense.shape[1])
        return self.over_units(self.squares(dense), shape).sqrt()

    def squares(self, dense: Tensor) -> Tensor:
        """Return the sum of squares on every offset: ``(1, max(o, i))``."""
        shape = Shape(dense.shape[0], dense.shape[1])
        offsets = torch.arange(self._offsets(shape), device=dense.device)
        rows, columns = self.coordinates(offsets[None], shape)
        flat = dense.float().square().flatten()
        return flat[rows * shape.in_features + columns].sum(dim=2)

    def over_units(self, offsets: Tensor, shape: Shape) -> Tensor:
        """Sum a number per offset, ``(1, max(o, i))``, over the offsets of every unit."""
        if self.modulus is not None:
            return offsets.view(1, -1, self.modulus).sum(dim=1)
        return offsets.view(1, -1, self.indices_per_unit(shape)).sum(dim=2)

    def coordinates(self, indices: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
        """Return row and column of every weight, each ``(1, K, min(o, i))``."""
        along = torch.arange(self.unit(shape)[0], device=indices.device)[None, None, :]
        around = (along + indices.long()[..., None]) % self._offsets(shape)
        along = along.expand_as(around)
        return (around, along) if shape.out_features >= shape.in_features else (along, around)

    def residue_orders(self, shape: Shape) -> tuple[IndexMap, IndexMap]:
        """Return the orders of rows and of columns by residue that make the weight dense blocks.

        Example:
            >>> rows, columns = Diagonal(modulus=2).residue_orders(Shape(4, 6))
            >>> rows.perm.tolist(), columns.perm.tolist()
            ([0, 2, 1, 3], [0, 2, 4, 1, 3, 5])
        """
        assert self.modulus is not None
        sides = (shape.out_features, shape.in_features)
        rows, columns = (torch.arange(n).view(-1, self.modulus).t().flatten() for n in sides)
        return IndexMap(rows), IndexMap(columns)

    def as_blocks(
        self, values: Tensor, indices: Tensor, shape: Shape
    ) -> tuple[Block, Tensor, Tensor]:
        """Return the weight in the order of its residues, as dense blocks.

        Args:
            values: ``(1, K, min(o, i))``.
            indices: ``(1, K)``, whole residue classes.
            shape: of the weight.

        Returns:
            The structure, its values and its indices: with the maps of ``residue_orders``,
            ``block.unpack(...) == S[rows.perm][:, columns.perm]``.
        """
        assert self.modulus is not None
        rows, columns = self.residue_orders(shape)
        block = Block(shape.out_features // self.modulus, shape.in_features // self.modulus)
        residues = torch.arange(self.modulus, device=indices.device)[:, None]
        sign = -1 if shape.out_features >= shape.in_features else 1  # which side wraps around
        places = (residues + sign * self.slots(indices, shape)) % self.modulus
        places = places.sort(dim=1).values.to(indices.dtype)
        dense = self.unpack(values, indices, shape)
        return block, block.pack(dense[rows.perm][:, columns.perm], places), places

    @property
    def vacuous_sides(self) -> frozenset[str]:
        """No side is vacuous, unless there is one class only."""
        return frozenset({"input", "output"}) if self.modulus == 1 else frozenset()

    def absorbs_columns(self, perm: IndexMap, shape: Shape) -> bool:
        """Cyclic shifts by whole bands, where the diagonals wrap around the columns.

        With a modulus: whatever shifts all residues alike.
        """
        wraps = shape.out_features <= shape.in_features
        return perm.size == shape.in_features and self._absorbs(perm, wraps)

    def absorbs_rows(self, perm: IndexMap, shape: Shape) -> bool:
        """Cyclic shifts by whole bands, where the diagonals wrap around the rows.

        With a modulus: whatever shifts all residues alike.
        """
        wraps = shape.out_features >= shape.in_features
        return perm.size == shape.out_features and self._absorbs(perm, wraps)

    def _absorbs(self, perm: IndexMap, wraps: bool) -> bool:
        if self.modulus is not None:
            shifts = (perm.perm - torch.arange(perm.size)) % self.modulus
            return bool((shifts == shifts[0]).all())
        shift = perm.shift
        return shift == 0 or (wraps and shift is not None and shift % (self.band or 1) == 0)

    def fold_columns(
        self, values: Tensor, indices: Tensor, perm: Tensor, shape: Shape
    ) -> tuple[Tensor, Tensor]:
        """Shift every offset; a square layer's weights move along with their columns."""
        if self.modulus is not None:
            return self._fold(values, indices, (slice(None), invert(perm)), perm[0], shape)
        size, offsets, shift = shape.in_features, self._offsets(shape), perm[0]
        if shape.out_features < shape.in_features:
            return values, ((indices + shift) % offsets).to(indices.dtype)
        source = (torch.arange(size, device=perm.device) - shift) % size
        return values[..., source], ((indices - shift) % offsets).to(indices.dtype)

    def fold_rows(
        self, values: Tensor, indices: Tensor, perm: Tensor, shape: Shape
    ) -> tuple[Tensor, Tensor]:
        """Shift every offset back."""
        if self.modulus is not None:
            return self._fold(values, indices, (perm, slice(None)), perm[0], shape)
        return values, ((indices - perm[0]) % self._offsets(shape)).to(indices.dtype)

    def _fold(
        self,
        values: Tensor,
        indices: Tensor,
        moved: tuple[Tensor | slice, Tensor | slice],
        shift: Tensor,
        shape: Shape,
    ) -> tuple[Tensor, Tensor]:
        """Rename the classes, and store the moved weight under their names."""
        assert self.modulus is not None
        sign = -1 if shape.out_features >= shape.in_features else 1
        slots = (self.slots(indices, shape) + sign * shift) % self.modulus
        renamed = self.indices_of(slots, shape)
        return self.pack(self.unpack(values, indices, shape)[moved], renamed), renamed

    def _offsets(self, shape: Shape) -> int:
        return max(shape.out_features, shape.in_features)
