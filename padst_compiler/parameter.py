"""A sparse weight that somebody else's code reads: ``owner.W`` becomes a computed tensor.

Where no linear module of ours stands, the code that uses a Parameter stays. The Parameter leaves
its owner; a child ``W_sparse`` holds ``values``, ``indices`` and the permutation, and reading
``owner.W`` gives the effective dense weight, differentiable. So every run is right whatever the
code does with it, and only stored numbers have gradients. Compiled, products with it are sparse.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from padst_compiler.layers import SparseLayer
from padst_compiler.ownership import own, owned, release
from padst_compiler.permutation import Permutation
from padst_compiler.structures import Shape, Structure
from padst_compiler.unpacking import dense_matrix

__all__ = ["SparseParameter", "as_matrix", "matrix_shape", "put_back"]


def matrix_shape(sizes: Sequence[int], columns: Sequence[int]) -> Shape:
    """Return the shape of a Parameter as a matrix.

    Args:
        sizes: of the Parameter.
        columns: the axes that products sum over; all others together are the rows.

    Example:
        >>> str(matrix_shape((8, 32, 16), (2,)))
        '256x16'
    """
    inside = math.prod(sizes[axis] for axis in columns)
    return Shape(math.prod(sizes) // max(1, inside), inside)


def as_matrix(weight: Tensor, columns: Sequence[int]) -> Tensor:
    """Return a Parameter as a matrix ``(o, i)``.

    Args:
        weight: of any shape.
        columns: the axes that products sum over.

    Example:
        >>> as_matrix(torch.arange(6).view(2, 3), (0,)).tolist()
        [[0, 3], [1, 4], [2, 5]]
    """
    rows = [axis for axis in range(weight.dim()) if axis not in columns]
    shape = matrix_shape(weight.shape, columns)
    return weight.permute(*rows, *columns).reshape(shape.out_features, shape.in_features)


class SparseParameter(SparseLayer):
    """The sparse form of one Parameter; made by ``of``, held by the Parameter's owner.

    As a matrix ``(o, i)`` its inputs are the axes that products sum over, ``columns``, and its
    outputs all others: stacked experts ``(e, o, i)`` are one matrix ``(e o, i)``.

    Example:
        >>> from padst_compiler.structures import FanIn
        >>> attention = nn.MultiheadAttention(8, 2)
        >>> weight = attention.in_proj_weight.detach()
        >>> kept = FanIn().select(weight, 2)
        >>> layer = SparseParameter.of(attention, "in_proj_weight", (1,), FanIn(), kept)
        >>> attention.in_proj_weight.shape, layer.values.shape
        (torch.Size([24, 8]), torch.Size([24, 2]))
        >>> [name for name, _ in attention.named_parameters()][1]
        'in_proj_weight_sparse.values'
    """

    bias = None
    sizes: tuple[int, ...]
    columns: tuple[int, ...]
    place: int  # among the owner's Parameters
    _readers = 0
    _last: tuple[object, Tensor] | None = None

    @classmethod
    def of(
        cls,
        owner: nn.Module,
        attribute: str,
        columns: Sequence[int],
        structure: Structure,
        indices: Tensor,
        permutation: Permutation | None = None,
        side: str = "input",
        values: Tensor | None = None,
    ) -> SparseParameter:
        """Put a sparse layer in the place of a Parameter.

        Args:
            owner: whose attribute it is; its class gets a property of that name.
            attribute: the Parameter's name in the owner.
            columns: the axes that products sum over.
            structure: the family of masks.
            indices: the kept units, in the structure's layout.
            permutation: of the matrix's inputs or outputs, by ``side``; None for none.
            side: "input" or "output".
            values: start values; by default the dense weights under the mask, rescaled.
        """
        weight = owner._parameters[attribute]
        assert weight is not None
        layer = cls()
        layer.sizes, layer.columns = tuple(weight.shape), tuple(columns)
        layer.place = list(owner._parameters).index(attribute)
        matrix = as_matrix(weight.detach(), columns)
        layer.begin(matrix, weight.requires_grad, structure, indices, permutation, side, values)
        layer.train(owner.training)
        own(owner, attribute, layer)
        return layer

    def dense_form(self, matrix: Tensor) -> Tensor:
        """Return the matrix in the Parameter's shape."""
        rows = [axis for axis in range(len(self.sizes)) if axis not in self.columns]
        order = (*rows, *self.columns)
        tensor = matrix.reshape([self.sizes[axis] for axis in order])
        return tensor.permute([order.index(axis) for axis in range(len(order))])

    def forward(self) -> Tensor:
        """Return the effective dense weight in the Parameter's shape, differentiable.

        While ``readers`` forward passes of the owner run, it is computed once.
        """
        if torch.compiler.is_compiling() or not self.readers:
            self._last = None
            return self.dense_form(dense_matrix(self))
        now, last = self._state(), self._last
        if last is None or last[0] != now:
            last = self._last = (now, self.dense_form(dense_matrix(self)))
        return last[1]

    @property
    def readers(self) -> int:
        """How many forward passes of the owner are running."""
        return self._readers

    @readers.setter
    def readers(self, count: int) -> None:
        self._readers = count
        if not count:
            self._last = None

    def _state(self) -> tuple[Any, ...]:
        """Return what the computed weight depends on within one forward pass."""
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        tensors = (self.values, self.indices)
        seen = [(id(t), None if t.is_inference() else t._version) for t in tensors]
        return (threading.get_ident(), *modes, *seen)

    def _matrix_from(self, dense: Tensor) -> Tensor:
        return as_matrix(dense.to(self.values.device), self.columns)

    def extra_repr(self) -> str:
        """Name the Parameter's shape beside what every sparse layer names."""
        return f"{'x'.join(map(str, self.sizes))} as {super().extra_repr()}"


@torch.no_grad()
def put_back(owner: nn.Module) -> None:
    """Make the sparse Parameters of ``owner`` dense again, in their old order.

    Args:
        owner: any module; one without sparse Parameters stays as it is.

    Example:
        >>> put_back(nn.Linear(2, 2))
    """
    for name in reversed(owned(owner)):  # the last one first: each knows its place then
        layer = release(owner, name)
        assert isinstance(layer, SparseParameter)
        dense = layer.weight.to(layer.values.dtype).contiguous()
        parameters = list(owner._parameters.items())
        parameters.insert(layer.place, (name, nn.Parameter(dense, layer.values.requires_grad)))
        owner._parameters.clear()
        owner._parameters.update(parameters)
