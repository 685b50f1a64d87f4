"""Block structure: dense blocks of weights, as many in each row of blocks, or free."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from padst_compiler.index_map import IndexMap, invert
from padst_compiler.structures.base import Shape, Structure

__all__ = ["Block"]


@dataclass(frozen=True, repr=False)
class Block(Structure):
    """Dense blocks of ``size`` rows and ``columns`` columns (by default square).

    Balanced, every row of blocks keeps the same number: ``values (o/r, k, c, r)`` and ``indices
    (o/r, k)``, the block column. With the input side of a block before its output side, a row of
    blocks is one dense ``(k * c, r)`` matrix without a copy. The balance over rows is ours: it
    makes every row of blocks one GEMM of the same size. Free, all blocks of the layer compete:
    ``values (1, k, c, r)`` and ``indices (1, k)``, the position ``block row * (i/c) + column``.

    Args:
        size: rows of a block, which are outputs; hardware likes 8 to 128.
        columns: columns of a block, which are inputs; None for as many.
        balanced: keep the same number of blocks in every row of blocks.

    Example:
        >>> Block(size=32).actual_sparsity(Shape(3072, 768), kept=2)
        0.9166666666666666
        >>> Block(16, 64), Block(32, 32, balanced=False)
        (Block(size=16, columns=64), Block(size=32, balanced=False))
    """

    name: ClassVar[str] = "block"
    size: int = 32
    columns: int | None = None
    balanced: bool = True

    def __post_init__(self) -> None:
        """Write square blocks in one way only, so that equal structures are equal."""
        if self.columns == self.size:
            object.__setattr__(self, "columns", None)

    def __repr__(self) -> str:
        """Name the size, and what is not the default."""
        columns = "" if self.columns is None else f", columns={self.columns}"
        return f"Block(size={self.size}{columns}{'' if self.balanced else ', balanced=False'})"

    @property
    def sides(self) -> tuple[int, int]:
        """Rows and columns of a block."""
        return self.size, self.size if self.columns is None else self.columns

    @classmethod
    def of_storage(cls, indices: Tensor, shape: Shape, unit: Sequence[int]) -> Block:
        """Read the sides off a block, and the balance off the number of groups."""
        columns, rows = (int(side) for side in unit)
        return cls(rows, columns, balanced=indices.shape[0] == shape.out_features // rows)

    def refusal(self, shape: Shape) -> str | None:
        """Return why the structure cannot tile ``shape``."""
        rows, columns = self.sides
        got = str(rows) if rows == columns else f"{rows}:{columns}"
        if min(rows, columns) < 1:
            return f"Expected a block size of at least 1. Got {got}. Use 16, 32 or 64."
        if shape.out_features % rows or shape.in_features % columns:
            fits = [
                b
                for b in (128, 64, 48, 32, 24, 16, 12, 8, 4)
                if not (shape.out_features % b or shape.in_features % b)
            ]
            cure = f"Use size {' or '.join(map(str, fits[:2]))}" if fits else "Pad the layer"
            return (
                f"Expected features divisible by the block size {got}. Got {shape}. "
                f"{cure}, or leave the layer dense."
            )
        return None

    def table(self, shape: Shape) -> tuple[int, int]:
        """Return ``(block rows, block columns)``; free, one group of all blocks."""
        rows, columns = self.grid(shape)
        return (rows, columns) if self.balanced else (1, rows * columns)

    def grid(self, shape: Shape) -> tuple[int, int]:
        """Return the number of block rows and of block columns."""
        return shape.out_features // self.sides[0], shape.in_features // self.sides[1]

    def unit(self, shape: Shape) -> tuple[int, ...]:
        """Return ``(columns, rows)`` of a block: inputs first."""
        del shape
        return self.sides[::-1]

    def rows_per_slab(self, shape: Shape) -> int:
        """Return the rows of a block."""
        del shape
        return self.size

    def unit_scores(self, dense: Tensor) -> Tensor:
        """Return the Frobenius norm of every block: ``(groups, candidates)``."""
        scores: Tensor = self._tiles(dense).float().norm(dim=(2, 3))
        return scores

    def pack(self, dense: Tensor, indices: Tensor) -> Tensor:
        """Gather the kept blocks."""
        tiles = self._tiles(dense)
        return tiles.gather(1, self._over_units(indices))

    def unpack(self, values: Tensor, indices: Tensor, shape: Shape) -> Tensor:
        """Scatter the kept blocks."""
        groups, candidates = self.table(shape)
        tiles = values.new_zeros(groups, candidates, *self.unit(shape))
        tiles = tiles.scatter(1, self._over_units(indices), values)
        tiles = tiles.view(*self.grid(shape), *self.unit(shape))
        return tiles.permute(0, 3, 1, 2).reshape(shape.out_features, shape.in_features)

    def linear(self, x: Tensor, values: Tensor, indices: Tensor, out_features: int) -> Tensor:
        """Return ``x S^T``: one batched product over rows of blocks; free, over blocks."""
        groups, kept, c, r = values.shape
        if self.balanced:
            y = torch.bmm(self._inputs(x, indices), values.reshape(groups, kept * c, r))
        else:
            rows, columns = self._places(indices, x.shape[-1])
            parts = torch.bmm(_tiles_of(x, c)[columns], values[0])  # (k, t, r)
            y = parts.new_zeros(out_features // r, *parts.shape[1:]).index_add(0, rows, parts)
        return y.transpose(0, 1).reshape(*x.shape[:-1], out_features)

    def linear_dx(self, grad: Tensor, values: Tensor, indices: Tensor, in_features: int) -> Tensor:
        """Return ``grad S``: every block adds its part to its block column."""
        groups, kept, c, r = values.shape
        tiles = _tiles_of(grad, r)  # (o/r, t, r)
        rows, columns = self._places(indices, in_features)
        if self.balanced:
            parts = torch.bmm(tiles, values.reshape(groups, kept * c, r).transpose(1, 2))
            parts = parts.view(groups, -1, kept, c).transpose(1, 2).reshape(groups * kept, -1, c)
        else:
            parts = torch.bmm(tiles[rows], values[0].transpose(1, 2))  # (k, t, c)
        dx = parts.new_zeros(in_features // c, parts.shape[1], c).index_add(0, columns, parts)
        return dx.transpose(0, 1).reshape(*grad.shape[:-1], in_features)

    def linear_dw(self, grad: Tensor, x: Tensor, indices: Tensor) -> Tensor:
        """Return the gradient of the kept blocks only."""
        r, c = self.sides
        tiles = _tiles_of(grad, r)
        if self.balanced:
            dw = torch.bmm(self._inputs(x, indices).transpose(1, 2), tiles)
        else:
            rows, columns = self._places(indices, x.shape[-1])
            dw = torch.bmm(_tiles_of(x, c)[columns].transpose(1, 2), tiles[rows])
        return dw.view(*indices.shape, c, r)

    @property
    def vacuous_sides(self) -> frozenset[str]:
        """A side is vacuous only where a block has one row (outputs) or one column (inputs)."""
        sides = zip(("output", "input"), self.sides, strict=True)
        return frozenset(side for side, width in sides if width == 1)

    def absorbs_columns(self, perm: IndexMap, shape: Shape) -> bool:
        """Whole blocks may move, and columns within a block."""
        return perm.size == shape.in_features and perm.blocks(self.sides[1]) is not None

    def absorbs_rows(self, perm: IndexMap, shape: Shape) -> bool:
        """Whole rows of blocks may move, and rows within a block."""
        return perm.size == shape.out_features and perm.blocks(self.sides[0]) is not None

    def fold_columns(
        self, values: Tensor, indices: Tensor, perm: Tensor, shape: Shape
    ) -> tuple[Tensor, Tensor]:
        """Rename block columns; shuffle the input side of each block."""
        outer, inner = _split(perm, self.sides[1])
        columns = indices.long() % self.grid(shape)[1]
        at = inner[columns][..., None].expand_as(values)  # weight c of the block goes to inner[c]
        renamed = indices + (outer[columns] - columns).to(indices.dtype)
        return torch.zeros_like(values).scatter(2, at, values), renamed

    def fold_rows(
        self, values: Tensor, indices: Tensor, perm: Tensor, shape: Shape
    ) -> tuple[Tensor, Tensor]:
        """Move rows of blocks; shuffle the output side of each block."""
        outer, inner = _split(perm, self.size)
        if self.balanced:
            at = inner[:, None, None, :].expand_as(values)
            return values[outer].gather(3, at), indices[outer]
        across = self.grid(shape)[1]
        old = indices.long() // across
        new = invert(outer)[old]  # block row j reads block row outer[j]
        at = inner[new][:, :, None, :].expand_as(values)
        return values.gather(3, at), indices + ((new - old) * across).to(indices.dtype)

    def _tiles(self, dense: Tensor) -> Tensor:
        """View ``(o, i)`` as ``(groups, candidates, c, r)``."""
        shape = Shape(dense.shape[0], dense.shape[1])
        (rows, columns), (r, c) = self.grid(shape), self.sides
        tiles = dense.reshape(rows, r, columns, c).permute(0, 2, 3, 1)
        return tiles if self.balanced else tiles.flatten(0, 1)[None]

    def _over_units(self, indices: Tensor) -> Tensor:
        return indices.long()[:, :, None, None].expand(-1, -1, *self.sides[::-1])

    def _places(self, indices: Tensor, in_features: int) -> tuple[Tensor, Tensor]:
        """Return block row and block column of every stored block, each ``(groups * k,)``."""
        across = in_features // self.sides[1]
        if self.balanced:
            rows = torch.arange(indices.shape[0], device=indices.device)
            return rows.repeat_interleave(indices.shape[1]), indices.reshape(-1).long()
        flat = indices.reshape(-1).long()
        return flat // across, flat % across

    def _inputs(self, x: Tensor, indices: Tensor) -> Tensor:
        """Return ``(o/r, tokens, k*c)``: the input blocks that each row of blocks reads."""
        (rows, kept), c = indices.shape, self.sides[1]
        picked = _tiles_of(x, c).index_select(0, indices.reshape(-1))
        picked = picked.view(rows, kept, -1, c).transpose(1, 2)
        return picked.reshape(rows, -1, kept * c)


def _tiles_of(x: Tensor, side: int) -> Tensor:
    """Return ``(features / side, tokens, side)``."""
    return x.reshape(-1, x.shape[-1] // side, side).transpose(0, 1)


def _split(perm: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Return which block each block reads, and which place within it each place reads."""
    return perm.view(-1, side)[:, 0] // side, perm.view(-1, side) % side
