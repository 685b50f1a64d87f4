"""Block structure: every row of blocks keeps the same number of dense ``size x size`` blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from padst_compiler.index_map import IndexMap
from padst_compiler.structures.base import Shape, Structure

__all__ = ["Block"]


@dataclass(frozen=True)
class Block(Structure):
    """Dense square blocks, the same number in each row of blocks.

    ``values (o/b, k, b_in, b_out)`` and ``indices (o/b, k)``, the block column. With the input
    side of a block before its output side, a row of blocks is one dense ``(k * b, b)`` matrix
    without a copy. The balance over rows is ours: it makes every row of blocks one GEMM of the
    same size.

    Example:
        >>> Block(size=32).actual_sparsity(Shape(3072, 768), kept=2)
        0.9166666666666666
    """

    name: ClassVar[str] = "block"
    size: int = 32

    @classmethod
    def of_storage(cls, indices: Tensor, shape: Shape) -> Block:
        """Read the block size off the number of block rows."""
        return cls(size=shape.out_features // indices.shape[0])

    def refusal(self, shape: Shape) -> str | None:
        """Return why the structure cannot tile ``shape``."""
        if self.size < 1:
            return f"Expected a block size of at least 1. Got {self.size}. Use 16, 32 or 64."
        if shape.out_features % self.size or shape.in_features % self.size:
            fits = [
                b
                for b in (128, 64, 48, 32, 24, 16, 12, 8, 4)
                if not (shape.out_features % b or shape.in_features % b)
            ]
            cure = f"Use size {' or '.join(map(str, fits[:2]))}" if fits else "Pad the layer"
            return (
                f"Expected features divisible by the block size {self.size}. Got {shape}. "
                f"{cure}, or leave the layer dense."
            )
        return None

    def table(self, shape: Shape) -> tuple[int, int]:
        """Return ``(block rows, block columns)``."""
        return shape.out_features // self.size, shape.in_features // self.size

    def unit(self, shape: Shape) -> tuple[int, ...]:
        """Return ``(b_in, b_out)``."""
        del shape
        return (self.size, self.size)

    def unit_scores(self, dense: Tensor) -> Tensor:
        """Return the Frobenius norm of every block: ``(o/b, i/b)``."""
        scores: Tensor = self._tiles(dense).float().norm(dim=(2, 3))
        return scores

    def pack(self, dense: Tensor, indices: Tensor) -> Tensor:
        """Gather the kept blocks."""
        tiles = self._tiles(dense)
        at = indices.long()[:, :, None, None].expand(-1, -1, self.size, self.size)
        return tiles.gather(1, at)

    def unpack(self, values: Tensor, indices: Tensor, shape: Shape) -> Tensor:
        """Scatter the kept blocks."""
        block_rows, block_columns, b = values.shape[0], shape.in_features // self.size, self.size
        at = indices.long()[:, :, None, None].expand(-1, -1, b, b)
        tiles = values.new_zeros(block_rows, block_columns, b, b).scatter(1, at, values)
        return tiles.permute(0, 3, 1, 2).reshape(shape.out_features, shape.in_features)

    def linear(self, x: Tensor, values: Tensor, indices: Tensor, out_features: int) -> Tensor:
        """Return ``x S^T`` as one batched product over rows of blocks."""
        rows, kept, b, _ = values.shape
        gathered = _gather_blocks(x, indices, b)  # (o/b, t, k*b)
        y = torch.bmm(gathered, values.reshape(rows, kept * b, b))
        return y.transpose(0, 1).reshape(*x.shape[:-1], out_features)

    def linear_dx(self, grad: Tensor, values: Tensor, indices: Tensor, in_features: int) -> Tensor:
        """Return ``grad S``: every block adds its part to its block column."""
        rows, kept, b, _ = values.shape
        tokens = grad.reshape(-1, rows, b).transpose(0, 1)  # (o/b, t, b)
        parts = torch.bmm(tokens, values.reshape(rows, kept * b, b).transpose(1, 2))
        parts = parts.view(rows, -1, kept, b).transpose(1, 2).reshape(rows * kept, -1, b)
        dx = parts.new_zeros(in_features // b, parts.shape[1], b)
        dx = dx.index_add(0, indices.reshape(-1), parts)
        return dx.transpose(0, 1).reshape(*grad.shape[:-1], in_features)

    def linear_dw(self, grad: Tensor, x: Tensor, indices: Tensor) -> Tensor:
        """Return the gradient of the kept blocks only."""
        rows, kept = indices.shape
        tokens = grad.reshape(-1, rows, self.size).transpose(0, 1)  # (o/b, t, b)
        gathered = _gather_blocks(x, indices, self.size)
        dw = torch.bmm(gathered.transpose(1, 2), tokens)
        return dw.view(rows, kept, self.size, self.size)

    @property
    def vacuous_sides(self) -> frozenset[str]:
        """No side is vacuous, unless a block is one weight."""
        return frozenset({"input", "output"}) if self.size == 1 else frozenset()

    def absorbs_columns(self, perm: IndexMap, shape: Shape) -> bool:
        """Whole blocks may move, and columns within a block."""
        return perm.size == shape.in_features and perm.blocks(self.size) is not None

    def absorbs_rows(self, perm: IndexMap, shape: Shape) -> bool:
        """Whole rows of blocks may move, and rows within a block."""
        return perm.size == shape.out_features and perm.blocks(self.size) is not None

    def fold_columns(
        self, values: Tensor, indices: Tensor, perm: Tensor, shape: Shape
    ) -> tuple[Tensor, Tensor]:
        """Rename block columns; shuffle the input side of each block."""
        del shape
        b = self.size
        outer, inner = perm.view(-1, b)[:, 0] // b, perm.view(-1, b) % b
        columns = indices.long()
        at = inner[columns][..., None].expand(
            -1, -1, -1, b
        )  # weight c of the block goes to inner[c]
        return torch.zeros_like(values).scatter(2, at, values), outer[columns].to(indices.dtype)

    def fold_rows(
        self, values: Tensor, indices: Tensor, perm: Tensor, shape: Shape
    ) -> tuple[Tensor, Tensor]:
        """Move rows of blocks; shuffle the output side of each block."""
        del shape
        b = self.size
        outer, inner = perm.view(-1, b)[:, 0] // b, perm.view(-1, b) % b
        moved = values[outer]
        at = inner[:, None, None, :].expand(-1, values.shape[1], b, -1)
        return moved.gather(3, at), indices[outer]

    def _tiles(self, dense: Tensor) -> Tensor:
        """View ``(o, i)`` as ``(o/b, i/b, b_in, b_out)``."""
        b = self.size
        tiles = dense.reshape(dense.shape[0] // b, b, dense.shape[1] // b, b)
        return tiles.permute(0, 2, 3, 1)


def _gather_blocks(x: Tensor, indices: Tensor, b: int) -> Tensor:
    """Return ``(o/b, tokens, k*b)``: the input blocks that each row of blocks reads."""
    rows, kept = indices.shape
    tiles = x.reshape(-1, x.shape[-1] // b, b).transpose(0, 1)  # (i/b, t, b)
    picked = tiles.index_select(0, indices.reshape(-1))
    picked = picked.view(rows, kept, -1, b).transpose(1, 2)
    return picked.reshape(rows, -1, kept * b)
