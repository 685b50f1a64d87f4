"""A weight as a layer stores it."""

from __future__ import annotations

import torch
from torch import Tensor

from padst_compiler.structures import Shape, Structure


def weights(
    structure: Structure, shape: Shape, dtype: torch.dtype = torch.float32, sparsity: float = 0.8
) -> tuple[Tensor, Tensor, Tensor]:
    """Return values and indices, and the weight that they stand for in float64."""
    dense = torch.randn(shape.out_features, shape.in_features)
    indices = structure.select(dense, structure.kept(shape, sparsity))
    values = structure.pack(dense, indices).to(dtype)
    return values, indices, structure.unpack(values.double(), indices, shape)
